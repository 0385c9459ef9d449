"""Few bits for a block of numbers: what goes over the wire.

A codec turns float32 blocks [..., block] into a tuple of arrays of the same
leading dimensions, and back. What it loses is up to it; who calls it keeps the
difference and adds it next time (error feedback), for which the loss must be a
contraction: |x - decode(encode(x))| < |x|.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, UInt8

from deepseek_jax.core.arguments import require_in, require_static

Codes = tuple[Array, ...]

# A block whose largest element is below this counts as zero: dividing by less
# would leave float32.
_TINY = 1e-30


@runtime_checkable
class Codec(Protocol):
  """Encodes blocks of one size.

  Attributes:
    block: Elements that are encoded together.
    masked: Whether it cannot say zero, and needs to be told where zeros are.
  """

  @property
  def block(self) -> int:
    """Elements that are encoded together."""
    ...

  @property
  def masked(self) -> bool:
    """Whether `mask` is used."""
    ...

  def encode(
    self, x: Float32[Array, "*n b"], mask: Bool[Array, "*n b"] | None
  ) -> Codes:
    """Returns the codes of blocks; elements outside the mask are 0."""
    ...

  def decode(
    self, codes: Codes, mask: Bool[Array, "*n b"] | None
  ) -> Float32[Array, "*n b"]:
    """Returns blocks for codes."""
    ...

  def block_bytes(self) -> int:
    """Returns the bytes of an encoded block."""
    ...


@dataclasses.dataclass(frozen=True)
class Rounded:
  """Whole numbers of 8 or 4 bits, in units of the block's largest / 127 or 7.

  Args:
    bits: 8 or 4.
    block: Even, at least 2.
  """

  bits: int
  block: int
  masked = False

  def __post_init__(self):
    """Checks the block."""
    _require_multiple(2, self.block)

  def encode(
    self, x: Float32[Array, "*n b"], mask: Bool[Array, "*n b"] | None = None
  ) -> Codes:
    """Returns (codes, scales): int8, or two to a byte, and float32."""
    del mask
    levels = 2 ** (self.bits - 1) - 1
    largest = jnp.max(jnp.abs(x), -1, keepdims=True)
    inverse = jnp.where(largest > _TINY, levels / largest, 0)
    codes = jnp.round(x * inverse).astype(jnp.int8)
    if self.bits == 4:
      half = self.block // 2  # Halves, not neighbours: no strided access.
      codes = (codes[..., :half] & 15) | (codes[..., half:] << 4)
    return codes, jnp.where(largest > _TINY, largest / levels, 0)

  def decode(
    self, codes: Codes, mask: Bool[Array, "*n b"] | None = None
  ) -> Float32[Array, "*n b"]:
    """Returns codes times scales."""
    del mask
    levels, scales = codes
    if self.bits == 4:
      low, high = (levels << 4) >> 4, levels >> 4  # With their signs.
      levels = jnp.concatenate([low, high], -1)
    return levels.astype(jnp.float32) * scales

  def block_bytes(self) -> int:
    """Returns the bytes of an encoded block."""
    return self.block * self.bits // 8 + 4


@dataclasses.dataclass(frozen=True)
class Halved:
  """The nearest bfloat16."""

  block: int = 128
  masked = False

  def encode(
    self, x: Float32[Array, "*n b"], mask: Bool[Array, "*n b"] | None = None
  ) -> Codes:
    """Returns their bits: as numbers, CPUs would send them as float32."""
    del mask
    rounded = x.astype(jnp.bfloat16)
    return (jax.lax.bitcast_convert_type(rounded, jnp.uint16),)

  def decode(
    self, codes: Codes, mask: Bool[Array, "*n b"] | None = None
  ) -> Float32[Array, "*n b"]:
    """Returns the numbers."""
    del mask
    bits = codes[0].astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  def block_bytes(self) -> int:
    """Returns the bytes of an encoded block."""
    return 2 * self.block


@dataclasses.dataclass(frozen=True)
class Signs:
  """The sign of every element, and the mean magnitude of the block.

  It cannot say zero: elements outside the mask are, and count nowhere.

  Args:
    block: A multiple of 8.
  """

  block: int
  masked = True

  def __post_init__(self):
    """Checks the block."""
    _require_multiple(8, self.block)

  def encode(
    self, x: Float32[Array, "*n b"], mask: Bool[Array, "*n b"] | None
  ) -> Codes:
    """Returns (bits, scales): uint8 of 8 signs, and float32."""
    x = x if mask is None else jnp.where(mask, x, 0)
    count = self.block if mask is None else jnp.sum(mask, -1, keepdims=True)
    scale = jnp.sum(jnp.abs(x), -1, keepdims=True) / jnp.maximum(count, 1)
    return pack(x < 0), scale

  def decode(
    self, codes: Codes, mask: Bool[Array, "*n b"] | None
  ) -> Float32[Array, "*n b"]:
    """Returns plus or minus the scale inside the mask."""
    bits, scale = codes
    x = jnp.where(unpack(bits), -scale, scale)
    return x if mask is None else jnp.where(mask, x, 0)

  def block_bytes(self) -> int:
    """Returns the bytes of an encoded block."""
    return self.block // 8 + 4


@dataclasses.dataclass(frozen=True)
class Largest:
  """The elements of a block that are largest in magnitude, and their places.

  Args:
    kept: Elements of a block, from 1 to `block`.
    block: At most 65,536.
  """

  kept: int
  block: int
  masked = False

  def __post_init__(self):
    """Checks the numbers."""
    require_static(1, block=self.block)
    require_in("[1, 65536]", block=self.block)
    if not 1 <= self.kept <= self.block:
      raise ValueError(
        f"kept must be from 1 to block, got kept={self.kept} for "
        f"block={self.block}."
      )

  def encode(
    self, x: Float32[Array, "*n b"], mask: Bool[Array, "*n b"] | None = None
  ) -> Codes:
    """Returns (values, places): float32 and uint16."""
    del mask
    places = jax.lax.top_k(jnp.abs(x), self.kept)[1]
    values = jnp.take_along_axis(x, places, -1)
    return values, places.astype(jnp.uint16)

  def decode(
    self, codes: Codes, mask: Bool[Array, "*n b"] | None = None
  ) -> Float32[Array, "*n b"]:
    """Returns the values in their places, and zeros."""
    del mask
    values, places = codes
    flat = values.reshape(-1, self.kept)
    rows = jnp.arange(len(flat))[:, None]
    x = jnp.zeros((len(flat), self.block), values.dtype)
    x = x.at[rows, places.reshape(flat.shape).astype(jnp.int32)].set(
      flat, unique_indices=True, mode="promise_in_bounds"
    )
    return x.reshape(*values.shape[:-1], self.block)

  def block_bytes(self) -> int:
    """Returns the bytes of an encoded block."""
    return 6 * self.kept


def pack(x: Bool[Array, "*n b"]) -> UInt8[Array, "*n b/8"]:
  """Returns eight truths in a byte: those an eighth of the block apart."""
  bits = x.reshape(*x.shape[:-1], 8, -1).astype(jnp.uint8)
  places = jax.lax.broadcasted_iota(jnp.uint8, bits.shape, bits.ndim - 2)
  return jnp.sum(bits << places, -2, dtype=jnp.uint8)


def unpack(x: UInt8[Array, "*n c"]) -> Bool[Array, "*n 8*c"]:
  """Returns what was packed."""
  shape = (*x.shape[:-1], 8, x.shape[-1])
  places = jax.lax.broadcasted_iota(jnp.uint8, shape, x.ndim - 1)
  bits = (jnp.broadcast_to(x[..., None, :], shape) >> places) & 1
  return (bits == 1).reshape(*x.shape[:-1], -1)


def _require_multiple(of: int, block: int) -> None:
  require_static(1, block=block)
  if block % of:
    raise ValueError(f"block must be a multiple of {of}, got {block=}.")
