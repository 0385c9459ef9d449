"""The windows on Hopper: chunks of queries and the slabs around them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.kernels.block_sparse_attention.gpu_keys import keys_backward
from deepseek_jax.kernels.block_sparse_attention.gpu_parts import (
  CHUNK,
  Above,
  Keys,
  Range,
  Rows,
  as_rows,
)
from deepseek_jax.kernels.block_sparse_attention.gpu_rows import (
  rows_backward,
  rows_forward,
)
from deepseek_jax.kernels.block_sparse_attention.gpu_sight import Sight
from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout


def windows_forward(
  layout: Layout, stages: int, heads: Heads
) -> tuple[Float[Array, "P T G H"], Float[Array, "P T G"]]:
  """Returns attention of every token to its window, and the log-sum-exp."""
  out, lse = rows_forward(
    _sight(layout, heads), stages, _rows(heads),
    Keys(heads.k, heads.v, heads.segments), _band(layout, heads),
  )  # fmt: skip
  return out.reshape(heads.q.shape), lse.reshape(heads.q.shape[:3])


def windows_backward(
  layout: Layout, stages: int, heads: Heads, above: Above
) -> Heads:
  """Returns the gradients that windows give; `above` is by token."""
  sight, rows = _sight(layout, heads), _rows(heads)
  keys = Keys(heads.k, heads.v, heads.segments)
  above = jax.tree.map(as_rows, above)
  d_rows = rows_backward(sight, stages, rows, keys, _band(layout, heads), above)
  d_k, d_v = keys_backward(
    sight, stages, rows, keys, _visitors(layout, heads), above, with_rows=False
  )
  back = lambda grad, of: grad.reshape(of.shape).astype(of.dtype)
  edge = lambda grad, of: None if grad is None else back(grad, of)
  return Heads(
    back(d_rows.q, heads.q), d_k, d_v, edge(d_rows.span, heads.span),
    edge(d_rows.offset, heads.offset), None,
  )  # fmt: skip


def _sight(layout: Layout, heads: Heads) -> Sight:
  return Sight(
    group=heads.q.shape[2], own=layout.block // CHUNK,
    is_causal=layout.is_causal, ramp=float(layout.ramp),
  )  # fmt: skip


def _rows(heads: Heads) -> Rows:
  segments = heads.segments
  if segments is not None:
    segments = jnp.repeat(segments, heads.q.shape[2], axis=1)
  edge = lambda x: None if x is None else as_rows(x).astype(jnp.float32)
  span, offset = edge(heads.span), edge(heads.offset)
  if span is None:
    offset = None  # No window has a middle if none has an edge.
  return Rows(as_rows(heads.q), segments, span, offset)


def _band(layout: Layout, heads: Heads) -> Range:
  """Returns the slabs that the chunks of windows visit."""
  count, time, group = heads.q.shape[:3]
  own = layout.block // CHUNK
  block = jnp.arange(time * group // CHUNK) // (group * own)
  return _range(
    (block - layout.reach) * own, (block + layout.ahead + 1) * own,
    time // CHUNK, count,
  )  # fmt: skip


def _visitors(layout: Layout, heads: Heads) -> Range:
  """Returns the chunks of windows that visit the slabs."""
  count, time, group = heads.q.shape[:3]
  own = layout.block // CHUNK
  block = jnp.arange(time // CHUNK) // own
  chunks = group * own  # of a block
  return _range(
    (block - layout.ahead) * chunks, (block + layout.reach + 1) * chunks,
    time * group // CHUNK, count,
  )  # fmt: skip


def _range(first, stop, end: int, heads: int) -> Range:
  """Cuts neighbours at the ends of the sequence; the same for all heads."""
  cut = lambda x: jnp.clip(x, 0, end).astype(jnp.int32)
  return Range(
    *(jnp.broadcast_to(cut(x), (heads, x.size)) for x in (first, stop))
  )
