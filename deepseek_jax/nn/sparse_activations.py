"""Rectifiers whose threshold adapts: by rule, by target, or by gradient."""

import statistics
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from deepseek_jax.core import arguments
from deepseek_jax.nn import checks
from deepseek_jax.nn.sparse_relu import SparseReLU, move
from deepseek_jax.nn.thresholds import Gradient
from deepseek_jax.nn.window import clip_with_return

Per = Literal["tensor", "channel"]
"""What has a threshold of its own."""

_GAIN = 0.02  # Of the height, in deviations a call, by the share missed.
_MAX_HEIGHT = 4.0  # Deviations; few of any distribution lie beyond.
_LEAST_VARIANCE = 1e-12


class Threshold(nnx.Variable):
  """A threshold that follows the inputs, not a gradient; float32, [] or [C]."""


class DynamicSparseReLU(SparseReLU):
  """A rectifier whose threshold is a running mean of the inputs' size.

  threshold <- (1 - rate)·threshold + rate·mean|x|, then y = x if x > threshold
  else 0. As printed the threshold moved in evaluation too, and by what one
  device saw; here it moves in training mode only, by the whole batch.

  `TargetSparseReLU` reaches more zeros at less loss, and holds the number asked
  for. This rule is for comparison: where all inputs are negative it silences
  the layer for ever, unless it is given a `floor`.

  >>> layer = DynamicSparseReLU(3)
  >>> print(layer(jnp.array([[-1.0, 0.4, 1.6]])), layer.threshold[...])
  [[0.  0.  1.6]] 0.505

  Args:
    features: C, size of the last axis; None for any.
    threshold: the first one, finite.
    rate: of the running mean, in (0, 1].
    per: "tensor" for one threshold, "channel" for C, which needs `features`.
    **options: `shifted`, `gradient`, `width`, `pressure`, `floor` and
      `axis_name` of `SparseReLU`.

  Raises:
    ValueError: a number is out of its range.
  """

  def __init__(
    self,
    features: int | None = None,
    *,
    threshold: int | float = 0.5,
    rate: int | float = 0.01,
    per: Per = "tensor",
    **options: Any,
  ):
    super().__init__(features, threshold=threshold, **options)
    if not 0 < rate <= 1:
      raise ValueError(f"rate must be in (0, 1], got {rate=}.")
    shape = _checked_shape(per, features)
    self.rate = rate
    self.threshold = Threshold(jnp.full(shape, threshold, jnp.float32))

  def _follow(self, x: Array) -> None:
    super()._follow(x)
    old = self.threshold[...]
    axis = tuple(range(x.ndim - 1)) if old.ndim else None
    size = self._mean(jnp.abs(x), axis)
    move(self.threshold, (1 - self.rate) * old + self.rate * size)

  def _levels(self, x: Array) -> tuple[Array, Array | float]:
    del x
    return self._lowered(self.threshold[...]), self.width


