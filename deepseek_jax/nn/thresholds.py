"""Rectifiers with a threshold, and the gradients they may have at it."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax.nn import checks

Gradient = Literal["exact", "straight_through", "smooth"]
"""What `threshold_relu` does in the backward pass."""


def threshold_relu(
  x: Float[Array, "..."],
  threshold: Float[Array, "..."] | float,
  *,
  shifted: bool = False,
  gradient: Gradient = "exact",
  width: Float[Array, "..."] | float = 0.1,
) -> Float[Array, "..."]:
  """Returns what of `x` is above a threshold, and zero elsewhere.

  y = x if x > threshold else 0; shifted, y = max(x - threshold, 0), which has
  no jump. The zeros are exact whatever the gradient is.

  >>> x = jnp.array([-1.0, 0.2, 0.8])
  >>> print(threshold_relu(x, 0.5), threshold_relu(x, 0.5, shifted=True))
  [0.  0.  0.8] [0.  0.  0.3]
  >>> slope = jax.grad(lambda x, how: threshold_relu(x, 0.5, gradient=how))
  >>> print(slope(0.4, "exact"), slope(0.4, "straight_through"))
  0.0 1.0

  Args:
    x: any numbers.
    threshold: one, or an array that broadcasts with `x`. It is compared in
      float32.
    shifted: whether the threshold is subtracted from what passes it.
    gradient: "exact" is 1 where x passes. "straight_through" is 1 where x is
      positive or passes, so that what the threshold cuts off still learns.
      "smooth" is that of x·sigmoid((x - threshold) / width) (shifted: of the
      softplus), which is nowhere quite zero. The last two have a gradient for
      the threshold even if not shifted: that of the smooth function.
    width: over which the smooth functions rise, above 0; broadcasts too.

  Returns:
    An array of the shape and dtype of `x`.

  Raises:
    ValueError: `gradient` is unknown, or `width` is a number not above 0.

  References:
    Rajamanoharan et al., "Jumping Ahead: Improving Reconstruction Fidelity with
    JumpReLU Sparse Autoencoders", 2024, https://arxiv.org/abs/2407.14435 (a
    threshold with a gradient)
  """
  check_gradient(gradient, width)
  wide, dtype = jnp.asarray(x, jnp.float32), jnp.asarray(x).dtype
  threshold = jnp.broadcast_to(_beside(threshold, wide), wide.shape)
  if gradient == "exact":
    return _cut(wide, threshold, shifted).astype(dtype)
  width = jnp.broadcast_to(_beside(width, wide), wide.shape)
  return _surrogate(wide, threshold, width, shifted, gradient).astype(dtype)


def check_gradient(gradient: str, width: object) -> None:
  """Raises `ValueError` if `threshold_relu` takes no such gradient or width."""
  checks.require_choice(
    ("exact", "straight_through", "smooth"), gradient=gradient
  )
  if isinstance(width, int | float) and not 0 < width < math.inf:
    raise ValueError(f"width must be finite and above 0, got {width=}.")


def _beside(value, x: Array) -> Array:
  """Returns a float32 array with as many axes as `x`, the new ones in front."""
  value = jnp.asarray(value, jnp.float32)
  return value.reshape((1,) * (x.ndim - value.ndim) + value.shape)


def _cut(x, threshold, shifted):
  return jnp.where(x > threshold, x - threshold if shifted else x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _surrogate(x, threshold, width, shifted, gradient):
  del width, gradient
  return _cut(x, threshold, shifted)


def _forward(x, threshold, width, shifted, gradient):
  y = _surrogate(x, threshold, width, shifted, gradient)
  return y, (x, threshold, width)


def _backward(shifted, gradient, kept, grad):
  x, threshold, width = kept
  up, down = _slopes(x, threshold, width, shifted, gradient)
  return grad * up, -grad * down, jnp.zeros_like(width)


def _slopes(x, threshold, width, shifted, gradient):
  """Returns by how much y rises with x, and falls with the threshold."""
  through = gradient == "straight_through"
  passes = ((x > threshold) | (x > 0)).astype(jnp.float32)
  open_ = jax.nn.sigmoid((x - threshold) / width)
  if shifted:
    exact = (x > threshold).astype(jnp.float32)
    return (passes, exact) if through else (open_, open_)
  steep = x * open_ * (1 - open_) / width
  return (passes if through else open_ + steep), steep


_surrogate.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def pressed(y: Float[Array, "..."], strength: float) -> Float[Array, "..."]:
  """Returns `y` as it is; on the way back, pulls what is not zero to zero.

  Adds to the gradient what `strength·mean|y|` in the loss would add. An L1
  penalty for layers that have no way to the loss: it may stand anywhere.

  The loss is taken to be a mean over the batch. Where gradients of several
  micro-batches are summed to that mean, divide the strength by their number.

  >>> y = jnp.array([0.0, 2.0])
  >>> print(jax.grad(lambda y: 3 * pressed(y, 0.5).mean())(y))
  [1.5  1.75]

  Args:
    y: activations.
    strength: of the pull, at least 0.
  """
  del strength
  return y


def _pressed_forward(y, strength):
  del strength
  return y, jnp.sign(y)


def _pressed_backward(strength, sign, grad):
  return (grad + (strength / max(sign.size, 1)) * sign,)


pressed.defvjp(_pressed_forward, _pressed_backward)
