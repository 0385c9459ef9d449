"""From a sequence of tokens to one vector, and on to logits."""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32

from deepseek_jax.nn import checks
from deepseek_jax.parallel import BATCH_AXES, constrain

Pooling: TypeAlias = Literal["last", "mean", "max", "attention"]


def pool_last(
  tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "B D"]:
  """Returns the last token that is not padding; 0 where all are."""
  if mask is None:
    return tokens[:, -1]
  # `argmax` finds the first maximum: the last True of the mask read backwards.
  last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
  token = jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]
  return jnp.where(mask.any(axis=1)[:, None], token, 0)


def pool_mean(
  tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "B D"]:
  """Returns the mean of the tokens that are not padding; 0 where all are."""
  if mask is None:
    return tokens.mean(axis=1)
  total = jnp.sum(tokens, axis=1, where=mask[..., None], dtype=jnp.float32)
  count = jnp.maximum(mask.sum(axis=1), 1)[:, None]
  return (total / count).astype(tokens.dtype)


def pool_max(
  tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
) -> Float[Array, "B D"]:
  """Returns the maximum of the tokens that are not padding; 0 where all are."""
  if mask is None:
    return tokens.max(axis=1)
  largest = jnp.where(mask[..., None], tokens, -jnp.inf).max(axis=1)
  return jnp.where(mask.any(axis=1)[:, None], largest, 0)


class AttentionPooling(nnx.Module):
  """A mean of the tokens that are not padding, with learned weights.

  y = Σ_t softmax(x w)_t x_t, and 0 where all steps are padding.

  It starts as the plain mean: w is 0 at first.

  >>> pool = AttentionPooling(16, rngs=nnx.Rngs(0))
  >>> pool(jnp.ones((2, 5, 16))).shape
  (2, 16)

  Args:
    features: size of a token, at least 1.
    rngs: stream "params".

  Raises:
    ValueError: features is below 1.
  """

  def __init__(self, features: int, *, rngs: nnx.Rngs):
    checks.require_positive(features=features)
    self.score = nnx.Linear(
      features,
      1,
      use_bias=False,  # Softmax would not see it.
      kernel_init=nnx.initializers.zeros_init(),
      rngs=rngs,
    )

  def __call__(
    self, tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
  ) -> Float[Array, "B D"]:
    """Returns the weighted mean."""
    scores = self.score(tokens.astype(jnp.float32))
    if mask is None:
      weights = jax.nn.softmax(scores, axis=1)
    else:
      valid = mask[..., None]
      lowest = jnp.finfo(scores.dtype).min
      weights = jax.nn.softmax(jnp.where(valid, scores, lowest), axis=1)
      weights = jnp.where(valid, weights, 0)
      tokens = jnp.where(valid, tokens, 0)
    return (weights * tokens).sum(axis=1).astype(tokens.dtype)


class ClassificationHead(nnx.Module):
  """Pooling over the steps, dropout, and one linear layer to float32 logits.

  The last layer computes in float32 whatever the tokens are, because softmax
  and cross entropy amplify rounding. For regression, the logits are the
  predictions.

  >>> head = ClassificationHead(16, 10, pooling="mean", rngs=nnx.Rngs(0))
  >>> head(jnp.ones((2, 5, 16))).shape
  (2, 10)

  Args:
    features: size of a token, at least 1.
    num_classes: number of logits, at least 1.
    pooling: "last" token that is not padding, "mean", "max", or "attention"
      (a mean with learned weights).
    dropout: fraction of the pooled features set to zero in training, in [0, 1).
    rngs: streams "params" and "dropout".

  Raises:
    ValueError: a size is below 1, dropout is outside [0, 1), or pooling is
      unknown.
  """

  def __init__(
    self,
    features: int,
    num_classes: int,
    *,
    pooling: Pooling = "last",
    dropout: float = 0.0,
    rngs: nnx.Rngs,
  ):
    checks.require_positive(features=features, num_classes=num_classes)
    checks.require_fraction(dropout=dropout)
    functions = {"last": pool_last, "mean": pool_mean, "max": pool_max}
    checks.require_choice((*functions, "attention"), pooling=pooling)
    self.pool = functions.get(pooling) or AttentionPooling(features, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.linear = nnx.Linear(features, num_classes, rngs=rngs)

  def __call__(
    self, tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
  ) -> Float32[Array, "B classes"]:
    """Returns one row of logits for each sequence."""
    pooled = self.pool(tokens, mask).astype(jnp.float32)
    return self.linear(self.dropout(constrain(pooled, BATCH_AXES)))
