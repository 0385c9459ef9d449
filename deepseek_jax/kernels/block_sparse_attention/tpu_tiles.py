"""The chosen blocks on TPU: tiles of queries that share a block of keys.

The table of tiles lies in scalar memory before a kernel starts, so that the
block of keys of the next tile is on its way while this one is computed; tiles
that share it fetch it once. The gradient of a block stays in fast memory from
its first tile to its last.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from deepseek_jax.kernels.block_sparse_attention.dispatch import Dispatch
from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout
from deepseek_jax.kernels.block_sparse_attention.tpu_parts import (
  Keys,
  Rows,
  Tuning,
  as_cells,
  as_rows,
  byte_count,
  cost,
  dot,
  log_sum,
  same_segment,
  specs,
)
from deepseek_jax.kernels.block_sparse_attention.xla_parts import (
  Above,
  Partial,
  finite,
  nonzero,
)

_NOBODY = -2  # The segment of a row without a token; padding has -1.


def tiles_forward(
  layout: Layout, tuning: Tuning, heads: Heads, plan: Dispatch
) -> Partial:
  """Returns attention of all rows of all tiles."""
  rows, keys = _gather(heads, plan, None), _keys(layout, heads)
  outs = [
    jax.ShapeDtypeStruct(rows.q.shape, jnp.float32),
    jax.ShapeDtypeStruct(_row_shape(rows), jnp.float32),
  ]
  call = _call(_forward_kernel, 2, tuning, rows, keys, outs, [_own, _own])
  out, lse = call(*_table(plan), rows, keys)
  count, _, group, size = heads.q.shape
  return Partial(
    out.reshape(count, -1, group, size), lse.reshape(count, -1, group)
  )


def tiles_backward(
  layout: Layout, tuning: Tuning, heads: Heads, plan: Dispatch, above: Above
) -> tuple[Array, Array, Array]:
  """Returns gradients: of the queries in tiles, of all keys and values."""
  rows, keys = _gather(heads, plan, above), _keys(layout, heads)
  outs = [
    jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (rows.q, keys.k, keys.v)
  ]
  places = [_own, _chosen, _chosen]
  call = _call(_backward_kernel, 5, tuning, rows, keys, outs, places)
  d_q, d_k, d_v = call(*_table(plan), rows, keys)
  count, time, group, size = heads.q.shape
  wide = lambda x: x.reshape(count, time, size)
  return d_q.reshape(count, -1, group, size), wide(d_k), wide(d_v)


def _own(head, tile, block, filled):
  return head, tile


def _chosen(head, tile, block, filled):
  return head, block[head, tile]


def _forward_kernel(block, filled, rows: Rows, keys: Keys, out, lse):
  @pl.when(filled[pl.program_id(0), pl.program_id(1)] > 0)
  def _():
    logits = _logits(rows, keys)
    top = finite(logits.max(0, keepdims=True))
    p = jnp.exp(logits - top)
    total = p.sum(0, keepdims=True)
    out[...] = (dot(keys.v[...], p, (0, 0)) / nonzero(total)).T
    lse[...] = log_sum(top, total)


def _backward_kernel(block, filled, rows: Rows, keys: Keys, d_q, d_k, d_v):
  head, tile = pl.program_id(0), pl.program_id(1)
  before = block[head, jnp.maximum(tile - 1, 0)]

  @pl.when((tile == 0) | (block[head, tile] != before))
  def _():
    d_k[...] = jnp.zeros(d_k.shape, d_k.dtype)
    d_v[...] = jnp.zeros(d_v.shape, d_v.dtype)

  @pl.when(filled[head, tile] > 0)
  def _():
    p = jnp.exp(_logits(rows, keys) - rows.lse[...])
    d_p = dot(keys.v[...], rows.d_out[...], (1, 1))
    d_logits = p * (d_p - rows.delta[...])
    d_q[...] = dot(keys.k[...], d_logits, (0, 0)).T
    d_k[...] += dot(d_logits, rows.q[...], (1, 0))
    d_v[...] += dot(p, rows.d_out[...], (1, 0))


def _logits(rows: Rows, keys: Keys) -> Array:
  logits = dot(keys.k[...], rows.q[...], (1, 1))
  if rows.segments is None:
    return logits
  seen = same_segment(keys.segments[...], rows.segments[...])
  return jnp.where(seen, logits, -jnp.inf)


def _call(kernel, dots, tuning: Tuning, rows: Rows, keys: Keys, outs, places):
  heads, tiles = rows.q.shape[:2]
  moved = byte_count((rows, outs))
  moved += byte_count(keys) // keys.k.shape[1] * tiles
  return pl.pallas_call(
    kernel,
    out_shape=outs,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=rows.q.shape[:2],
      in_specs=[specs(rows, _own), specs(keys, _chosen)],
      out_specs=[specs(x, at) for x, at in zip(outs, places, strict=True)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    cost_estimate=cost(dots, heads * tiles, rows, keys, moved),
    interpret=tuning.interpret,
    name=kernel.__name__.strip("_"),
  )


def _table(plan: Dispatch) -> tuple[Int[Array, "P M"], Int[Array, "P M"]]:
  """Returns the block of each tile, and whether anybody is in it.

  The rows of an empty tile are never fetched, so nothing is computed for them.
  """
  time = plan.place.shape[-2]
  return plan.block, (plan.token < time).any(-1).astype(jnp.int32)


def _row_shape(rows: Rows) -> tuple[int, ...]:
  return (*rows.q.shape[:2], 1, rows.q.shape[2])


def _keys(layout: Layout, heads: Heads) -> Keys:
  cut = functools.partial(as_cells, lanes=layout.block)
  segments = as_rows(heads.segments, layout.block)
  return Keys(cut(heads.k), cut(heads.v), segments)


def _gather(heads: Heads, plan: Dispatch, above: Above | None) -> Rows:
  """Brings what belongs to tokens into the order of tiles."""
  count, _, group, size = heads.q.shape
  tiles, length = plan.token.shape[1:]

  def take(x, fill=0):
    one = lambda x, token: x.at[token].get(mode="fill", fill_value=fill)
    x = x.reshape(*x.shape[:2], -1)
    return jax.vmap(one)(x, plan.token)

  wide = lambda x: take(x).reshape(count, tiles, length * group, size)
  row = lambda x: x.reshape(count, tiles, 1, length * group)
  rows = Rows(wide(heads.q))
  if heads.segments is not None:
    segments = jnp.repeat(take(heads.segments, _NOBODY), group, -1)
    rows = rows._replace(segments=row(segments))
  if above is not None:
    rows = rows._replace(
      d_out=wide(above.d_out),
      lse=row(take(above.lse, jnp.inf)),  # Nobody: p is 0.
      delta=row(take(above.delta)),
    )
  return rows
