"""What decoding remembers: keys, values, and a summary of every block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from deepseek_jax.nn.lsh import BlockSummary, hash_buckets, summarize_blocks


class DecodeCache(NamedTuple):
  """Keys and values of the past, in blocks, of a fixed size.

  The summary is a `BlockSummary` kept up to date token by token, with the
  blocks last: what a query looks up, its bucket in all blocks, lies together.
  """

  k: Float[Array, "B K blocks J H"]
  v: Float[Array, "B K blocks J H"]
  total: Float[Array, "B K rounds buckets blocks H"]  # float32
  count: Float[Array, "B K rounds buckets blocks"]  # float32
  length: Int[Array, ""]  # Tokens in the cache, the same in every row.

  @property
  def capacity(self) -> int:
    """Tokens that fit."""
    return self.k.shape[2] * self.k.shape[3]

  @property
  def block_size(self) -> int:
    """Keys in a block."""
    return self.k.shape[3]


def empty_cache(
  batch: int,
  max_length: int,
  num_kv_heads: int,
  projections: Float[Array, "rounds H bits"],
  *,
  block_size: int,
  dtype: DTypeLike = jnp.float32,
) -> DecodeCache:
  """Returns a cache without tokens.

  Args:
    batch: rows.
    max_length: tokens it has room for, rounded up to whole blocks.
    num_kv_heads: K.
    projections: that the keys will be hashed with.
    block_size: keys in a block.
    dtype: of keys and values; summaries are float32.

  >>> cache = empty_cache(1, 10, 2, jnp.zeros((1, 4, 0)), block_size=4)
  >>> cache.capacity, int(cache.length)
  (12, 0)
  """
  blocks = -(-max_length // block_size)
  rounds, size, bits = projections.shape
  heads = (batch, num_kv_heads)
  keys = (*heads, blocks, block_size, size)
  summary = (*heads, rounds, 2**bits, blocks)
  return DecodeCache(
    # Arrays of their own: the same one could not be donated twice.
    k=jnp.zeros(keys, dtype),
    v=jnp.zeros(keys, dtype),
    total=jnp.zeros((*summary, size), jnp.float32),
    count=jnp.zeros(summary, jnp.float32),
    length=jnp.zeros((), jnp.int32),
  )


def check_room(cache: DecodeCache, tokens: Array, at: Int[Array, ""] | int):
  """Raises `ValueError` unless tokens fit into a cache from a place on.

  Where the place is traced, nobody knows before it runs.
  """
  rows, time = tokens.shape[:2]
  if rows != cache.k.shape[0]:
    raise ValueError(
      f"cache must have as many rows as tokens, {rows}, got "
      f"{cache.k.shape[0]} rows."
    )
  if time < 1:
    raise ValueError(f"tokens must be at least one, got {tokens.shape}.")
  if not isinstance(at, jax.core.Tracer) and at + time > cache.capacity:
    raise ValueError(
      f"cache must have room for {time} more tokens, got one that holds {at} "
      f"of {cache.capacity}; give init_cache a larger max_length."
    )


def fill_cache(
  cache: DecodeCache,
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  projections: Float[Array, "rounds H bits"],
  length: Int[Array, ""] | int | None = None,
) -> DecodeCache:
  """Returns a cache that holds the first tokens and nothing else.

  Args:
    cache: of the right shape; what it holds is dropped.
    k: keys.
    v: values.
    projections: that the keys are hashed with.
    length: how many of the tokens count, at most T; all if None.
  """
  time, block = k.shape[1], cache.block_size
  length = jnp.asarray(time if length is None else length, jnp.int32)
  more = -time % block
  k, v = (
    jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, more), (0, 0)))
    for x in (k, v)
  )
  valid = jnp.arange(time + more) < length
  one = lambda k: summarize_blocks(k, projections, block, valid)
  summary: BlockSummary = jax.vmap(jax.vmap(one))(k)
  in_blocks = lambda x: x.reshape(*x.shape[:2], -1, block, x.shape[-1])
  return DecodeCache(
    k=_from_start(cache.k, in_blocks(k), 2),
    v=_from_start(cache.v, in_blocks(v), 2),
    total=_from_start(cache.total, jnp.moveaxis(summary.total, 2, 4), 4),
    count=_from_start(cache.count, jnp.moveaxis(summary.count, 2, 4), 4),
    length=length,
  )


def _from_start(old: Array, new: Array, axis: int) -> Array:
  """Returns the new blocks, then zeros in the shape and type of the old."""
  widths = [(0, 0)] * old.ndim
  widths[axis] = (0, old.shape[axis] - new.shape[axis])
  return jnp.pad(new.astype(old.dtype), widths)


def append_token(
  cache: DecodeCache,
  k: Float[Array, "B 1 K H"],
  v: Float[Array, "B 1 K H"],
  projections: Float[Array, "rounds H bits"],
) -> DecodeCache:
  """Returns the cache with one token more, changed in place under donation.

  The caller sees to it that there is room. Only slices of fixed size are read
  and written, so that the cost does not depend on how much fits.
  """
  block, row = jnp.divmod(cache.length, cache.block_size)
  token = k[:, 0].astype(jnp.float32)
  bucket = hash_buckets(k[:, 0], projections)
  member = jax.nn.one_hot(bucket, cache.count.shape[3], dtype=jnp.float32)
  member = member[..., None]  # [B, K, rounds, buckets, 1]
  place = lambda x: jnp.moveaxis(x, 1, 2)[:, :, None]  # [B, K, 1, 1, H]
  zero = jnp.zeros_like(block)
  put = lambda all_, x: jax.lax.dynamic_update_slice(
    all_, place(x).astype(all_.dtype), (zero, zero, block, row, zero)
  )
  return DecodeCache(
    k=put(cache.k, k),
    v=put(cache.v, v),
    total=_add_at(
      cache.total, member[..., None] * token[:, :, None, None, None], block
    ),
    count=_add_at(cache.count, member, block),
    length=cache.length + 1,
  )


def _add_at(all_: Array, part: Array, block: Array) -> Array:
  """Adds to the sums of one block; blocks are the fifth axis."""
  old = jax.lax.dynamic_slice_in_dim(all_, block, 1, axis=4)
  return jax.lax.dynamic_update_slice_in_dim(all_, old + part, block, axis=4)
