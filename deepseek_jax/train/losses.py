"""What a step minimises: a loss per example, its weights, and penalties."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PyTree


@runtime_checkable
class Loss(Protocol):
  """A loss per example, and how much each example counts.

  The step minimises `sum(weights * mask * losses) / sum(weights * mask)`, so an
  implementation never averages over the batch itself. That is what lets a
  padded last batch and accumulated micro-batches give the exact mean.
  """

  def __call__(
    self, outputs: Float[Array, "B *K"], targets: Num[Array, "B *_"]
  ) -> Float[Array, "B"]:
    """Returns the loss of each example."""
    ...

  def weights(self, targets: Num[Array, "B *_"]) -> Float[Array, "B"]:
    """Returns the non-negative weight of each example."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy:
  r"""Softmax cross entropy with integer labels.

  With label smoothing s the target distribution is $(1 - s)$ on the label plus
  $s / K$ on each of the K classes. With class weights the mean is weighted by
  the weight of each example's class, so the size of the loss, and with it the
  effective learning rate, does not depend on the scale of the weights.

  Args:
    label_smoothing: Probability mass spread over all classes, in [0, 1). Use
      0.05 to 0.1 when labels are noisy or confidence must be calibrated; leave
      it at 0 for distillation.
    class_weights: One finite non-negative weight a class, or None for equal
      weights. `n / (K * count)` balances K classes.

  Raises:
    ValueError: If an argument is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> loss = CrossEntropy(label_smoothing=0.1)
    >>> loss(jnp.zeros((2, 4)), jnp.array([0, 3])).round(3).tolist()
    [1.3860000371932983, 1.3860000371932983]

  References:
    Szegedy et al., Rethinking the Inception Architecture for Computer Vision,
    2016, https://arxiv.org/abs/1512.00567 (label smoothing).
  """

  label_smoothing: float = 0.0
  class_weights: Sequence[float] | None = None

  def __post_init__(self):
    """Checks the arguments."""
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(
        f"label_smoothing must be in [0, 1), got {self.label_smoothing=}."
      )
    weights = self.class_weights
    if weights is None:
      return
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(
      weights
    ):
      raise ValueError(
        "class_weights must be finite, at least 0 and not all 0, got "
        f"{self.class_weights=}."
      )

  def __call__(
    self, outputs: Float[Array, "B K"], targets: Int[Array, "B"]
  ) -> Float[Array, "B"]:
    """Returns the cross entropy of each example, in nats.

    Raises:
      ValueError: If there are not as many class weights as classes.
    """
    weights, classes = self.class_weights, outputs.shape[1]
    if weights is not None and len(weights) != classes:
      raise ValueError(
        f"class_weights must have one weight for each of the {classes} "
        f"classes, got {len(weights)}."
      )
    log_p = jax.nn.log_softmax(outputs.astype(jnp.float32))
    loss = -jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    if not self.label_smoothing:
      return loss
    smooth = -jnp.mean(log_p, axis=1)
    return loss + self.label_smoothing * (smooth - loss)

  def weights(self, targets: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns the weight of each example's class."""
    if self.class_weights is None:
      return jnp.ones(targets.shape, jnp.float32)
    return jnp.asarray(self.class_weights, jnp.float32)[targets]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCrossEntropy:
  """Softmax cross entropy of every next token, in nats.

  An example is a row of tokens; its loss is the mean over the tokens it has to
  predict, and its weight is their number, so a batch has the mean over all its
  tokens, whatever is padding. A target of -1 is not predicted.

  Args:
    label_smoothing: As in `CrossEntropy`.

  Raises:
    ValueError: If an argument is out of its range.

  Examples:
    >>> import jax.numpy as jnp
    >>> loss, targets = TokenCrossEntropy(), jnp.array([[3, -1], [0, 1]])
    >>> loss(jnp.zeros((2, 2, 4)), targets).round(3), loss.weights(targets)
    (Array([1.386, 1.386], dtype=float32), Array([1., 2.], dtype=float32))
  """

  label_smoothing: float = 0.0

  def __post_init__(self):
    """Checks the arguments."""
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(
        f"label_smoothing must be in [0, 1), got {self.label_smoothing=}."
      )

  def __call__(
    self, outputs: Float[Array, "B T V"], targets: Int[Array, "B T"]
  ) -> Float[Array, "B"]:
    """Returns the mean cross entropy of each row; 0 where none is wanted."""
    outputs = outputs.astype(jnp.float32)
    wanted = jnp.maximum(targets, 0)[..., None]
    total = jax.nn.logsumexp(outputs, axis=-1)
    loss = total - jnp.take_along_axis(outputs, wanted, axis=-1)[..., 0]
    if self.label_smoothing:
      smooth = total - jnp.mean(outputs, axis=-1)
      loss += self.label_smoothing * (smooth - loss)
    loss = jnp.where(targets >= 0, loss, 0)
    return loss.sum(axis=1) / jnp.maximum(self.weights(targets), 1)

  def weights(self, targets: Int[Array, "B T"]) -> Float[Array, "B"]:
    """Returns how many tokens each row has to predict."""
    return jnp.sum(targets >= 0, axis=1, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanSquaredError:
  """Mean over an example's outputs of the squared difference.

  Examples:
    >>> import jax.numpy as jnp
    >>> MeanSquaredError()(jnp.array([[1.0], [3.0]]), jnp.array([0.0, 1.0]))
    Array([1., 4.], dtype=float32)
  """

  def __call__(
    self, outputs: Float[Array, "B *K"], targets: Num[Array, "B *_"]
  ) -> Float[Array, "B"]:
    """Returns the squared error of each example."""
    outputs = outputs.astype(jnp.float32).reshape(outputs.shape[0], -1)
    error = outputs - targets.astype(jnp.float32).reshape(outputs.shape)
    return jnp.mean(jnp.square(error), axis=1)

  def weights(self, targets: Num[Array, "B *_"]) -> Float[Array, "B"]:
    """Returns 1 for every example."""
    return jnp.ones(targets.shape[:1], jnp.float32)


def penalty(params: PyTree, l1: float, l2: float) -> Float[Array, ""]:
  r"""Returns $l_1 \sum |w| + l_2 / 2 \sum w^2$ over the weights.

  Only arrays of two or more dimensions count: biases, scales and other vectors
  stay free. Under an adaptive optimizer an L2 term is not weight decay (the
  moments rescale it); prefer the optimizer's `weight_decay` there.

  Args:
    params: Tree of arrays.
    l1: Strength of the L1 term, at least 0; drives weights to exactly 0.
    l2: Strength of the L2 term, at least 0.

  Returns:
    A float32 scalar.

  Examples:
    >>> import jax.numpy as jnp
    >>> weights = {"bias": jnp.ones(2), "kernel": -2.0 * jnp.ones((1, 2))}
    >>> float(penalty(weights, l1=0.5, l2=0.1))
    2.4000000953674316

  References:
    Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019,
    https://arxiv.org/abs/1711.05101 (why L2 is not weight decay under Adam).
  """
  weights = [
    w.astype(jnp.float32) for w in jax.tree.leaves(params) if w.ndim > 1
  ]
  total = jnp.zeros((), jnp.float32)
  if l1:
    total += l1 * sum(jnp.sum(jnp.abs(w)) for w in weights)
  if l2:
    total += 0.5 * l2 * sum(jnp.sum(jnp.square(w)) for w in weights)
  return total
