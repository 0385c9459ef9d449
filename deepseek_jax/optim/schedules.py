"""Schedules that Optax lacks."""

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import is_number
from deepseek_jax.optim.rates import check_rate


def warmup(
  learning_rate: jax.typing.ArrayLike | optax.Schedule,
  steps: jax.typing.ArrayLike,
) -> optax.Schedule:
  """Raises any learning rate or schedule linearly over the first steps.

  η(t)·min(1, (t + 1) / steps), with t the number of updates done. Unlike
  `optax.warmup_constant_schedule` it starts at η/steps, so that the first
  update is not thrown away, and it wraps a schedule without shifting it: the
  warm-up is part of the schedule's length, not added to it. For the usual
  warm-up and cosine decay, `optax.warmup_cosine_decay_schedule` will do.

  Args:
    learning_rate: The rate after warm-up, or a schedule of it.
    steps: Updates until the full rate, at least 0; 0 and 1 mean no warm-up.

  Returns:
    A schedule.

  Raises:
    ValueError: If an argument is out of its range.

  >>> schedule = warmup(1.0, steps=4)
  >>> print(*(float(schedule(t)) for t in range(6)))
  0.25 0.5 0.75 1.0 1.0 1.0
  """
  check_rate(learning_rate)
  if is_number(steps) and not (steps >= 0 and steps == int(steps)):
    raise ValueError(f"steps must be a whole number, at least 0, got {steps=}.")

  def schedule(count):
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    done = (jnp.asarray(count, jnp.float32) + 1) / jnp.maximum(steps, 1)
    return rate * jnp.minimum(1.0, done)

  return schedule
