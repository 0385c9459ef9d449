"""The default input and feature parts of `Classifier`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from deepseek_jax import nn
from deepseek_jax.nn import checks
from deepseek_jax.parallel import BATCH_AXES, constrain


class ConvolutionalInput(nnx.Module):
  """Images to a sequence of tokens: convolution stages, then one cut.

  "rows" makes every row of the pooled image one token (few long tokens: a
  short scan, the faster choice); "positions" makes every pixel one (many short
  tokens: attention can look at single regions). With no stages the rows or
  pixels of the image itself are the tokens.

  >>> tokens = ConvolutionalInput((8, 8, 1), channels=(32,), rngs=nnx.Rngs(0))
  >>> tokens(jnp.zeros((2, 8, 8, 1)))[0].shape
  (2, 4, 128)

  Args:
    image_shape: height, width and channels of an image.
    channels: output channels of each stage.
    kernel_size: side of the kernels, in pixels, at least 1.
    norm: as in `nn.ConvolutionStage`.
    pool: side of the pooling windows, in pixels; 1 for no pooling.
    sequence: "rows" or "positions".
    activation: a name in `nn.ACTIVATIONS`, or a function.
    dropout: fraction of each stage's outputs set to zero in training.
    dtype: of the computation and the tokens; parameters are float32.
    rngs: streams "params" and "dropout".

  Raises:
    ValueError: the image is too small for the pooling, or a value is out of
      its range.
  """

  def __init__(
    self,
    image_shape: tuple[int, int, int],
    *,
    channels: Sequence[int],
    kernel_size: int = 3,
    norm: Literal["layer", "batch"] | None = None,
    pool: int = 2,
    sequence: Literal["rows", "positions"] = "rows",
    activation: str | nn.Activation = "relu",
    dropout: float = 0.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    checks.require_choice(("rows", "positions"), sequence=sequence)
    checks.require_positive(pool=pool)
    height, width, in_channels = image_shape
    smallest = pool ** len(channels)
    if min(height, width) < smallest:
      raise ValueError(
        f"image_shape must be at least {smallest}x{smallest} pixels for "
        f"{len(channels)} stages with {pool=}, got {image_shape=}; use fewer "
        "channels or a smaller pool."
      )
    self.stages = nnx.List([])
    for out_channels in channels:
      stage = nn.ConvolutionStage(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        activation=activation,
        norm=norm,
        pool=pool,
        dropout=dropout,
        dtype=dtype,
        rngs=rngs,
      )
      self.stages.append(stage)
      in_channels = out_channels
    self.sequence = sequence
    self.dtype = dtype

  def __call__(
    self, images: Float[Array, "B H W C"]
  ) -> tuple[Float[Array, "B T D"], None]:
    """Returns the tokens, and None for a mask: no step is padding."""
    x = constrain(images.astype(self.dtype), BATCH_AXES)
    for stage in self.stages:
      x = constrain(stage(x), BATCH_AXES)
    batch, rows, columns, channels = x.shape
    if self.sequence == "rows":
      return x.reshape(batch, rows, columns * channels), None
    return x.reshape(batch, rows * columns, channels), None


class RecurrentAttention(nnx.Module):
  """LSTM layers, then a residual block of multi-head attention.

  >>> features = RecurrentAttention(128, features=64, rngs=nnx.Rngs(0))
  >>> features(jnp.zeros((2, 4, 128))).shape
  (2, 4, 64)

  Args:
    in_features: size of a token.
    features: state size of each LSTM (in each direction), at least 1.
    num_layers: number of LSTM layers, at least 1.
    bidirectional: read in both directions; outputs have `2 * features`.
    num_heads: attention heads, at least 1.
    head_dim: size of a head; None for output size // `num_heads`.
    attention: "full" or "dynamic", see `nn.AttentionBlock`.
    attention_options: the options of "dynamic", see there.
    dropout: fraction of every layer's outputs set to zero in training.
    dtype: of the computation and the result; parameters are float32.
    rngs: streams "params" and "dropout".

  Raises:
    ValueError: a value is out of its range, or `num_heads` does not divide the
      output size and no `head_dim` is given.
  """

  def __init__(
    self,
    in_features: int,
    *,
    features: int,
    num_layers: int = 1,
    bidirectional: bool = False,
    num_heads: int = 4,
    head_dim: int | None = None,
    attention: nn.Attention = "full",
    attention_options: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    checks.require_positive(num_layers=num_layers)
    checks.require_fraction(dropout=dropout)
    recurrent = nn.BidirectionalLSTM if bidirectional else nn.LSTM
    width = features * (2 if bidirectional else 1)
    self.recurrent = nnx.List(
      [
        recurrent(size, features, dtype=dtype, rngs=rngs)
        for size in (in_features, *[width] * (num_layers - 1))
      ]
    )
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.attention = nn.AttentionBlock(
      width,
      num_heads=num_heads,
      head_dim=head_dim,
      attention=attention,
      attention_options=attention_options,
      dropout=dropout,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(
    self, tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
  ) -> Float[Array, "B T F"]:
    """Returns tokens that know their past and what attention found."""
    for layer in self.recurrent:
      tokens = self.dropout(layer(tokens, mask))
    return self.attention(tokens, mask)
