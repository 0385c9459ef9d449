"""The chosen blocks: tiles of queries that share a block of keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.kernels.block_sparse_attention.dispatch import Dispatch
from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout
from deepseek_jax.kernels.block_sparse_attention.xla_parts import (
  Above,
  Partial,
  Tuning,
  dot,
  finite,
  in_blocks,
  nonzero,
  rows,
)

_NOBODY = -2  # The segment of a row without a token; padding has -1.


def tiles_forward(
  layout: Layout, tuning: Tuning, head: Heads, plan: Dispatch
) -> Partial:
  """Returns attention of every row of every tile to the block of its tile."""
  group, size = head.q.shape[1:]
  if not plan.block.size:  # No choices: one row that nobody fetches.
    return Partial(jnp.zeros((1, group, size)), jnp.zeros((1, group)))

  def step(_, tiles):
    logits, v = _tile_logits(layout, head, tiles)
    top = finite(logits.max(-1, keepdims=True))
    p = jnp.exp(logits - top)
    total = p.sum(-1, keepdims=True)
    out = dot("crj,cjh->crh", p, v) / nonzero(total)
    return None, (out, top + jnp.log(total))

  _, (out, lse) = jax.lax.scan(step, None, _tile_steps(tuning, head, plan))
  return Partial(out.reshape(-1, group, size), lse.reshape(-1, group))


def tiles_backward(
  layout: Layout, tuning: Tuning, head: Heads, plan: Dispatch, above: Above
):
  """Returns gradients: of the queries in tiles, of all keys and values."""
  group, size = head.q.shape[1:]
  if not plan.block.size:
    d_kv = jnp.zeros_like(head.k, jnp.float32)
    return jnp.zeros((1, group, size)), d_kv, d_kv
  steps = _tile_steps(tuning, head, plan)
  per_step = steps[0].shape[1]
  blocks = head.k.shape[0] // layout.block + per_step
  # Made of the keys, so that `shard_map` sees that it varies as they do.
  empty = jnp.zeros_like(
    head.k, jnp.float32, shape=(blocks, layout.block, 2 * size)
  )

  def step(d_kv, tiles):
    block, token = tiles
    logits, v = _tile_logits(layout, head, tiles)
    q, d_out = rows(head.q, token), rows(above.d_out, token)
    lse = rows(above.lse, token, jnp.inf)
    p = jnp.exp(logits - lse[..., None])
    d_p = dot("crh,cjh->crj", d_out, v)
    d_logits = p * (d_p - rows(above.delta, token)[..., None])
    k = in_blocks(head.k, layout.block)[block]
    d_q = dot("crj,cjh->crh", d_logits, k)
    d_k = dot("crj,crh->cjh", d_logits, q)
    d_v = dot("crj,crh->cjh", p, d_out)
    return _add_runs(d_kv, jnp.concatenate([d_k, d_v], -1), block), d_q

  d_kv, d_q = jax.lax.scan(step, empty, steps)
  d_kv = d_kv[:-per_step].reshape(-1, 2 * size)
  return d_q.reshape(-1, group, size), d_kv[:, :size], d_kv[:, size:]


def _tile_steps(tuning: Tuning, head: Heads, plan: Dispatch):
  """Cuts the plan into equal steps; what is left over has no tokens."""
  tiles, rows = plan.token.shape
  steps = -(-tiles // tuning.tiles)
  per_step = -(-tiles // steps)
  more = steps * per_step - tiles
  block = jnp.pad(plan.block, (0, more), mode="edge")
  none = head.q.shape[0]
  token = jnp.pad(plan.token, ((0, more), (0, 0)), constant_values=none)
  return block.reshape(steps, per_step), token.reshape(steps, per_step, rows)


def _tile_logits(layout: Layout, head: Heads, tiles):
  block, token = tiles
  k, v = (
    in_blocks(head.k, layout.block)[block],
    in_blocks(head.v, layout.block)[block],
  )
  logits = dot("crh,cjh->crj", rows(head.q, token), k)
  if head.segments is not None:
    of_query = head.segments.at[token].get(mode="fill", fill_value=_NOBODY)
    of_query = jnp.repeat(of_query, head.q.shape[1], axis=1)
    of_key = in_blocks(head.segments, layout.block)[block]
    seen = of_query[:, :, None] == of_key[:, None, :]
    seen &= of_key[:, None, :] >= 0
    logits = jnp.where(seen, logits, -jnp.inf)
  return logits, v


def _add_runs(
  total: Float[Array, "B J D"], parts: Float[Array, "C J D"], block: Array
):
  """Adds parts to the blocks they belong to, by a product with zeros and ones.

  Their blocks rise by 0 or 1, so that they are neighbours in `total`.
  """
  count = parts.shape[0]
  slot = (block - block[0])[None] == jnp.arange(count)[:, None]
  sums = dot("sc,cjd->sjd", slot.astype(parts.dtype), parts)
  before = jax.lax.dynamic_slice_in_dim(total, block[0], count)
  return jax.lax.dynamic_update_slice_in_dim(total, before + sums, block[0], 0)
