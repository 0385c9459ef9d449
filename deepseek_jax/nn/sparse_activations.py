"""Rectifiers whose threshold follows what comes in."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deepseek_jax.nn import checks
from deepseek_jax.nn.thresholds import Gradient, threshold_relu


class Threshold(nnx.Variable):
  """A threshold that follows the inputs; float32, [] or [C]."""


class DynamicSparseReLU(nnx.Module):
  """A rectifier whose threshold is a running mean of the inputs' size.

  threshold <- (1 - rate)·threshold + rate·mean|x|, then y = x if x > threshold
  else 0. The rule is the published one but for this: the threshold moves in
  training mode only, and by the whole batch however it is sharded. As printed
  it moved in evaluation too.

  >>> layer = DynamicSparseReLU(3)
  >>> print(layer(jnp.array([[-1.0, 0.4, 1.6]])), layer.threshold[...])
  [[0.  0.  1.6]] 0.505

  Args:
    features: C, the size of the last axis; None for any.
    threshold: the first threshold, finite.
    rate: of the running mean, in (0, 1].
    per: "tensor" for one threshold, or "channel", which needs `features`.
    shifted: whether y = max(x - threshold, 0) instead.
    gradient: at the threshold, see `threshold_relu`.
    axis_name: of the devices to average over, inside `jax.shard_map` or
      `jax.vmap`; under `jax.jit` alone the mean is over all anyway.

  Raises:
    ValueError: a number is out of its range.
  """

  def __init__(
    self,
    features: int | None = None,
    *,
    threshold: float = 0.5,
    rate: float = 0.01,
    per: Literal["tensor", "channel"] = "tensor",
    shifted: bool = False,
    gradient: Gradient = "exact",
    axis_name: str | tuple[str, ...] | None = None,
  ):
    checks.require_choice(("tensor", "channel"), per=per)
    if features is not None:
      checks.require_positive(features=features)
    if features is None and per == "channel":
      raise ValueError("features must be given with per='channel', got None.")
    if not 0 < rate <= 1:
      raise ValueError(f"rate must be in (0, 1], got {rate=}.")
    self.features = features
    self.rate = rate
    self.per = per
    self.shifted = shifted
    self.gradient: Gradient = gradient
    self.axis_name = axis_name
    shape = (features,) if features and per == "channel" else ()
    self.threshold = Threshold(jnp.full(shape, threshold, jnp.float32))
    self.deterministic = False

  def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """Returns `x` where it is above the threshold, and zero elsewhere."""
    if not self.deterministic:
      self.threshold[...] = self._moved(jax.lax.stop_gradient(x))
    return threshold_relu(
      x, self.threshold[...], shifted=self.shifted, gradient=self.gradient
    )

  def _moved(self, x: Array) -> Array:
    axes = tuple(range(x.ndim - (self.per == "channel")))
    size = jnp.mean(jnp.abs(x.astype(jnp.float32)), axes)
    if self.axis_name is not None:
      size = jax.lax.pmean(size, self.axis_name)
    old = self.threshold[...]
    new = (1 - self.rate) * old + self.rate * size
    return jnp.where(jnp.isfinite(new), new, old)
