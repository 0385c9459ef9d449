"""Block-sparse attention in Pallas for TPU, forward and backward.

Kernels for the chosen blocks (`tpu_tiles`) and for the windows (`tpu_windows`);
between them XLA brings queries into the order of tiles and joins what a token
got from its choices and from its window by log-sum-exp. As in `xla`, nothing is
scattered.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention.dispatch import (
  Dispatch,
  make_dispatch,
)
from deepseek_jax.kernels.block_sparse_attention.merge import merge_attention
from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout
from deepseek_jax.kernels.block_sparse_attention.tpu_parts import (
  VMEM_BYTES,
  Tuning,
  in_turns,
  vmem_bytes,
)
from deepseek_jax.kernels.block_sparse_attention.tpu_tiles import (
  tiles_backward,
  tiles_forward,
)
from deepseek_jax.kernels.block_sparse_attention.tpu_windows import (
  windows_backward,
  windows_forward,
)
from deepseek_jax.kernels.block_sparse_attention.xla_parts import (
  Above,
  Partial,
  fetch,
)

_LANES = 512  # Queries that a step of a grid meets: enough to pay for a step.
_CELL = 512  # Tokens of a cell of a long window.
_TOKENS = 2**14  # Of all heads that run at once, to bound the memory of tiles.


def tuning(layout: Layout, heads: Heads, *, interpret: bool = False) -> Tuning:
  """Returns how much to do at a time: by reasoning, not by measurement."""
  _, time, group, _ = heads.q.shape
  return Tuning(
    rows=min(256, max(16, _LANES // group // 16 * 16)),
    blocks=_cell_blocks(layout, heads),
    heads=max(2, _TOKENS // time),  # A chip may have two cores to feed.
    interpret=interpret,
  )


def _cell_blocks(layout: Layout, heads: Heads) -> int:
  """Returns the blocks of a cell: of long windows, as many as fit.

  A larger cell reads keys fewer times and takes fewer steps of the grid, but
  computes more of what the edges of a window mask.
  """
  group, size = heads.q.shape[2:]
  blocks = max(1, 128 // layout.block)
  while True:
    cell = 2 * blocks * layout.block
    need = vmem_bytes(cell, cell * group, size)
    long = layout.band * layout.block >= 4 * cell
    if not long or cell > _CELL or need > VMEM_BYTES:
      return blocks
    blocks *= 2


def why_not(layout: Layout, tuning: Tuning, heads: Heads) -> str | None:
  """Returns why the kernels cannot do this; None if they can."""
  for name in ("q", "k", "v"):
    dtype = getattr(heads, name).dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
      return f"{name} must be float32 or bfloat16 on TPU, got {dtype}"
  _, _, group, size = heads.q.shape
  packed = 32 // min(x.dtype.itemsize for x in heads[:3])
  lanes = tuning.rows * group
  if layout.block % packed or lanes % packed:
    return (
      f"block_size, and tuning.rows times the heads of q per head of k, must "
      f"be multiples of {packed} for {heads.k.dtype} on TPU, got "
      f"{layout.block} and {lanes}"
    )
  cell = layout.block * tuning.blocks
  need = max(
    vmem_bytes(cell, cell * group, size), vmem_bytes(layout.block, lanes, size)
  )
  if need > VMEM_BYTES:
    return (
      f"block_size times the heads of q per head of k must fit the "
      f"{VMEM_BYTES >> 20} MiB of fast memory of a TPU kernel, got "
      f"{layout.block} and {group}, which take up to {-(-need >> 20)} MiB; a "
      "smaller block_size would do"
    )
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
  layout: Layout, tuning: Tuning, heads: Heads, ids: Int[Array, "P T R"]
) -> tuple[Float[Array, "P T G H"], Float[Array, "P T G"]]:
  """Returns attention and its log-sum-exp.

  T is a multiple of the block. The `ids` of a token are distinct blocks that
  its window does not hold, nor the future; -1 stands for none.

  Raises:
    NotImplementedError: for types and sizes that the kernels cannot take.
  """
  out, lse, _ = _forward_all(layout, tuning, heads, ids)
  return out, lse


def _forward_all(layout, tuning, heads, ids):
  if reason := why_not(layout, tuning, heads):
    raise NotImplementedError(f"{reason}; or use implementation='xla'.")
  one = lambda pair: _forward(layout, tuning, *pair)
  return in_turns(_turn(tuning, heads, ids), one, (heads, ids))


def _turn(tuning: Tuning, heads: Heads, ids: Array | None) -> int:
  """Returns how many heads to run at once: all, if there are no tiles."""
  no_tiles = ids is None or ids.shape[-1] == 0
  return heads.k.shape[0] if no_tiles else tuning.heads


def _attend_fwd(layout, tuning, heads, ids):
  out, lse, plan = _forward_all(layout, tuning, heads, ids)
  return (out, lse), (heads, plan, out, lse)


def _attend_bwd(layout, tuning, residuals, cotangents):
  heads, plan, out, lse = residuals
  d_out, d_lse = cotangents
  # With weights p and their gradient dp, logits get p·(dp - delta).
  delta = jnp.sum(d_out.astype(jnp.float32) * out, -1) - d_lse
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # Saw nothing: p is 0.
  above = Above(d_out, lse, delta)
  one = lambda args: _backward(layout, tuning, *args)
  place = None if plan is None else plan.place
  turn = _turn(tuning, heads, place)
  return in_turns(turn, one, (heads, plan, above)), None


attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(
  layout: Layout, tuning: Tuning, heads: Heads, ids: Int[Array, "P T R"]
):
  near = windows_forward(layout, tuning, heads)
  if ids.shape[-1] == 0:
    return near.out.astype(heads.q.dtype), near.lse, None
  blocks = heads.k.shape[1] // layout.block
  make = lambda ids: make_dispatch(ids, blocks, tuning.rows)
  plan = jax.vmap(make)(ids)
  far = tiles_forward(layout, tuning, heads, plan)
  out, lse = _join(near, far, plan.place)
  return out.astype(heads.q.dtype), lse, plan


def _backward(
  layout: Layout,
  tuning: Tuning,
  heads: Heads,
  plan: Dispatch | None,
  above: Above,
) -> Heads:
  grads = windows_backward(layout, tuning, heads, above)
  if plan is not None:
    d_far, d_k, d_v = tiles_backward(layout, tuning, heads, plan, above)
    d_q = grads.q + _fetch(d_far, plan.place, 0.0).sum(0)
    grads = grads._replace(q=d_q, k=grads.k + d_k, v=grads.v + d_v)
  cast = lambda grad, of: grad.astype(of.dtype)
  return jax.tree.map(cast, grads, heads._replace(segments=None))


def _join(near: Partial, far: Partial, place: Int[Array, "P T R"]):
  """Joins what tokens got from their windows and from their choices."""
  outputs = jnp.concatenate([near.out[None], _fetch(far.out, place, 0.0)])
  lse = jnp.concatenate([near.lse[None], _fetch(far.lse, place, -jnp.inf)])
  return merge_attention(outputs, lse)


def _fetch(x: Array, place: Int[Array, "P T R"], fill: float) -> Array:
  """Returns what tokens got from the tiles, [R, P, T, G, ...]."""
  one = lambda x, place: fetch(x, place.T, fill)
  return jax.vmap(one, out_axes=1)(x, place)
