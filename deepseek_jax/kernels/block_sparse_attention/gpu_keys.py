"""Hopper kernel of keys: each slab gathers its gradient from its visitors."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from deepseek_jax.kernels.block_sparse_attention.gpu_parts import (
  CHUNK,
  Above,
  Keys,
  Range,
  Rows,
  across,
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
)


def keys_backward(
  sight: Sight,
  stages: int,
  rows: Rows,
  keys: Keys,
  chunks: Range,
  above: Above,
  *,
  with_rows: bool,
) -> tuple[Float[Array, "P ..."], ...]:
  """Returns gradients of keys, values and, if asked, queries [P, own, N, H].

  Args:
    sight: what rows see.
    stages: chunks for which there are buffers.
    rows: the queries.
    keys: the keys.
    chunks: the visitors of every slab.
    above: what is known of the result.
    with_rows: whether the rows visit one block alone, and their gradients are
      wanted: a part from every slab of it. Rows that visit none get no value.
  """
  heads, time, size = keys.k.shape
  dtype = rows.q.dtype
  d_k = jax.ShapeDtypeStruct(keys.k.shape, dtype)
  d_q = jax.ShapeDtypeStruct((heads, sight.own, *rows.q.shape[1:]), dtype)
  staged = functools.partial(matrices, dtype, stages, CHUNK, size)
  vectors = functools.partial(like_vectors, stages=(stages,))
  one = matrices(dtype, CHUNK, size)
  pair = matrices(dtype, CHUNK, CHUNK)
  scratch = [
    Keys(one, one, like_vectors(keys.segments)),
    Rows(staged(), *vectors(rows[1:])),
    Above(staged(), *vectors(above[1:])),
    (pair, pair, one if with_rows else None),
    plgpu.Barrier(num_arrivals=len(jax.tree.leaves(keys))),
    plgpu.Barrier(
      num_arrivals=len(jax.tree.leaves((rows, above))), num_barriers=stages
    ),
  ]
  kernel = functools.partial(_backward, sight, stages)
  out_type = (d_k, d_k, d_q if with_rows else None)
  grid = (heads, time // CHUNK)
  grads = launch(kernel, out_type, scratch, grid)(rows, keys, chunks, above)
  return tuple(grads if with_rows else grads[:2])


def _backward(
  sight, stages, rows, keys, chunks, above, d_k, d_v, d_q,
  my_keys, chunk_rows, chunk_above, pairs, keys_came, rows_came,
):  # fmt: skip
  head, slab = lax.axis_index("head"), lax.axis_index("number")
  fetch(keys, my_keys, head, slab, keys_came)
  plgpu.barrier_wait(keys_came)
  p_pairs, d_pairs, my_d_q = pairs
  dtype = p_pairs.dtype

  def start(chunk, slot):
    target = stage((chunk_rows, chunk_above), slot)
    fetch((rows, above), target, head, chunk, rows_came.at[slot])

  def gather(d_k_total, d_v_total):
    def step(chunk, slot, carry):
      q_now, above_now = stage((chunk_rows, chunk_above), slot)
      logits = product(q_now.q, my_keys.k.T)
      logits, weight = look(sight, q_now, my_keys, chunk, slab, logits)
      p = jnp.exp(logits - across(numbers(above_now.lse)))
      p = p if weight is None else p * weight
      d_p = product(above_now.d_out, my_keys.v.T)
      p_pairs[...] = p.astype(dtype)
      d_logits = p * (d_p - across(numbers(above_now.delta)))
      d_pairs[...] = d_logits.astype(dtype)
      plgpu.commit_smem()
      plgpu.wgmma(d_v_total, p_pairs.T, above_now.d_out)
      plgpu.wgmma(d_k_total, d_pairs.T, q_now.q)
      plgpu.wgmma_wait(0)
      if d_q is not None:
        my_d_q[...] = product(d_pairs, my_keys.k).astype(dtype)
        part = lax.rem(slab, jnp.int32(sight.own))
        store(my_d_q, d_q.at[head], part, chunk)
      return carry

    first, stop = chunks.first[head, slab], chunks.stop[head, slab]
    visit(first, stop, stages, start, rows_came, step, None)
    return d_k_total[...], d_v_total[...]

  total = plgpu.ACC(my_keys.k.shape, jnp.float32)
  d_k_now, d_v_now = pl.run_scoped(gather, total, total)
  my_keys.k[...] = d_k_now.astype(dtype)  # The keys are done.
  my_keys.v[...] = d_v_now.astype(dtype)
  store((my_keys.k, my_keys.v), (d_k, d_v), head, slab)