class TargetSparseReLU(SparseReLU):
  """A rectifier that holds the sparsity it is asked for.

  y = max(x - threshold, 0), where the threshold of a token is `height` standard
  deviations above the mean of its own channels: it scales and shifts with them.
  The height is state. In training it rises while too few are zero, and falls
  while too many are; from one half on, the target itself rises over the first
  `warmup` calls. Channels that fall silent have their threshold lowered until
  they fire again. All of it rests in evaluation.

  >>> layer = TargetSparseReLU(8, sparsity=0.75, warmup=0)
  >>> x = jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
  >>> print(layer(x).round(1), layer.sparsity())
  [[0. 0. 0. 0. 0. 0. 1. 2.]] 0.75

  Args:
    features: C, size of the last axis, at least 2.
    sparsity: share of zeros to hold, in (0, 1); 0.9 costs little.
    warmup: calls in training mode until the target is reached, at least 0. A
      third of a short training, a few hundred calls of a long one: a layer that
      starts sparse learns worse, and so does one that becomes so late.
    floor: as in `SparseReLU`; 0 leaves silent channels alone.
    **options: `shifted` (here True by default), `gradient`, `width` (here in
      standard deviations), `pressure` and `axis_name` of `SparseReLU`.

  Raises:
    ValueError: a number is out of its range.

  References:
    You et al., "Spark Transformer: Reactivating Sparsity in FFN and Attention",
    2025, https://arxiv.org/abs/2506.06644 (a threshold from mean and deviation
    of a token; the Gaussian quantile, which it takes for the height, is only
    where ours starts)
    Song et al., "ProSparse: Introducing and Enhancing Intrinsic Activation
    Sparsity within Large Language Models", 2024,
    https://arxiv.org/abs/2402.13516 (sparsity in steps)
  """

  def __init__(
    self,
    features: int | None = None,
    *,
    sparsity: int | float = 0.9,
    warmup: int = 200,
    floor: int | float = 0.2,
    shifted: bool = True,
    **options: Any,
  ):
    if features is None or features < 2:
      raise ValueError(f"features must be at least 2, got {features=}.")
    super().__init__(features, floor=floor, shifted=shifted, **options)
    arguments.require_in("(0, 1)", sparsity=sparsity)
    if not isinstance(warmup, int) or warmup < 0:
      raise ValueError(
        f"warmup must be an integer of at least 0, got {warmup=!r}."
      )
    self.target = sparsity
    self.warmup = warmup
    first = min(sparsity, 0.5) if warmup else sparsity
    height = statistics.NormalDist().inv_cdf(first)
    self.threshold = Threshold(jnp.asarray(height, jnp.float32))

  def _follows_size(self) -> bool:
    return False  # Every token brings its own.

  def _levels(self, x: Array) -> tuple[Array, Array | float]:
    mean = jnp.mean(x, -1, keepdims=True)
    deviation = jnp.sqrt(jnp.var(x, -1, keepdims=True) + _LEAST_VARIANCE)
    height = self.threshold[...]
    if self.offset is not None:
      offset = self.offset[...]
      height = height - offset.reshape((1,) * (x.ndim - 1) + offset.shape)
    return mean + deviation * height, self.width * deviation

  def _count(self, fires: Array) -> Array:
    rate = super()._count(fires)
    if not self.deterministic:
      goal = self.goal()
      # A normal density falls about as 1 - goal does: all are equally quick.
      step = _GAIN / (1 - goal) * (goal - 1 + rate.mean())
      height = self.threshold[...] + step
      self.threshold[...] = jnp.clip(height, -_MAX_HEIGHT, _MAX_HEIGHT)
    return rate

  def goal(self) -> Array:
    """Returns the share of zeros that it aims at by now."""
    if not self.warmup:
      return jnp.asarray(self.target, jnp.float32)
    first = min(self.target, 0.5)
    done = jnp.minimum(self.calls[...] / self.warmup, 1.0)
    return first + (self.target - first) * done


class LearnedSparseReLU(SparseReLU):
  """A rectifier that learns its threshold by gradient.

  y = x if x > threshold else 0, where the threshold is a parameter in units of
  the running root mean square of the inputs, so that one learning rate suits
  all. The loss alone has little reason to raise it: `pressure` has. A step too
  long does no harm: beyond 4 units only a gradient that leads back counts.

  >>> layer = LearnedSparseReLU(3, threshold=0.5)
  >>> print(layer(jnp.array([[-3.0, 1.0, 4.0]])), layer.threshold.shape)
  [[0. 0. 4.]] (3,)

  Args:
    features: C, size of the last axis; None for any.
    threshold: the first one, in units of the inputs' size, in [-4, 4].
    per: "channel" for C thresholds, which needs `features`, "tensor" for one.
    gradient: as in `threshold_relu`, which says which have one for a threshold.
    pressure: as in `SparseReLU`, but above 0 by default.
    floor: as in `SparseReLU`; 0 leaves silent channels alone.
    **options: `shifted`, `width` (here in units of the inputs' size) and
      `axis_name` of `SparseReLU`.

  Raises:
    ValueError: a number is out of its range, or the threshold would have no
      gradient.
  """

  def __init__(
    self,
    features: int | None = None,
    *,
    threshold: int | float = 0.5,
    per: Per = "channel",
    gradient: Gradient = "straight_through",
    pressure: int | float = 0.03,
    floor: int | float = 0.2,
    **options: Any,
  ):
    super().__init__(
      features, gradient=gradient, pressure=pressure, floor=floor, **options
    )
    if not -_MAX_HEIGHT <= threshold <= _MAX_HEIGHT:
      raise ValueError(
        f"threshold must be in [-{_MAX_HEIGHT}, {_MAX_HEIGHT}], got "
        f"{threshold=}."
      )
    if gradient == "exact" and not self.shifted:
      raise ValueError(
        "gradient must be 'straight_through' or 'smooth', or shifted be True: "
        "the threshold has no other gradient; got gradient='exact'."
      )
    shape = _checked_shape(per, features)
    self.threshold = nnx.Param(jnp.full(shape, threshold, jnp.float32))

  def _follows_size(self) -> bool:
    return True

  def _levels(self, x: Array) -> tuple[Array, Array | float]:
    del x
    size = self._size()
    level = clip_with_return(self.threshold[...], -_MAX_HEIGHT, _MAX_HEIGHT)
    return self._lowered(size * level), self.width * size


def _checked_shape(per: Per, features: int | None) -> tuple[int, ...]:
  checks.require_choice(("tensor", "channel"), per=per)
  if per == "tensor":
    return ()
  if features is None:
    raise ValueError("features must be given with per='channel', got None.")
  return (features,)
