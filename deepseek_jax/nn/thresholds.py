"""Rectifiers with a threshold, and the gradients they may have at it."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.nn import checks

Gradient = Literal["exact", "straight_through", "smooth"]
"""What `threshold_relu` does in the backward pass."""


def threshold_relu(
  x: Float[Array, "*B C"],
  threshold: Float[Array, ""] | Float[Array, " C"] | float,
  *,
  shifted: bool = False,
  gradient: Gradient = "exact",
  width: float = 0.1,
) -> Float[Array, "*B C"]:
  """Returns what of `x` is above a threshold, and zero elsewhere.

  y = x if x > threshold else 0; shifted, y = max(x - threshold, 0), which has
  no jump. The zeros are exact whatever the gradient is.

  >>> x = jnp.array([-1.0, 0.2, 0.8])
  >>> print(threshold_relu(x, 0.5), threshold_relu(x, 0.5, shifted=True))
  [0.  0.  0.8] [0.  0.  0.3]

  Args:
    x: any numbers; C channels come last.
    threshold: one for all or one a channel. It is compared in float32.
    shifted: whether the threshold is subtracted from what passes it.
    gradient: "exact" is 1 where x passes. "straight_through" is 1 where x is
      positive or passes, so that what the threshold cuts off still learns.
      "smooth" is that of x·sigmoid((x - threshold) / width) (shifted: of the
      softplus), which is nowhere quite zero. The last two have a gradient for
      the threshold also if not shifted: that of the smooth function.
    width: over which the smooth functions rise, above 0.

  Raises:
    ValueError: `gradient` is unknown or `width` is not above 0.
  """
  checks.require_choice(
    ("exact", "straight_through", "smooth"), gradient=gradient
  )
  if not width > 0:
    raise ValueError(f"width must be above 0, got {width=}.")
  threshold = jnp.asarray(threshold, jnp.float32)
  if threshold.ndim:
    threshold = threshold.reshape((1,) * (x.ndim - 1) + threshold.shape)
  return _threshold_relu(x, threshold, shifted, gradient, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _threshold_relu(x, threshold, shifted, gradient, width):
  del gradient, width
  wide = x.astype(jnp.float32)
  kept = wide - threshold if shifted else wide
  return jnp.where(wide > threshold, kept, 0).astype(x.dtype)


def _forward(x, threshold, shifted, gradient, width):
  y = _threshold_relu(x, threshold, shifted, gradient, width)
  return y, (x, threshold)


def _backward(shifted, gradient, width, kept, grad):
  x, threshold = kept
  x_slope, threshold_slope = _slopes(
    x.astype(jnp.float32), threshold, shifted, gradient, width
  )
  wide = grad.astype(jnp.float32)
  summed = _sum_to(wide * threshold_slope, threshold.shape)
  return (wide * x_slope).astype(x.dtype), summed


def _slopes(x, threshold, shifted, gradient, width):
  passes = (x > threshold).astype(jnp.float32)
  open_ = jax.nn.sigmoid((x - threshold) / width)
  if shifted:
    slopes = {
      "exact": passes,
      "straight_through": jnp.maximum(passes, x > 0),
      "smooth": open_,
    }
    down = open_ if gradient == "smooth" else passes
    return slopes[gradient], -down
  steep = x * open_ * (1 - open_) / width
  slopes = {
    "exact": (passes, jnp.zeros_like(x)),
    "straight_through": (jnp.maximum(passes, x > 0), -steep),
    "smooth": (open_ + steep, -steep),
  }
  return slopes[gradient]


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
  """Sums over the axes along which an array of `shape` was broadcast."""
  if not shape:
    return jnp.sum(x)
  axes = tuple(i for i, size in enumerate(shape) if size == 1 != x.shape[i])
  return jnp.sum(x, axes, keepdims=True)


_threshold_relu.defvjp(_forward, _backward)
