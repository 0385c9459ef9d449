"""The chosen blocks on Hopper: tiles of queries, cut into chunks."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from deepseek_jax.kernels.block_sparse_attention.dispatch import Dispatch
from deepseek_jax.kernels.block_sparse_attention.gpu_keys import keys_backward
from deepseek_jax.kernels.block_sparse_attention.gpu_parts import (
  CHUNK,
  Above,
  Keys,
  Range,
  Rows,
  as_rows,
)
from deepseek_jax.kernels.block_sparse_attention.gpu_rows import rows_forward
from deepseek_jax.kernels.block_sparse_attention.gpu_sight import Sight
from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout

_NOBODY = -2  # The segment of a row without a token; padding has -1.


def tiles_forward(
  layout: Layout, stages: int, heads: Heads, plan: Dispatch
) -> tuple[Float[Array, "P T R G H"], Float[Array, "P T R G"]]:
  """Returns what tokens get from their blocks, and the log-sum-exp of each."""
  slabs, _ = _ranges(layout, heads, plan)
  out, lse = rows_forward(
    _sight(layout, heads), stages, _rows(heads, plan),
    Keys(heads.k, heads.v, heads.segments), slabs,
  )  # fmt: skip
  return _fetch(out, plan, heads), _fetch(lse, plan, heads, -jnp.inf)


def tiles_backward(
  layout: Layout, stages: int, heads: Heads, plan: Dispatch, above: Above
) -> tuple[
  Float[Array, "P T G H"], Float[Array, "P T H"], Float[Array, "P T H"]
]:
  """Returns gradients of queries, keys and values from the tiles."""
  _, chunks = _ranges(layout, heads, plan)
  tiled = functools.partial(_gather, plan.token)
  above = Above(
    tiled(above.d_out), tiled(above.lse, fill=jnp.inf), tiled(above.delta)
  )
  d_k, d_v, d_q = keys_backward(
    _sight(layout, heads), stages, _rows(heads, plan),
    Keys(heads.k, heads.v, heads.segments), chunks, above, with_rows=True,
  )  # fmt: skip
  fetch = lambda x: _fetch(x, plan, heads).astype(jnp.float32).sum(2)
  return jax.vmap(fetch, 1)(d_q).sum(0), d_k, d_v


def _sight(layout: Layout, heads: Heads) -> Sight:
  """Chosen blocks lie wholly in the past: there is no order to mind."""
  return Sight(
    group=heads.q.shape[2], own=layout.block // CHUNK, is_causal=False, ramp=1.0
  )


def _rows(heads: Heads, plan: Dispatch) -> Rows:
  segments = heads.segments
  if segments is not None:
    group = heads.q.shape[2]
    segments = jnp.repeat(segments[..., None], group, axis=2)
    segments = _gather(plan.token, segments, fill=_NOBODY)
  return Rows(_gather(plan.token, heads.q), segments, None, None)


def _ranges(layout, heads: Heads, plan: Dispatch) -> tuple[Range, Range]:
  """Returns the slabs that the chunks of tiles visit, and the converse.

  Tiles without a token visit nothing: those that are left over would all be
  work of the last block.
  """
  time, group = heads.q.shape[1:3]
  own = layout.block // CHUNK
  chunks = plan.token.shape[-1] * group // CHUNK  # of a tile
  used = plan.token[..., 0] < time  # A tile is filled from its first row.
  first = jnp.repeat(plan.block * own, chunks, axis=1)
  slabs = Range(first, first + own * jnp.repeat(used, chunks, axis=1))

  def of_blocks(block, used):
    before = jnp.cumsum(used, dtype=jnp.int32)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), before])
    edges = jnp.searchsorted(block, jnp.arange(time // layout.block + 1))
    first = edges[:-1].astype(jnp.int32)
    return first, first + jnp.diff(before[edges])

  visitors = jax.vmap(of_blocks)(plan.block, used)
  repeat = lambda x: jnp.repeat(x * chunks, own, axis=1)
  return slabs, Range(*map(repeat, visitors))


def _gather(
  token, x: Shaped[Array, "P T G ..."], fill: int | float = 0
) -> Array:
  """Brings what belongs to tokens [P, T, G, ...] to the rows of tiles."""
  one = lambda x, at: x.at[at.reshape(-1)].get(mode="fill", fill_value=fill)
  return as_rows(jax.vmap(one)(x, token))


def _fetch(x: Array, plan: Dispatch, heads: Heads, fill: int | float = 0):
  """Returns what tokens got from their tiles, [P, T, R, G, ...]."""
  x = x.reshape(x.shape[0], -1, heads.q.shape[2], *x.shape[2:])
  one = lambda x, at: x.at[at].get(mode="fill", fill_value=fill)
  return jax.vmap(one)(x, plan.place)
