"""A convolution stage: convolution, norm, activation, pooling, dropout."""

import functools
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deepseek_jax.nn import activations, checks


def max_pool(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w C"]:
  """Returns the maximum of every `size` by `size` window; windows do not touch.

  Equal to `nnx.max_pool(x, (size, size), (size, size), "VALID")`: rows and
  columns that do not fill a window are dropped. The maximum is taken between
  strided slices, because the gradient of `lax.reduce_window` (select-and-
  scatter) is 6 to 20 times slower on CPUs. Where several elements of a window
  tie, they share the gradient; `nnx.max_pool` gives it all to the first.

  >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), 2).ravel().tolist()
  [5.0, 7.0, 13.0, 15.0]

  Args:
    x: images.
    size: side of a window, in pixels; 1 changes nothing.

  Returns:
    Images of `H // size` by `W // size` pixels.

  Raises:
    ValueError: size is below 1, or a window is larger than the images.
  """
  _, height, width, _ = x.shape
  if not 1 <= size <= min(height, width):
    raise ValueError(
      f"size must be in [1, {min(height, width)}] for images of "
      f"{height}x{width} pixels, got {size=}."
    )
  rows, columns = height - height % size, width - width % size
  x = functools.reduce(jnp.maximum, (x[:, i:rows:size] for i in range(size)))
  return functools.reduce(
    jnp.maximum, (x[:, :, i:columns:size] for i in range(size))
  )


class ConvolutionStage(nnx.Module):
  """Convolution, optional norm, activation, max pooling and dropout.

  y = dropout(max_pool(activation(norm(convolve(x)))))

  The convolution pads with zeros, so only the pooling changes the image size.

  >>> stage = ConvolutionStage(1, 8, rngs=nnx.Rngs(0))
  >>> stage(jnp.zeros((2, 8, 8, 1))).shape
  (2, 4, 4, 8)

  Args:
    in_channels: channels of the images, at least 1.
    out_channels: channels of the result, at least 1.
    kernel_size: side of the kernel, in pixels, at least 1.
    activation: a name in `ACTIVATIONS`, or a function.
    norm: "layer" (over the channels of a pixel), "batch" (over batch and
      pixels; its running statistics are `nnx.BatchStat`), or None.
    pool: side of the pooling window, in pixels; 1 for no pooling.
    dropout: fraction of the outputs set to zero in training, in [0, 1).
    dtype: of the computation and the result; parameters are float32.
    rngs: streams "params" and "dropout".

  Raises:
    ValueError: a size is below 1, dropout is outside [0, 1), or norm or
      activation is unknown.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    activation: str | activations.Activation = "relu",
    norm: Literal["layer", "batch"] | None = None,
    pool: int = 2,
    dropout: float = 0.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    checks.require_positive(
      in_channels=in_channels,
      out_channels=out_channels,
      kernel_size=kernel_size,
      pool=pool,
    )
    checks.require_fraction(dropout=dropout)
    checks.require_choice(("layer", "batch", None), norm=norm)
    self.convolution = nnx.Conv(
      in_channels,
      out_channels,
      (kernel_size, kernel_size),
      dtype=dtype,
      rngs=rngs,
    )
    norms = {"layer": nnx.LayerNorm, "batch": nnx.BatchNorm}
    self.norm = (
      norms[norm](out_channels, dtype=dtype, rngs=rngs) if norm else None
    )
    self.activation = activations.activation(activation)
    self.pool = pool
    self.dropout = nnx.Dropout(dropout, rngs=rngs)

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    """Returns the images after one stage."""
    x = self.convolution(x)
    if self.norm is not None:
      x = self.norm(x)
    return self.dropout(max_pool(self.activation(x), self.pool))
