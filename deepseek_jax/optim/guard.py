"""Keeps what is not finite out of an optimizer."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


def zero_non_finite() -> optax.GradientTransformationExtraArgs:
  """Replaces the elements of a gradient that an optimizer could not forget.

  An element becomes 0 where it is NaN or infinite, or so large (above 1.8e19)
  that its square is: a single one would stay in Adam's second moment for ever.
  The other elements act as ever. To momentum it is a gradient of 0: where all
  are broken, an optimizer with momentum coasts on it for as long as they are,
  one without stands still, and weight decay goes on.

  It fuses with what follows and costs next to nothing. Skipping the update as
  a whole is cleaner, but not from in here: choosing between the old and the
  new state keeps XLA from updating in place (on CPU, Adam took 3 to 6 times as
  long). A training loop does it for free with one `jax.lax.cond` around update
  and `optax.apply_updates`, the parameters and the state as its operands.
  Neither mends a cause: watch the loss.

  Returns:
    An `optax.GradientTransformationExtraArgs` without state; put it first.

  >>> tx = optax.chain(zero_non_finite(), optax.sgd(1.0))
  >>> updates, _ = tx.update(jnp.array([1.0, jnp.nan]), tx.init(jnp.ones(2)))
  >>> print(updates + 0.0)
  [-1.  0.]
  """

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    return jax.tree.map(_zero_leaf, updates), state

  return optax.GradientTransformationExtraArgs(
    optax.init_empty_state, update_fn
  )


def _zero_leaf(leaf: Array) -> Array:
  # In float32 whatever the leaf is: float16 squares overflow at 256 already.
  size = jnp.abs(leaf).astype(jnp.float32)
  return jnp.where(jnp.isfinite(size * size), leaf, jnp.zeros_like(leaf))
