"""Averages in two shots of few bits each: scatter, sum, gather."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from deepseek_jax.comm.axes import Axes
from deepseek_jax.comm.codecs import Codec, Codes
from deepseek_jax.comm.layout import Layout


class Errors(NamedTuple):
  """What one device has not sent yet of a leaf; each with a leading axis of 1.

  None where there is no error feedback, or no second shot.
  """

  worker: Float32[Array, "1 chunks blocks block"] | None
  server: Float32[Array, "1 1 blocks block"] | None


class Averaged(NamedTuple):
  """What comes of a leaf."""

  mean: Array  # the parameter's part of the mean gradient
  errors: Errors
  lost: Float32[Array, ""]  # squares of what was not sent, of this device
  whole: Float32[Array, ""]  # squares of what was to be sent


@dataclasses.dataclass(frozen=True)
class TwoShot:
  """Averages leaves over devices.

  Every device encodes its gradient in chunks and sends chunk i to device i;
  that decodes what it gets, averages in float32, encodes the mean and sends it
  to all. With parameters in parts (fsdp) the second shot goes only to the other
  devices of the same part: none, if every device has a part of its own, and the
  mean arrives as it was summed.

  Attributes:
    axes: Over which devices.
    first: Codec of the gradients.
    second: Codec of the mean, of the same block.
    feedback: Whether what the codecs lose is sent the next time.
  """

  axes: Axes
  first: Codec
  second: Codec
  feedback: bool

  def layout(self, part_shape: tuple[int, ...], dim: int | None) -> Layout:
    """Returns how the gradient is cut of a parameter, cut along `dim`."""
    parts = 1 if dim is None else self.axes.parts
    copies = self.axes.devices // parts
    return Layout(part_shape, dim or 0, parts, copies, self.first.block)

  def init(self, layout: Layout) -> Errors:
    """Returns no errors."""
    if not self.feedback:
      return Errors(None, None)
    zeros = lambda *shape: jnp.zeros((1, *shape), jnp.float32)
    server = zeros(1, *layout.chunk) if layout.copies > 1 else None
    return Errors(zeros(*layout.chunks), server)

  def __call__(
    self,
    grad: Array,
    layout: Layout,
    errors: Errors,
    mask: Bool[Array, "chunks blocks block"] | None = None,
  ) -> Averaged:
    """Returns the mean of a leaf over all devices.

    Args:
      grad: This device's own, finite everywhere.
      layout: How it is cut.
      errors: What is left of the times before.
      mask: Where it is nowhere zero, the same on all devices; of codecs that
        ask for it.
    """
    wanted = layout.split(grad)
    if errors.worker is not None:
      wanted = wanted + errors.worker[0]
    codes = self.first.encode(wanted, mask)
    left = wanted - self.first.decode(codes, mask)
    received = _swap(codes, self.axes.names)
    mine = None if mask is None else mask[self.axes.index]
    spread = None if mine is None else jnp.broadcast_to(mine, wanted.shape)
    mean = jnp.mean(self.first.decode(received, spread), 0, keepdims=True)
    server = errors.server
    if layout.copies > 1:
      mean, server = self._gather(mean, layout, server, mask, mine)
    return Averaged(
      mean=layout.join(mean).astype(grad.dtype),
      errors=Errors(None if errors.worker is None else left[None], server),
      lost=jnp.sum(jnp.square(left)),
      whole=jnp.sum(jnp.square(wanted)),
    )

  def _gather(
    self,
    mean: Array,
    layout: Layout,
    error: Array | None,
    mask: Array | None,
    mine: Array | None,
  ) -> tuple[Array, Array | None]:
    """Sends a chunk of the mean to all that need it; returns theirs too."""
    if error is not None:
      mean = mean + error[0]
    own = None if mine is None else mine[None]
    codes = self.second.encode(mean, own)
    if error is not None:
      error = (mean - self.second.decode(codes, own))[None]
    names = self.axes.names if layout.parts == 1 else self.axes.others
    gathered = tuple(
      jax.lax.all_gather(x, names, axis=0, tiled=True) for x in codes
    )
    if mask is not None and layout.parts > 1:
      part = jax.lax.axis_index(self.axes.sharded)
      mask = mask.reshape(layout.parts, layout.copies, *layout.chunk)[part]
    return self.second.decode(gathered, mask), error

  def sent_bytes(self, layout: Layout) -> float:
    """Returns the bytes that a device sends for a leaf, in both shots."""
    count = layout.parts * layout.copies
    blocks = layout.chunk[0]
    scattered = (count - 1) * blocks * self.first.block_bytes()
    gathered = (layout.copies - 1) * blocks * self.second.block_bytes()
    return float(scattered + gathered)


def _swap(codes: Codes, names: tuple[str, ...]) -> Codes:
  """Sends chunk i to device i; returns what all devices sent to this one."""
  send: Any = lambda x: jax.lax.all_to_all(x, names, 0, 0, tiled=True)
  return tuple(map(send, codes))
