"""How a gradient is cut into chunks, one for every device that takes part."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float32


@dataclasses.dataclass(frozen=True)
class Layout:
  """Cuts an array into [parts · copies, blocks, block].

  Chunk i is summed by device i. Where parameters are cut over some of the
  devices (fsdp), `parts` of them, a device's chunk lies in its own part.

  Attributes:
    part_shape: Of the parameter, as a device holds it.
    dim: What it is cut along.
    parts: Into how many; 1 where it is whole.
    copies: Devices that hold the same part.
    block: Elements of a block.
  """

  part_shape: tuple[int, ...]
  dim: int
  parts: int
  copies: int
  block: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the gradient."""
    shape = list(self.part_shape)
    if self.parts > 1:
      shape[self.dim] *= self.parts
    return tuple(shape)

  @property
  def chunk(self) -> tuple[int, int]:
    """Shape of a chunk: blocks, and elements of a block."""
    size = math.prod(self.part_shape)
    return -(-size // (self.copies * self.block)), self.block

  @property
  def chunks(self) -> tuple[int, int, int]:
    """Shape of all chunks."""
    return self.parts * self.copies, *self.chunk

  def split(self, x: Array) -> Float32[Array, "chunks blocks block"]:
    """Returns the chunks of a gradient, filled up with zeros."""
    x = x.astype(jnp.float32)
    if self.parts > 1:
      cut = (self.parts, self.part_shape[self.dim])
      shape = (*self.shape[: self.dim], *cut, *self.shape[self.dim + 1 :])
      x = jnp.moveaxis(x.reshape(shape), self.dim, 0)
    x = x.reshape(self.parts, -1)
    room = math.prod(self.chunks) // self.parts - x.shape[1]
    if room:
      x = jnp.pad(x, ((0, 0), (0, room)))
    return x.reshape(self.chunks)

  def join(self, chunks: Float32[Array, "copies blocks block"]) -> Array:
    """Returns a parameter's part of the gradient from its chunks."""
    size = math.prod(self.part_shape)
    return chunks.reshape(-1)[:size].reshape(self.part_shape)
