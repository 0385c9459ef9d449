"""A rectifier that counts its zeros: what all sparse activations share."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from deepseek_jax.nn import checks
from deepseek_jax.nn.annealing import TrainingCalls
from deepseek_jax.nn.thresholds import (
  Gradient,
  check_gradient,
  pressed,
  threshold_relu,
)

_MEMORY = 0.01  # Share of the newest call in running means, once warm.
_OFFSET_STEP = 0.01  # Of an offset per call, and in proportion.
_MAX_OFFSET = 1e4
_LEAST_SIZE = 1e-6
_LEAST_RATE = 0.01  # Of a layer's firing, when it decides who is too silent.


class FiringRate(nnx.Variable):
  """How often channels are not zero; float32, [C], or [] for all together."""


class Offset(nnx.Variable):
  """How far thresholds of silent channels are lowered; float32, [C]."""


class InputScale(nnx.Variable):
  """Running mean square of the inputs; float32, []."""


class SparseReLU(nnx.Module):
  """A rectifier that counts its zeros, and wakes channels that fall silent.

  y = x if x > threshold else 0. In training mode it keeps running means, over
  the whole batch, of how often each channel fires: read them with `sparsity`
  and `dead`. With a threshold of 0 this is ReLU. The sparse activations whose
  threshold moves derive from it.

  Its state are variables of own types, not parameters. They follow the calls
  after `model.train()` and rest after `model.eval()`; a trainer that carries
  the state of the model along (`train.fit` does) needs to know nothing of it.

  >>> layer = SparseReLU(3, threshold=0.5)
  >>> print(layer(jnp.array([[-1.0, 0.4, 1.6], [-1.0, 0.8, 1.6]])))
  [[0.  0.  1.6]
   [0.  0.8 1.6]]
  >>> print(layer.sparsity(), layer.dead())
  0.5 [ True False False]

  Args:
    features: C, size of the last axis; None for any, then all channels count as
      one.
    threshold: below which all is zero, finite.
    shifted: whether y = max(x - threshold, 0), without a jump.
    gradient: at the threshold, see `threshold_relu`.
    width: of the smooth gradient, in units of x, above 0.
    pressure: strength of an L1 penalty on y, see `pressed`; at least 0.
    floor: share of the mean firing rate that every channel should reach, in
      [0, 1): the threshold of one below it is lowered, in proportion to the
      inputs' size, until it does. Above 0 it needs `features`.
    axis_name: of the devices to average over, inside `jax.shard_map` or
      `jax.vmap`; under `jax.jit` alone means are over the whole batch anyway.

  Raises:
    ValueError: a number is out of its range.
  """

  def __init__(
    self,
    features: int | None = None,
    *,
    threshold: int | float = 0.0,
    shifted: bool = False,
    gradient: Gradient = "exact",
    width: int | float = 0.1,
    pressure: int | float = 0.0,
    floor: int | float = 0.0,
    axis_name: str | tuple[str, ...] | None = None,
  ):
    if features is not None:
      checks.require_positive(features=features)
    checks.require_fraction(floor=floor)
    if floor and features is None:
      raise ValueError(
        f"features must be given with a floor above 0, got {floor=}; "
        "floor=0 does without."
      )
    for name, value in (("threshold", threshold), ("pressure", pressure)):
      if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {name}={value}.")
    if pressure < 0:
      raise ValueError(f"pressure must be at least 0, got {pressure=}.")
    check_gradient(gradient, width)
    self.features = features
    self.start = threshold
    self.shifted = shifted
    self.gradient: Gradient = gradient
    self.width = width
    self.pressure = pressure
    self.floor = floor
    self.axis_name = axis_name
    channels = () if features is None else (features,)
    self.calls = TrainingCalls(jnp.zeros((), jnp.int32))
    self.firing = FiringRate(jnp.zeros(channels, jnp.float32))
    self.offset = Offset(jnp.zeros(channels, jnp.float32)) if floor else None
    self.scale = (
      InputScale(jnp.zeros((), jnp.float32)) if self._follows_size() else None
    )
    self.deterministic = False
    self.counting = False

  def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Returns `x` where it is above the threshold, and zero elsewhere."""
    if self.features is not None and x.shape[-1] != self.features:
      raise ValueError(
        f"x must have features={self.features} channels in its last axis, got "
        f"{x.shape=}."
      )
    if not self.deterministic:
      self._follow(jax.lax.stop_gradient(x).astype(jnp.float32))
    threshold, width = self._levels(x.astype(jnp.float32))
    y = threshold_relu(
      x, threshold, shifted=self.shifted, gradient=self.gradient, width=width
    )
    if not self.deterministic or self.counting:
      self._count(jax.lax.stop_gradient(y) != 0)
    return pressed(y, self.pressure) if self.pressure else y

  def sparsity(self) -> Float[Array, "*L"]:
    """Returns the share of zeros, about that of the last hundred calls.

    One number for each layer, where this holds several along a leading axis.
    NaN before the first call.
    """
    firing = self.firing[...]
    mean = firing if self.features is None else firing.mean(-1)
    return jnp.where(self.calls[...] > 0, 1 - mean, jnp.nan)

  def dead(
    self, below: int | float = 1e-3
  ) -> Bool[Array, "*L C"] | Bool[Array, "*L"]:
    """Says of each channel whether it has (almost) ceased to fire.

    Args:
      below: a firing rate in [0, 1). A channel that stops firing for good falls
        below 0.001 after at most 700 calls.

    Raises:
      ValueError: `below` is out of its range.
    """
    checks.require_fraction(below=below)
    return self.firing[...] <= below

  def start_counting(self) -> None:
    """Forgets who fired, and counts from now on in evaluation mode too."""
    self.calls[...] = jnp.zeros_like(self.calls[...])
    self.firing[...] = jnp.zeros_like(self.firing[...])
    self.counting = True

  def _follows_size(self) -> bool:
    """Says whether thresholds are in units of the running size of inputs."""
    return bool(self.floor)

  def _follow(self, x: Array) -> None:
    """Moves what depends on the inputs, before they are cut."""
    if self.scale is not None:
      square = self._mean(jnp.square(x))
      pace = jnp.maximum(_MEMORY, 1 / (self.calls[...] + 1.0))
      move(self.scale, self.scale[...] + pace * (square - self.scale[...]))

  def _levels(self, x: Array) -> tuple[Array, Array | float]:
    """Returns threshold and width of a smooth gradient; both broadcast."""
    del x
    return self._lowered(jnp.asarray(self.start, jnp.float32)), self.width

  def _lowered(self, threshold: Array) -> Array:
    """Returns the threshold, lowered for channels that are too silent."""
    if self.offset is None:
      return threshold
    return threshold - self._size() * self.offset[...]

  def _size(self) -> Array:
    """Returns the running root mean square of the inputs."""
    mean_square = jnp.ones(()) if self.scale is None else self.scale[...]
    return jnp.maximum(jnp.sqrt(mean_square), _LEAST_SIZE)

  def _count(self, fires: Array) -> Array:
    """Takes note of who fires, and returns how often each did."""
    most = jnp.iinfo(jnp.int32).max
    self.calls[...] = jnp.minimum(self.calls[...], most - 1) + 1
    pace = 1.0 / self.calls[...]
    if not self.deterministic:
      pace = jnp.maximum(_MEMORY, pace)
    axis = None if self.features is None else tuple(range(fires.ndim - 1))
    rate = self._mean(fires.astype(jnp.float32), axis)
    old = self.firing[...]
    self.firing[...] = old + pace * (rate - old)
    if self.offset is not None and not self.deterministic:
      self.offset[...] = self._new_offset(self.offset[...])
    return rate

  def _new_offset(self, offset: Array) -> Array:
    # In proportion, so that a channel far off is reached too. Down slowly: it
    # should not fall asleep at once.
    firing = self.firing[...]
    floor = self.floor * jnp.maximum(firing.mean(), _LEAST_RATE)
    step = _OFFSET_STEP * (1 + offset)
    moved = offset + jnp.where(firing < floor, step, -0.1 * step)
    return jnp.clip(moved, 0, _MAX_OFFSET)

  def _mean(self, x: Array, axis: tuple[int, ...] | None = None) -> Array:
    mean = jnp.mean(x, axis)
    if self.axis_name is None:
      return mean
    return jax.lax.pmean(mean, self.axis_name)


def move(variable: nnx.Variable, value: Array) -> None:
  """Sets what is finite: one bad batch must not stay for ever."""
  variable[...] = jnp.where(jnp.isfinite(value), value, variable[...])
