"""A window whose size and place every head learns."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deepseek_jax.nn import checks


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def clip_with_return(x: Array, low: float, high: float) -> Array:
  """Clips, and lets a gradient through that leads back into the range.

  Where `jnp.clip` is flat a parameter stays for ever: a step too long, and it
  is lost. Here one that is outside still hears that it should come back, and
  not that it should go further.

  >>> back = jax.grad(lambda x: clip_with_return(x, 0.0, 1.0))
  >>> away = jax.grad(lambda x: -clip_with_return(x, 0.0, 1.0))
  >>> print(back(1.5), away(1.5))
  1.0 0.0
  """
  return jnp.clip(x, low, high)


def _clip_fwd(x, low, high):
  return jnp.clip(x, low, high), x


def _clip_bwd(low, high, x, grad):
  # Descent moves against the gradient.
  outward = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
  return (jnp.where(outward, 0, grad),)


clip_with_return.defvjp(_clip_fwd, _clip_bwd)


class LearnedWindow(nnx.Module):
  """Size and place of the window of every head, as parameters.

  Both are fractions of the largest window, so that one learning rate suits all
  window sizes. A new window is open wholly, and does what none at all does. Add
  `penalty` to the loss: it draws the window in, and the loss holds against it
  where the head needs what it would lose. Without it nothing ever closes.

  The work stays that of the largest window; what is learned is which part of
  it a head listens to, and, read after training, how small `window` may be.

  >>> window = LearnedWindow(2, 64)
  >>> span, offset = window()
  >>> print(span, offset, window.penalty())
  [64. 64.] [0. 0.] 1.0

  Args:
    num_heads: N, at least 1.
    window: tokens of the largest window, at least 1.
    is_causal: whether its middle moves into the past only.

  Raises:
    ValueError: a number is below 1.

  References:
    Sukhbaatar et al., "Adaptive Attention Span in Transformers", 2019,
    https://arxiv.org/abs/1905.07799 (the span; there it starts closed, where
    its gradient knows of no distance beyond the ramp)
  """

  def __init__(self, num_heads: int, window: int, *, is_causal: bool = True):
    checks.require_positive(num_heads=num_heads, window=window)
    self.window = window
    self.least_offset = 0.0 if is_causal else -1.0
    self.span = nnx.Param(jnp.ones(num_heads))
    self.offset = nnx.Param(jnp.zeros(num_heads))

  def __call__(self) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Returns span and offset in tokens, as `window_weight` takes them."""
    offset = clip_with_return(self.offset[...], self.least_offset, 1.0)
    return self.window * self._span(), self.window * offset

  def penalty(self) -> Float[Array, ""]:
    """Returns the mean span in windows, from 0 to 1: an L1 term for a loss."""
    return self._span().mean()

  def _span(self) -> Float[Array, " N"]:
    return clip_with_return(self.span[...], 0.0, 1.0)
