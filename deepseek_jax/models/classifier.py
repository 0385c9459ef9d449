"""Images to classes: convolution, LSTM and attention in exchangeable parts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from deepseek_jax import nn
from deepseek_jax.models import parts

# Two examples, so that no part can mistake the batch for a size of 1.
_BATCH = 2


class Classifier(nnx.Module):
  """Classifies images by convolution, LSTM and multi-head attention.

  Three parts follow one another, and each can be exchanged alone by any module
  with its signature (B examples, T steps, mask False at padded steps):

    inputs(images [B, H, W, C]) -> tokens [B, T, D], mask [B, T] or None
    features(tokens, mask) -> tokens [B, T, F]
    decision(tokens, mask) -> logits [B, num_classes]

  Sizes between the parts are found by tracing the parts given, so a new part
  needs to announce nothing. A part given makes the arguments of the part it
  replaces unused. Dropout is active after `model.train()` and not after
  `model.eval()`; a new model is in training mode.

  For regression, `num_classes` is the number of outputs and the logits are the
  predictions.

  >>> model = Classifier((8, 8, 1), num_classes=10, rngs=nnx.Rngs(0))
  >>> model.eval()
  >>> model(jnp.zeros((2, 8, 8, 1))).shape
  (2, 10)

  Args:
    image_shape: height, width and channels of an image, each at least 1.
    num_classes: number of logits, at least 1.
    channels: output channels of each convolution stage; their number is the
      depth, and every stage halves the image (see `pool`).
    kernel_size: side of the convolution kernels, in pixels.
    norm: "layer" or "batch" norm after every convolution, or None.
    pool: side of the pooling windows, in pixels; 1 for no pooling.
    sequence: "rows" (every row of the pooled image is a token) or "positions"
      (every pixel is one).
    lstm_features: state size of the LSTM, in each direction.
    lstm_layers: number of LSTM layers.
    bidirectional: read the sequence in both directions.
    num_heads: attention heads.
    head_dim: size of a head; None for the LSTM's output size // `num_heads`.
    attention: "full", or "dynamic" for long sequences, whose tokens read what
      is near and what hashing finds; see `nn.DynamicAttention`.
    attention_options: arguments of `nn.DynamicAttention`, in JSON's types, such
      as {"block_size": 16, "window": 64}; for "dynamic" only.
    pooling: "last", "mean", "max" or "attention" over the steps.
    dropout: fraction of every layer's outputs set to zero in training, [0, 1).
    activation: of the convolutions: a name in `nn.ACTIVATIONS` or a function.
    dtype: of the computation, float32 or bfloat16. Parameters, cell states,
      the softmax and the logits are float32 in either.
    inputs: replaces the convolutional input part.
    features: replaces the recurrent and attention part.
    decision: replaces the pooling and the linear layer.
    rngs: streams "params" and "dropout".

  Raises:
    ValueError: a size is out of its range, the image is too small for the
      pooling, the heads do not divide the features, or a part given does not
      return what its signature says.
  """

  def __init__(
    self,
    image_shape: Sequence[int],
    num_classes: int,
    *,
    channels: Sequence[int] = (32, 64),
    kernel_size: int = 3,
    norm: Literal["layer", "batch"] | None = None,
    pool: int = 2,
    sequence: Literal["rows", "positions"] = "rows",
    lstm_features: int = 64,
    lstm_layers: int = 1,
    bidirectional: bool = False,
    num_heads: int = 4,
    head_dim: int | None = None,
    attention: nn.Attention = "full",
    attention_options: Mapping[str, Any] | None = None,
    pooling: nn.Pooling = "last",
    dropout: float = 0.1,
    activation: str | nn.Activation = "relu",
    dtype: DTypeLike = jnp.float32,
    inputs: Callable[..., Any] | None = None,
    features: Callable[..., Any] | None = None,
    decision: Callable[..., Any] | None = None,
    rngs: nnx.Rngs,
  ):
    self.image_shape = _checked_image_shape(image_shape)
    if inputs is None:
      inputs = parts.ConvolutionalInput(
        self.image_shape,
        channels=channels,
        kernel_size=kernel_size,
        norm=norm,
        pool=pool,
        sequence=sequence,
        activation=activation,
        dropout=dropout,
        dtype=dtype,
        rngs=rngs,
      )
    images = jax.ShapeDtypeStruct((_BATCH, *self.image_shape), jnp.float32)
    tokens, mask = _checked_tokens(_shape_of(inputs, images))
    if features is None:
      features = parts.RecurrentAttention(
        tokens.shape[-1],
        features=lstm_features,
        num_layers=lstm_layers,
        bidirectional=bidirectional,
        num_heads=num_heads,
        head_dim=head_dim,
        attention=attention,
        attention_options=attention_options,
        dropout=dropout,
        dtype=dtype,
        rngs=rngs,
      )
    tokens = _checked_features(_shape_of(features, tokens, mask), tokens)
    if decision is None:
      decision = nn.ClassificationHead(
        tokens.shape[-1],
        num_classes,
        pooling=pooling,
        dropout=dropout,
        rngs=rngs,
      )
    _check_logits(_shape_of(decision, tokens, mask), num_classes)
    self.inputs = inputs
    self.features = features
    self.decision = decision

  def __call__(
    self, images: Float[Array, "B H W C"]
  ) -> Float32[Array, "B classes"]:
    """Returns one row of logits for each image, float32 in every `dtype`.

    Args:
      images: pixels as floats, scaled to about [0, 1] or to unit variance.

    Returns:
      Unnormalized log probabilities, or the predictions of a regression.

    Raises:
      ValueError: the images are not a batch of `image_shape`, or not floats.
    """
    if images.shape[1:] != self.image_shape:
      sizes = ", ".join(map(str, self.image_shape))
      raise ValueError(
        f"images must be a batch of shape (B, {sizes}), got {images.shape=}."
      )
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise ValueError(
        f"images must be floats, scaled to about [0, 1], got {images.dtype=}."
      )
    tokens, mask = self.inputs(images)
    logits = self.decision(self.features(tokens, mask), mask)
    return logits.astype(jnp.float32)


def _shape_of(part: Callable[..., Any], *arguments: Any) -> Any:
  """Returns the shapes of what a part returns, computing nothing."""
  if not isinstance(part, nnx.Module):
    return jax.eval_shape(part, *arguments)
  # A merged copy: tracing must not touch the random state of the part itself.
  graphdef, state = nnx.split(part)
  return jax.eval_shape(
    lambda state, *arguments: nnx.merge(graphdef, state)(*arguments),
    state,
    *arguments,
  )


def _checked_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
  """Returns the image shape as a tuple."""
  shape = tuple(image_shape)
  if len(shape) != 3 or min(shape) < 1:
    raise ValueError(
      "image_shape must be (height, width, channels), each at least 1, got "
      f"{image_shape=}."
    )
  return shape


def _checked_tokens(result: Any) -> tuple[Any, Any]:
  """Returns what an input part returned: tokens and their mask."""
  match result:
    case (jax.ShapeDtypeStruct() as tokens, mask) if tokens.ndim == 3:
      if mask is None or (mask.dtype, mask.shape) == (bool, tokens.shape[:2]):
        return tokens, mask
  raise ValueError(
    "inputs must return (tokens [B, T, D], mask [B, T] of booleans or None), "
    f"got {result}."
  )


def _checked_features(result: Any, tokens: Any) -> Any:
  """Returns what a feature part returned: tokens at the same steps."""
  shape = getattr(result, "shape", ())
  if len(shape) != 3 or shape[:2] != tokens.shape[:2]:
    raise ValueError(
      f"features must return tokens [B, T, F] for tokens of shape "
      f"{tokens.shape}, got {result}."
    )
  return result


def _check_logits(result: Any, num_classes: int) -> None:
  """Raises unless a decision part returned logits."""
  if getattr(result, "shape", None) != (_BATCH, num_classes):
    raise ValueError(
      f"decision must return logits [B, {num_classes}], got {result} for "
      f"{_BATCH} examples."
    )
