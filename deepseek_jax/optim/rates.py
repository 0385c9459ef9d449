"""The learning rate as a transform whose state can be read back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import require_in, scale_tree
from deepseek_jax.core.typing import Count, PyTree, Scalar
from deepseek_jax.optim.readback import scope_of


class ScaleByRateState(NamedTuple):
  """State of `scale_by_rate`."""

  count: Count  # shape=(), dtype=int32: updates done
  learning_rate: Scalar  # shape=(), dtype=float32: of the latest update
  scope: PyTree  # the covered leaves; no arrays


def scale_by_rate(
  learning_rate: jax.typing.ArrayLike | optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
  """Multiplies updates by minus the learning rate, and remembers the rate.

  u ← -η(t)·u. Like `optax.scale_by_learning_rate`, whose state holds no rate;
  use it as the last part of a chain that `learning_rates` should read.

  Args:
    learning_rate: The rate, at least 0, or a schedule from the number of
      updates done to the rate.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: If the rate is negative, infinite or NaN.

  >>> tx = scale_by_rate(optax.linear_schedule(1.0, 0.0, 4))
  >>> state = tx.init(jnp.zeros(2))
  >>> updates, state = tx.update(jnp.ones(2), state)
  >>> updates, state = tx.update(jnp.ones(2), state)
  >>> print(updates, state.learning_rate)
  [-0.75 -0.75] 0.75
  """
  check_rate(learning_rate=learning_rate)

  def rate_at(count):
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    return jnp.asarray(rate, jnp.float32)

  def init_fn(params):
    count = jnp.zeros((), jnp.int32)
    return ScaleByRateState(count, rate_at(count), scope_of(params))

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    rate = rate_at(state.count)
    new_state = state._replace(
      count=optax.safe_increment(state.count), learning_rate=rate
    )
    return scale_tree(updates, -rate), new_state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_rate(**rates: Any) -> None:
  """Refuses what can be neither a learning rate nor a schedule of one."""
  numbers = {name: rate for name, rate in rates.items() if not callable(rate)}
  require_in("[0, inf)", **numbers)
