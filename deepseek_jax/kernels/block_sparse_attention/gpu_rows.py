"""Hopper kernels of rows: each chunk looks at the slabs of keys it visits."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from deepseek_jax.kernels.block_sparse_attention.gpu_parts import (
  CHUNK,
  FLOOR,
  Above,
  Keys,
  Range,
  Rows,
  across,
  constant,
  fetch,
  launch,
  like_vectors,
  matrices,
  numbers,
  product,
  stage,
  store,
  visit,
)
from deepseek_jax.kernels.block_sparse_attention.gpu_sight import (
  Sight,
  look,
  slope,
)


def rows_forward(
  sight: Sight, stages: int, rows: Rows, keys: Keys, slabs: Range
) -> tuple[Float[Array, "P N H"], Float[Array, "P N"]]:
  """Returns attention of every chunk to its slabs, and the log-sum-exp."""
  heads, count, _ = rows.q.shape
  out_type = (
    jax.ShapeDtypeStruct(rows.q.shape, rows.q.dtype),
    jax.ShapeDtypeStruct((heads, count), jnp.float32),
  )
  lse = plgpu.SMEM((CHUNK,), jnp.float32)
  weights = matrices(rows.q.dtype, CHUNK, CHUNK)
  kernel = functools.partial(_forward, sight, stages)
  scratch = [_row_buffers(rows), _key_buffers(keys, stages), weights, lse]
  scratch += _barriers(rows, keys, stages)
  grid = (heads, count // CHUNK)
  return launch(kernel, out_type, scratch, grid)(rows, keys, slabs)


def _forward(
  sight, stages, rows, keys, slabs, out, lse,
  my_rows, slab_keys, weights, my_lse, rows_came, keys_came,
):  # fmt: skip
  head, chunk = lax.axis_index("head"), lax.axis_index("number")
  fetch(rows, my_rows, head, chunk, rows_came)
  plgpu.barrier_wait(rows_came)
  size = my_rows.q.shape[1]

  def start(slab, slot):
    fetch(keys, stage(slab_keys, slot), head, slab, keys_came.at[slot])

  def step(slab, slot, carry):
    total, top, mass = carry
    now = stage(slab_keys, slot)
    logits = product(my_rows.q, now.k.T)
    logits, weight = look(sight, my_rows, now, chunk, slab, logits)
    before, top = top, jnp.maximum(top, logits.max(1))
    p = jnp.exp(logits - across(top))
    p = p if weight is None else p * weight
    shrink = jnp.exp(before - top)
    mass = mass * shrink + p.sum(1)
    weights[...] = p.astype(weights.dtype)
    plgpu.commit_smem()
    total = total * across(shrink, size) + product(weights, now.v)
    return total, top, mass

  carry = constant(0, CHUNK, size), constant(FLOOR, CHUNK), constant(0, CHUNK)
  first, stop = slabs.first[head, chunk], slabs.stop[head, chunk]
  total, top, mass = visit(first, stop, stages, start, keys_came, step, carry)
  total /= across(jnp.where(mass > 0, mass, 1.0), size)
  my_rows.q[...] = total.astype(my_rows.q.dtype)  # Its queries are done.
  my_lse[...] = top + jnp.log(mass)
  store((my_rows.q, my_lse), (out, lse), head, chunk)


def rows_backward(
  sight: Sight,
  stages: int,
  rows: Rows,
  keys: Keys,
  slabs: Range,
  above: Above,
) -> Rows:
  """Returns the gradients of what belongs to rows."""
  heads, count, _ = rows.q.shape
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  out_type = jax.tree.map(like, rows._replace(segments=None))
  kernel = functools.partial(_backward, sight, stages)
  my_above = Above(_matrix(above.d_out), *like_vectors(above[1:]))
  my_edges = like_vectors((rows.span, rows.offset))
  weights = matrices(rows.q.dtype, CHUNK, CHUNK)
  scratch = [_row_buffers(rows), my_above, _key_buffers(keys, stages), weights]
  scratch += [my_edges, *_barriers((rows, above), keys, stages)]
  grid = (heads, count // CHUNK)
  (d_rows,) = launch(kernel, (out_type,), scratch, grid)(
    rows, keys, slabs, above
  )
  return d_rows


def _backward(
  sight, stages, rows, keys, slabs, above, d_rows,
  my_rows, my_above, slab_keys, weights, my_edges, rows_came, keys_came,
):  # fmt: skip
  head, chunk = lax.axis_index("head"), lax.axis_index("number")
  fetch((rows, above), (my_rows, my_above), head, chunk, rows_came)
  plgpu.barrier_wait(rows_came)
  lse, delta = numbers(my_above.lse), numbers(my_above.delta)
  size = my_rows.q.shape[1]

  def start(slab, slot):
    fetch(keys, stage(slab_keys, slot), head, slab, keys_came.at[slot])

  def step(slab, slot, carry):
    d_q, d_edges = carry
    now = stage(slab_keys, slot)
    logits = product(my_rows.q, now.k.T)
    logits, weight = look(sight, my_rows, now, chunk, slab, logits)
    d_p = product(my_above.d_out, now.v.T)
    d_weight = jnp.exp(logits - across(lse)) * (d_p - across(delta))
    d_logits = d_weight if weight is None else d_weight * weight
    if weight is not None:
      more = slope(sight, my_rows, chunk, slab, weight, d_weight)
      d_edges = jax.tree.map(jnp.add, d_edges, more)
    weights[...] = d_logits.astype(weights.dtype)
    plgpu.commit_smem()
    return d_q + product(weights, now.k), d_edges

  d_edges = (constant(0, CHUNK), constant(0, CHUNK))
  carry = constant(0, CHUNK, size), d_edges
  first, stop = slabs.first[head, chunk], slabs.stop[head, chunk]
  d_q, d_edges = visit(first, stop, stages, start, keys_came, step, carry)
  my_rows.q[...] = d_q.astype(my_rows.q.dtype)
  for buffer, value in zip(my_edges, d_edges, strict=True):
    if buffer is not None:
      buffer[...] = value
  d_mine = Rows(my_rows.q, None, *my_edges)
  store(d_mine, d_rows, head, chunk)


def _matrix(x: Array):
  return matrices(x.dtype, CHUNK, x.shape[-1])


def _row_buffers(rows: Rows) -> Rows:
  return Rows(_matrix(rows.q), *like_vectors(rows[1:]))


def _key_buffers(keys: Keys, stages: int) -> Keys:
  k = matrices(keys.k.dtype, stages, CHUNK, keys.k.shape[-1])
  return Keys(k, k, like_vectors(keys.segments, (stages,)))


def _barriers(rows, keys, stages: int):
  arrivals = lambda tree: len(jax.tree.leaves(tree))
  return [
    plgpu.Barrier(num_arrivals=arrivals(rows)),
    plgpu.Barrier(num_arrivals=arrivals(keys), num_barriers=stages),
  ]
