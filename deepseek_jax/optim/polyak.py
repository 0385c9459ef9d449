"""A step no longer than the loss it could take away."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from deepseek_jax.core import (
  Ema,
  ema_value,
  init_ema,
  require_in,
  safe_ratio,
  scale_tree,
  update_ema,
)
from deepseek_jax.core.typing import PyTree, Scalar
from deepseek_jax.optim.loss import as_loss
from deepseek_jax.optim.readback import scope_of


class CapByPolyakState(NamedTuple):
  """State of `cap_by_polyak`; its own fields are never NaN or infinite."""

  ema: Ema  # of the loss: two scalars, float32
  rate_scale: Scalar  # shape=(), dtype=float32: the scale in force, 0 to 1
  scope: PyTree  # the covered leaves; no arrays
  inner_state: optax.OptState  # of the wrapped transform


def cap_by_polyak(
  fraction: jax.typing.ArrayLike = 0.5,
  lower: jax.typing.ArrayLike = 0.0,
  *,
  decay: jax.typing.ArrayLike = 0.0,
  inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Shortens a step that promises more than the loss can give.

  To first order the update u, learning rate and sign included, lowers the loss
  by d = -⟨g, u⟩, with g the gradient. No step can lower it by more than its
  height above a lower bound, hence

    s = min(1, fraction·max(L - lower, 0) / d),   u ← s·u

  with L the bias-corrected exponential average of the loss; s is 1 where
  d ≤ 0, as an update that is no descent promises nothing. Multiplying the loss
  and its bound by a constant leaves s as it is, if u does not change with it.

  A brake for a learning rate that may be too high, not a faster optimizer.
  Measured with Adam on a small MLP (400 steps, median of 3 seeds): the best
  validation loss went from 3.9 to 0.15 at rate 1.0, and stayed within the noise
  at 0.01 (the best rate, 0.03). Looking back longer brakes later: with
  `decay=0.9` it was 0.36 at rate 1.0. After whitening, with an average, it made
  all rates from the best one to 30 times it usable on four small workloads
  (`deepseek` has the figures); where the loss has a high floor that `lower`
  does not know of, as with language, it hardly acts.

  It costs one more pass over gradients and updates, which no fusion hides: on
  CPU 3 to 4 times the update of AdamW alone, which is that of about 100 tokens
  of training (`experiments/results/optimizer_cost.json`).

  A `lower` that is too low only weakens the brake; one that is too high brakes
  to a stand before it. Below it the scale is 1, as the bound is none.

  The gradient reaches it in one of two ways: wrap the optimizer
  (`inner=optax.adam(1e-3)`), so that the gradients come in here; or put it
  last in a chain and pass the gradient to `update` as `grad`, as for Optax's
  line searches. Wrap it under `optax.MultiSteps`, which would hand on the
  `grad` of the last micro-batch only.

  Args:
    fraction: Share of the height above the bound that a step may promise, in
      (0, 2); 1 is Polyak's step, from 2 on even a convex loss may diverge. As
      an injected hyperparameter it may be 0: no cap.
    lower: Lower bound of the loss, in its unit; finite.
    decay: Weight of the past in the average, in [0, 1); 0 takes the loss of
      this update alone, 0.9 looks back about 10 updates.
    inner: The optimizer to wrap, learning rate included.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose `update` needs the loss as
    keyword `value` and, without `inner`, the gradient as keyword `grad`. A NaN
    or infinite loss leaves the average as it is; until a loss has been seen
    the scale is 1. Broken elements of the gradient or the update promise
    nothing.

  Raises:
    ValueError: If an argument is out of its range.
    TypeError: At `update`, if `value` or the gradient is missing.

  >>> tx = cap_by_polyak(inner=optax.sgd(10.0))  # Diverges on x² without.
  >>> x = jnp.float32(3.0)
  >>> updates, state = tx.update(2 * x, tx.init(x), x, value=x**2)
  >>> print(updates, state.rate_scale)
  -0.75 0.0125

  References:
    Polyak, "Introduction to Optimization", 1987
    Loizou, Vaswani, Laradji and Lacoste-Julien, "Stochastic Polyak Step-size
    for SGD", 2021, https://arxiv.org/abs/2002.10542
    Schaipp, Ohana, Eickenberg, Defazio and Gower, "MoMo: Momentum Models for
    Adaptive Learning Rates", 2024, https://arxiv.org/abs/2305.07583
  """
  require_in("(0, 2)", fraction=fraction)
  require_in("(-inf, inf)", lower=lower)
  require_in("[0, 1)", decay=decay)
  wrapped = optax.with_extra_args_support(
    optax.identity() if inner is None else inner
  )

  def init_fn(params):
    return CapByPolyakState(
      ema=init_ema(),
      rate_scale=jnp.ones((), jnp.float32),
      scope=scope_of(params),
      inner_state=wrapped.init(params),
    )

  def scale_for(ema, promise, last):
    height = ema_value(ema) - lower
    limit = jnp.asarray(fraction * height, jnp.float32)
    # limit / max(promise, limit) is the minimum with 1 already, and cannot
    # overflow where the promise is tiny.
    scale = safe_ratio(limit, jnp.maximum(promise, limit), default=1.0)
    scale = jnp.where((ema.weight == 0) | jnp.isnan(promise), last, scale)
    # A loss below its bound says that the bound is none.
    scale = jnp.where(height < 0, 1.0, scale)
    # An injected fraction may be 0, which is no cap rather than no step.
    return jnp.where(jnp.asarray(fraction) > 0, scale, 1.0)

  def update_fn(
    updates, state, params=None, *, value=None, grad=None, **extra_args
  ):
    value = as_loss(value, "cap_by_polyak")
    if grad is None:
      grad = _incoming(updates, inner)
    updates, inner_state = wrapped.update(
      updates, state.inner_state, params, value=value, grad=grad, **extra_args
    )
    ema = update_ema(state.ema, value, decay)
    scale = scale_for(ema, _promise(grad, updates), state.rate_scale)
    new_state = state._replace(
      ema=ema, rate_scale=scale, inner_state=inner_state
    )
    return scale_tree(updates, scale), new_state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _incoming(
  updates: PyTree, inner: optax.GradientTransformation | None
) -> PyTree:
  """Returns the updates that come in, if they are the gradient."""
  if inner is None:
    raise TypeError(
      "cap_by_polyak needs the gradient: wrap the optimizer, as in "
      "cap_by_polyak(inner=optax.adam(1e-3)), or call tx.update(grads, "
      "opt_state, params, value=loss, grad=grads)."
    )
  return updates


def _promise(grad: PyTree, updates: PyTree) -> Scalar:
  """Returns the decrease that an update predicts, -⟨grad, updates⟩."""
  # Inside a mask the updates lack the other leaves, an extra argument does not.
  parts = jax.tree.map(
    lambda u, g: 0.0 if _is_masked(u) else _inner_product(u, g),
    updates,
    grad,
    is_leaf=_is_masked,
  )
  return -sum(jax.tree.leaves(parts), start=jnp.zeros((), jnp.float32))


def _inner_product(update: Array, grad: Array) -> Scalar:
  """Returns ⟨update, grad⟩ in float32, without what is not finite."""
  wide = jnp.promote_types(update.dtype, jnp.float32)
  product = update.astype(wide) * grad.astype(wide)
  sound = jnp.isfinite(update) & jnp.isfinite(grad)
  # Row by row: XLA on CPU writes the product down if it is summed at once.
  rows = jnp.sum(jnp.where(sound, product, 0), -1) if product.ndim else product
  return jnp.sum(rows).real.astype(jnp.float32)


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)
