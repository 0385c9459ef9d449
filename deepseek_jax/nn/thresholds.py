"""Rectifiers with a threshold, and the gradients they may have at it."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deepseek_jax import parallel
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
  threshold = _beside(threshold, wide)
  y = _cut(wide, threshold, shifted)
  if gradient != "exact":
    width = jax.lax.stop_gradient(_beside(width, wide))
    soft = _soft if gradient == "smooth" else _straight
    z = soft(wide, threshold, width, shifted)
    # The value of one and the gradient of the other: z - z is zero to the bit.
    y = jax.lax.stop_gradient(y) + (z - jax.lax.stop_gradient(z))
  return y.astype(dtype)


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
  # In this order NaN passes, for a trainer to see, as it does through ReLU.
  return jnp.where(x <= threshold, 0, x - threshold if shifted else x)


def _soft(x, threshold, width, shifted):
  over = (x - threshold) / width
  return width * jax.nn.softplus(over) if shifted else x * jax.nn.sigmoid(over)


def _straight(x, threshold, width, shifted):
  """Rises with x as told, and falls with the threshold by itself."""
  rising = jnp.where((x > threshold) | (x > 0), x, 0)
  x = jax.lax.stop_gradient(x)
  if shifted:
    return rising - jnp.where(x > threshold, threshold, 0)
  return rising + _soft(x, threshold, width, shifted)


def pressed(y: Float[Array, "..."], strength: float) -> Float[Array, "..."]:
  """Returns `y` as it is; on the way back, pulls what is not zero to zero.

  Adds to the gradient what `strength·mean|y|` in the loss would add. An L1
  penalty for layers that have no way to the loss: it may stand anywhere.

  The loss is taken to be a mean over the batch. In a pipeline `y` is that of a
  micro-batch, and the strength is divided by their number, see
  `parallel.batch_parts`. Where gradients of several micro-batches are summed by
  other means, do so yourself, or call it within `parallel.cut_batch`.

  >>> y = jnp.array([0.0, 2.0])
  >>> print(jax.grad(lambda y: 3 * pressed(y, 0.5).mean())(y))
  [1.5  1.75]

  Args:
    y: activations.
    strength: of the pull, at least 0.
  """
  return _pressed(y, strength / parallel.batch_parts())


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pressed(y, strength):
  del strength
  return y


def _pressed_forward(y, strength):
  del strength
  return y, jnp.sign(y)


def _pressed_backward(strength, sign, grad):
  return (grad + (strength / max(sign.size, 1)) * sign,)


_pressed.defvjp(_pressed_forward, _pressed_backward)
