"""Block-sparse attention on NVIDIA Hopper (sm_90), in Pallas Mosaic GPU.

Queries are brought into the order of the tiles of `dispatch`, and three kernels
do the rest, for windows and tiles alike: `rows_forward`, `keys_backward` and
`rows_backward`; the last for windows alone, as a row of a tile sees one block,
whose `keys_backward` knows its gradient. XLA gathers, and joins the window of a
token with what it got from its blocks. Products are of 16-bit numbers, sums in
float32; what the tiles pass on to the tokens is rounded to 16 bits.

Shape letters: P heads (batch · key-value heads), T tokens, G query heads that
share keys, H head size, M tiles of L tokens, R chosen blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention.dispatch import make_dispatch
from deepseek_jax.kernels.block_sparse_attention.gpu_parts import CHUNK, Above
from deepseek_jax.kernels.block_sparse_attention.gpu_tiles import (
  tiles_backward,
  tiles_forward,
)
from deepseek_jax.kernels.block_sparse_attention.gpu_windows import (
  windows_backward,
  windows_forward,
)
from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout


class Tuning(NamedTuple):
  """How much is done at a time; a static argument, any choice is right.

  Attributes:
    rows: L, tokens in a tile, a multiple of 64.
    stages: blocks or tiles under way into shared memory, at least 1.
  """

  rows: int = 64
  stages: int = 2


def tuning(layout: Layout, heads: Heads) -> Tuning:
  """Returns how much to do at a time: by reasoning, not by measurement."""
  del layout, heads
  return Tuning()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
  layout: Layout, tuning: Tuning, heads: Heads, ids: Int[Array, "P T R"]
) -> tuple[Float[Array, "P T G H"], Float[Array, "P T G"]]:
  """Returns attention and its log-sum-exp.

  T is a multiple of the block. The `ids` of a token are distinct blocks that
  its window does not hold, nor the future; -1 stands for none.

  Raises:
    NotImplementedError: for what these kernels cannot do.
  """
  out, lse, _ = _forward(layout, tuning, heads, ids)
  return out, lse


def why_not(layout: Layout, tuning: Tuning, heads: Heads) -> str | None:
  """Returns why the kernels cannot do this; None if they can."""
  dtypes = {x.dtype.name for x in heads[:3]}
  if dtypes not in ({"bfloat16"}, {"float16"}):
    return (
      f"q, k and v must all be bfloat16 or all float16, got {sorted(dtypes)}"
    )
  size = heads.q.shape[-1]
  if size not in (64, 128):
    return f"the head size must be 64 or 128, got {size}"
  if layout.block % CHUNK:
    return f"block_size must be a multiple of {CHUNK}, got {layout.block}"
  if tuning.rows < 1 or tuning.rows % CHUNK or tuning.stages < 1:
    return (
      f"rows must be a positive multiple of {CHUNK} and stages at least 1, "
      f"got {tuning}"
    )
  return None


def _forward(layout, tuning, heads, ids):
  if reason := why_not(layout, tuning, heads):
    raise NotImplementedError(f"{reason}; use implementation='xla'.")
  out, lse = windows_forward(layout, tuning.stages, heads)
  if not ids.shape[-1]:
    return out, lse, None
  blocks = heads.k.shape[1] // layout.block
  plan = jax.vmap(lambda one: make_dispatch(one, blocks, tuning.rows))(ids)
  far = tiles_forward(layout, tuning.stages, heads, plan)
  out, lse = _merge(out, lse, *far)
  return out, lse, plan


def _attend_fwd(layout, tuning, heads, ids):
  out, lse, plan = _forward(layout, tuning, heads, ids)
  return (out, lse), (heads, plan, out, lse)


def _attend_bwd(layout, tuning, residuals, cotangents):
  heads, plan, out, lse = residuals
  d_out, d_lse = cotangents
  # With weights p and their gradient dp, logits get p·(dp - delta).
  delta = d_out.astype(jnp.float32) * out.astype(jnp.float32)
  delta = delta.sum(-1) - d_lse
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # Saw nothing: p is 0.
  above = Above(d_out.astype(heads.q.dtype), lse, delta)
  d_heads = windows_backward(layout, tuning.stages, heads, above)
  if plan is not None:
    more = tiles_backward(layout, tuning.stages, heads, plan, above)
    add = lambda a, b: (a.astype(jnp.float32) + b).astype(a.dtype)
    d_q, d_k, d_v = jax.tree.map(add, d_heads[:3], more)
    d_heads = d_heads._replace(q=d_q, k=d_k, v=d_v)
  return d_heads, None


attend.defvjp(_attend_fwd, _attend_bwd)


def _merge(out, lse, far_out, far_lse):
  """Joins windows [P, T, G] with what was fetched, [P, T, R, G]."""
  top = jnp.maximum(jnp.maximum(lse, far_lse.max(2)), jnp.finfo(lse.dtype).min)
  near, far = jnp.exp(lse - top), jnp.exp(far_lse - top[:, :, None])
  mass = near + far.sum(2)
  merged = near[..., None] * out + (far[..., None] * far_out).sum(2)
  merged /= jnp.where(mass > 0, mass, 1)[..., None]
  return merged.astype(out.dtype), top + jnp.log(mass)
