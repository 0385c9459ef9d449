"""Arrays in one or two bytes an element, rounded without bias."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, BFloat16, Float, Float32, Int8, UInt32

_HALF, _FULL = 127.0, 254.0  # Levels of a block with two signs, and with one.


class BlockInt8(NamedTuple):
  """An array in int8 whose blocks of the last axis have a scale each.

  scale ≥ 0: the block has two signs; x = sign(code)·scale·(|code| / 127)⁴.
  scale < 0: it is nowhere negative; x = -scale·((code + 127) / 254)⁴.
  """

  codes: Int8[Array, "*shape"]  # shape of the array, dtype=int8
  scales: Float32[Array, "*blocks"]  # shape=(..., blocks), dtype=float32


@functools.partial(jax.jit, static_argnames="block")
def to_int8(
  values: Float[Array, "*shape"],
  count: ArrayLike,
  number: ArrayLike,
  block: int,
) -> BlockInt8:
  """Encodes an array on a grid of fourth powers.

  The grid is fine everywhere: neighbours lie 3 % apart at the largest value of
  a block and 60 % at 2e-5 of it (half of that in blocks of one sign, such as
  second moments), and the least is 4e-9. Zero stays zero, and nothing else
  becomes zero.

  Args:
    values: One dimension at least; NaN and infinities count as 0.
    count: The step, and
    number: which of the arrays of that step: other noise for each.
    block: Elements that share a scale; see `block_size`.

  Returns:
    The codes. Over the noise, the mean of what they decode to is the value,
    unless that is below the least number of the grid, to which it is raised.

  >>> packed = to_int8(jnp.array([1.0, -1e-4, 0.0, 0.0]), 0, 0, block=2)
  >>> print(packed.scales, from_int8(packed)[0])
  [1. 0.] 1.0
  """
  blocks = _in_blocks(_finite(values), block_size(values.shape[-1], block))
  # Two plain reductions: XLA's CPU code for that of a magnitude is slow.
  most, least = jnp.max(blocks, axis=-1), jnp.min(blocks, axis=-1)
  largest = jnp.maximum(most, -least)
  scales = jnp.where((least >= 0) & (most > 0), -largest, largest)
  bits = _noise(values.shape, count, number)
  draws = (_in_blocks(bits, blocks.shape[-1]) >> 8).astype(jnp.int32) * 2.0**-24
  codes = _round(blocks, scales[..., None], draws)
  return BlockInt8(_merge_blocks(codes, values), scales)


def _round(blocks: Array, scales: Array, draws: Array) -> Array:
  """Rounds to one of the two codes around each value."""
  one_sign = scales < 0
  levels = jnp.where(one_sign, _FULL, _HALF)
  ratio = jnp.abs(blocks) / jnp.where(scales == 0, 1.0, jnp.abs(scales))
  below = jnp.floor(levels * jnp.sqrt(jnp.sqrt(ratio)))
  below = jnp.minimum(below, levels - 1)
  low, high = _fourth_power(below / levels), _fourth_power((below + 1) / levels)
  # Odds from the values, not from the levels, so that values keep their mean.
  level = below + (draws < (ratio - low) / (high - low))
  level = jnp.where(ratio > 0, jnp.maximum(level, 1.0), 0.0)
  code = jnp.where(one_sign, level - _HALF, level * jnp.sign(blocks))
  return code.astype(jnp.int8)


@jax.jit
def from_int8(packed: BlockInt8) -> Float32[Array, "*shape"]:
  """Decodes what `to_int8` encoded."""
  codes, scales = packed
  code = _in_blocks(codes, codes.shape[-1] // scales.shape[-1])
  code, scale = code.astype(jnp.float32), scales[..., None]
  one_sign = scale < 0
  share = jnp.where(one_sign, (code + _HALF) / _FULL, jnp.abs(code) / _HALF)
  sign = jnp.where(one_sign, 1.0, jnp.sign(code))
  return _merge_blocks(sign * _fourth_power(share) * jnp.abs(scale), codes)


@jax.jit
def to_bfloat16(
  values: Float[Array, "*shape"], count: ArrayLike, number: ArrayLike
) -> BFloat16[Array, "*shape"]:
  """Rounds to bfloat16, up or down, with the odds that keep the mean.

  Args:
    values: NaN and infinities count as 0.
    count: The step, and
    number: which of the arrays of that step: other noise for each.

  Returns:
    One of the two neighbours of each value.

  >>> values = jnp.full(1000, 1 + 2**-10)
  >>> rounded = to_bfloat16(values, 0, 0).astype(jnp.float32)
  >>> print(rounded.max(), abs(rounded.mean() - values[0]) < 2e-4)
  1.0078125 True
  """
  largest = float(jnp.finfo(jnp.bfloat16).max)
  values = jnp.clip(_finite(values), -largest, largest)
  bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
  # A carry out of the 16 bits that are cut off leads to the next number.
  bits = bits + (_noise(values.shape, count, number) >> 16)
  kept = (bits >> 16).astype(jnp.uint16)
  return jax.lax.bitcast_convert_type(kept, jnp.bfloat16)


def block_size(length: int, block: int) -> int:
  """Returns the largest divisor of an axis up to `block`: nothing is padded.

  Where that is less than an eighth of `block`, the whole axis is one block.

  >>> block_size(768, 256), block_size(100, 256), block_size(50257, 256)
  (256, 100, 50257)
  """
  most = min(length, block)
  divisor = next(size for size in range(most, 0, -1) if length % size == 0)
  return divisor if 8 * divisor >= most else length


def _finite(values: Array) -> Float32[Array, "*shape"]:
  values = values.astype(jnp.float32)
  return jnp.where(jnp.isfinite(values), values, 0.0)


def _fourth_power(share: Array) -> Array:
  square = share * share
  return square * square


def _noise(
  shape: tuple[int, ...], count: ArrayLike, number: ArrayLike
) -> UInt32[Array, "*shape"]:
  """Hashes place, step and number of the array to 32 even bits.

  A few integer operations an element, where `jax.random` would cost more than
  the optimizer. A place counts from the start of the whole array, so that no
  sharding changes the noise.
  """
  place, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    place = place + along * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  count, number = (
    jnp.asarray(count, jnp.uint32),
    jnp.asarray(number, jnp.uint32),
  )
  return _mix(place ^ _mix(count + number * jnp.uint32(0x9E3779B9)))


def _mix(bits: Array) -> Array:
  """Spreads every bit over all the others (C. Wellons, lowbias32)."""
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
  return bits ^ (bits >> 16)


def _in_blocks(array: Array, size: int) -> Array:
  """Splits the last axis."""
  blocks = array.shape[-1] // size
  sharding = jax.typeof(array).sharding
  names = sharding.spec[-1]
  # Under explicit axis types, shards that cut through blocks are an error.
  if names is not None and blocks % _shards(sharding.mesh, names):
    array = jax.sharding.reshard(array, jax.P(*sharding.spec[:-1], None))
  return array.reshape(*array.shape[:-1], blocks, size)


def _merge_blocks(blocks: Array, like: Array) -> Array:
  """Undoes `_in_blocks`, with the shape and the sharding of an array."""
  merged, sharding = blocks.reshape(like.shape), jax.typeof(like).sharding
  if jax.typeof(merged).sharding == sharding:
    return merged
  return jax.sharding.reshard(merged, sharding)


def _shards(mesh: Any, names: str | tuple[str, ...]) -> int:
  names = (names,) if isinstance(names, str) else names
  return math.prod(mesh.shape[name] for name in names)
