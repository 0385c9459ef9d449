"""Block-sparse attention in plain JAX, forward and backward.

One head after the other, so that intermediate arrays stay small and close:
first the tiles of `dispatch`, whose queries share a block of keys, then the
windows, which also fetch what their tokens got from the tiles. The backward
pass recomputes the weights from the log-sum-exp. It scatters nothing: the
gradient of a query is fetched from the tiles, and as the tiles of a block
follow each other, those of keys and values add up where they lie.

Shape letters: P heads (batch · key-value heads), T tokens, G query heads that
share keys, H head size, M tiles of L tokens, C tiles or query blocks in a step
of a loop, J keys in a block, W keys in a window, R chosen blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention.dispatch import (
  NOWHERE,
  Dispatch,
  make_dispatch,
)
from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout
from deepseek_jax.kernels.block_sparse_attention.xla_parts import Above, Tuning
from deepseek_jax.kernels.block_sparse_attention.xla_tiles import (
  tiles_backward,
  tiles_forward,
)
from deepseek_jax.kernels.block_sparse_attention.xla_windows import (
  windows_backward,
  windows_forward,
)

_BLOCKS = 16  # Query blocks in a step: a few megabytes of logits.


def padded_blocks(blocks: int) -> int:
  """Returns the least number of blocks that cuts into equal steps."""
  steps = -(-blocks // _BLOCKS)
  return steps * -(-blocks // steps)


def tuning(layout: Layout, heads: Heads) -> Tuning:
  """Returns how much to do at a time on this kind of device."""
  _, time, group, _ = heads.q.shape
  blocks = time // layout.block
  per_step = blocks // -(-blocks // _BLOCKS)
  rows = max(1, layout.block // group)
  together = jax.default_backend() != "cpu"
  return Tuning(rows=rows, tiles=32, blocks=per_step, together=together)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
  layout: Layout, tuning: Tuning, heads: Heads, ids: Int[Array, "P T R"]
) -> tuple[Float[Array, "P T G H"], Float[Array, "P T G"]]:
  """Returns attention and its log-sum-exp.

  T is a multiple of the block. The `ids` of a token are distinct blocks that
  its window does not hold, nor the future; -1 stands for none.
  """
  out, lse, _ = _forward_all(layout, tuning, heads, ids)
  return out, lse


def _forward_all(layout, tuning, heads, ids):
  one = lambda pair: _forward(layout, tuning, *pair)
  return _over_heads(tuning, one, (heads, ids))


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
  return _over_heads(tuning, one, (heads, plan, above)), None


attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(
  layout: Layout, tuning: Tuning, head: Heads, ids: Int[Array, "T R"]
):
  if ids.shape[1]:
    plan = make_dispatch(ids, head.k.shape[0] // layout.block, tuning.rows)
  else:
    plan = _no_tiles(ids.shape[0], tuning.rows)
  remote = tiles_forward(layout, tuning, head, plan)
  out, lse = windows_forward(layout, tuning, head, plan.place, remote)
  return out.astype(head.q.dtype), lse, plan


def _over_heads(tuning: Tuning, one: Callable[[Any], Any], tree: Any) -> Any:
  return jax.vmap(one)(tree) if tuning.together else jax.lax.map(one, tree)


def _no_tiles(time: int, rows: int) -> Dispatch:
  none = jnp.zeros(0, jnp.int32)
  place = jnp.full((time, 1), NOWHERE)
  return Dispatch(none, none.reshape(0, rows), place)


def _backward(
  layout: Layout, tuning: Tuning, head: Heads, plan: Dispatch, above: Above
) -> Heads:
  d_remote, d_k, d_v = tiles_backward(layout, tuning, head, plan, above)
  d_head = windows_backward(layout, tuning, head, plan.place, above, d_remote)
  d_k, d_v = d_head.k + d_k, d_head.v + d_v
  cast = lambda grad, of: grad.astype(of.dtype)
  return d_head._replace(
    q=cast(d_head.q, head.q), k=cast(d_k, head.k), v=cast(d_v, head.v)
  )
