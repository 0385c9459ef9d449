"""A learning rate that follows the loss."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import (
  Ema,
  ema_value,
  init_ema,
  is_number,
  require_in,
  require_one_of,
  safe_ratio,
  scale_tree,
  select_tree,
  update_ema,
)
from deepseek_jax.core.typing import PyTree, Scalar
from deepseek_jax.optim.readback import scope_of


class ScaleByLossRatioState(NamedTuple):
  """State of `scale_by_loss_ratio`; no field is ever NaN or infinite."""

  ema: Ema  # of the loss: two scalars, float32
  reference: Scalar  # shape=(), dtype=float32: 0 until a loss has been seen
  rate_scale: Scalar  # shape=(), dtype=float32: the scale in force
  scope: PyTree  # the covered leaves; no arrays


def scale_by_loss_ratio(
  power: jax.typing.ArrayLike = 0.5,
  *,
  decay: jax.typing.ArrayLike = 0.95,
  reference: Literal["initial", "best"] = "initial",
  min_scale: jax.typing.ArrayLike = 0.1,
  max_scale: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """Scales updates by a power of the loss relative to where it stood.

  s = clip((L / L₀)^power, min_scale, max_scale), u ← s·u, with L the
  bias-corrected exponential average of the loss and L₀ the first loss seen
  (`reference="initial"`) or the lowest average so far (`"best"`). The scale
  does not change when the loss is multiplied by a constant.

  * `reference="initial"`, power > 0: fast at first, calm late, driven by how
    training goes rather than by the number of steps.
  * `reference="best"`, power < 0: full speed while the loss falls, slower as
    soon as it rises above the best.
  * `reference="initial"`, power < 0, max_scale > 1: faster as the loss falls,
    which is normalisation for plain SGD and too bold after Adam.

  Put it after the optimizer's normalisation. The loss must be one that is
  positive and goes towards zero: where the reference is not positive the scale
  is 1, and a mean loss below zero counts as zero. No gain over a schedule has
  been measured: where the length of the run is known, try a cosine first.

  As published, the rate is multiplied by 10 below a loss of 0.1 and by 5 below
  1. Corrected here: the thresholds depended on the unit of the loss, and the
  rate rose late where the text wants it stable; a ratio and a positive power
  mend both.

  Args:
    power: Exponent of the ratio; 0 does nothing.
    decay: Weight of the past in the average, in [0, 1); 0.95 looks back about
      20 updates.
    reference: The loss to compare with.
    min_scale: Lower bound of the scale, in [0, 1].
    max_scale: Upper bound of the scale, at least 1.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose `update` needs the loss as
    keyword `value`. A NaN or infinite loss leaves state and scale as they are.

  Raises:
    ValueError: If an argument is out of its range, or the bounds leave nothing
      of the effect (power > 0 against the best loss never goes below 1).
    TypeError: At `update`, if `value` is missing.

  >>> tx = optax.chain(optax.scale_by_adam(), scale_by_loss_ratio(power=0.5,
  ...                  decay=0.0), optax.scale_by_learning_rate(1e-3))
  >>> params = jnp.ones(2)
  >>> state = tx.init(params)
  >>> for loss in (4.0, 1.0):
  ...   updates, state = tx.update(params, state, params, value=loss)
  >>> print(state[1].rate_scale)
  0.5
  """
  _check_arguments(power, decay, reference, min_scale, max_scale)

  def init_fn(params):
    return ScaleByLossRatioState(
      ema=init_ema(),
      reference=jnp.zeros((), jnp.float32),
      rate_scale=jnp.ones((), jnp.float32),
      scope=scope_of(params),
    )

  def follow(state, value):
    ema = update_ema(state.ema, value, decay)
    mean = ema_value(ema)
    level = state.reference
    if reference == "best":
      level = jnp.minimum(level, mean)
    level = jnp.where(state.ema.weight == 0, mean, level)
    ratio = safe_ratio(
      jnp.maximum(mean, 0.0), jnp.maximum(level, 0.0), default=1.0
    )
    scale = jnp.clip(ratio**power, min_scale, max_scale)
    return state._replace(
      ema=ema, reference=level, rate_scale=scale.astype(jnp.float32)
    )

  def update_fn(updates, state, params=None, *, value=None, **extra_args):
    del params, extra_args
    value = as_loss(value, "scale_by_loss_ratio")
    state = select_tree(jnp.isfinite(value), follow(state, value), state)
    return scale_tree(updates, state.rate_scale), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def as_loss(value: jax.typing.ArrayLike | None, name: str) -> Scalar:
  """Returns the loss in float32, or says what the transform lacks.

  Args:
    value: What `update` was given: a scalar.
    name: The transform that asks, for the message.

  Returns:
    A float32 scalar; NaN and infinities pass.

  Raises:
    TypeError: If there is no value.
    ValueError: If it is no scalar.
  """
  if value is None:
    raise TypeError(
      f"{name} needs the loss: call "
      "tx.update(grads, opt_state, params, value=loss)."
    )
  if jnp.shape(value) != ():
    raise ValueError(f"value must be a scalar, got {jnp.shape(value)=}.")
  return jnp.asarray(value, jnp.float32)


def _check_arguments(power, decay, reference, min_scale, max_scale) -> None:
  """Checks what is known now; injected hyperparameters are arrays."""
  require_in("(-inf, inf)", power=power)
  require_in("[0, 1)", decay=decay)
  require_one_of(("initial", "best"), reference=reference)
  require_in("[0, 1]", min_scale=min_scale)
  require_in("[1, inf)", max_scale=max_scale)
  known = is_number(power) and is_number(max_scale)
  if reference == "best" and known and power > 0 and max_scale == 1:
    raise ValueError(
      "power must be negative with reference='best' and max_scale=1 (the ratio "
      f"is never below 1), got {power=}."
    )
