"""Schedules that Optax lacks.

Which one: with the length of the run known, a cosine is hard to beat and
Optax has it (`optax.warmup_cosine_decay_schedule`). Take
`warmup_stable_decay` when the length is not settled, or when one run should
give models of several lengths; `warmup_step` to reproduce a recipe that says
when the rate drops. All are functions of the number of updates done, made of
Optax's own pieces.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import (
  is_number,
  require_in,
  require_one_of,
  require_static,
  require_whole,
)
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
  check_rate(learning_rate=learning_rate)
  require_whole(0, steps=steps)

  def schedule(count):
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    done = (jnp.asarray(count, jnp.float32) + 1) / jnp.maximum(steps, 1)
    return rate * jnp.minimum(1.0, done)

  return schedule


def warmup_step(
  learning_rate: jax.typing.ArrayLike,
  warmup_steps: int,
  boundaries: Sequence[int],
  factor: int | float = 0.1,
) -> optax.Schedule:
  """Raises the rate linearly, then multiplies it by a factor at each boundary.

  η·min(1, (t + 1) / warmup_steps)·factor^(boundaries passed). The classic of
  convolutional networks, and the step decay of the published description. Its
  boundaries must be found for each task and length: without a recipe to
  follow, take a cosine.

  Args:
    learning_rate: The rate after warm-up, at least 0.
    warmup_steps: Updates until the full rate, at least 0; see `warmup`.
    boundaries: Updates done at each drop: whole numbers that increase, the
      first of them positive and not before the end of the warm-up.
    factor: Of the rate at a drop, in (0, 1].

  Returns:
    A schedule.

  Raises:
    ValueError: If an argument is out of its range, or the first drop comes
      before the warm-up is over.

  >>> schedule = warmup_step(1.0, 2, boundaries=[4, 6], factor=0.5)
  >>> print(*(float(schedule(t)) for t in range(8)))
  0.5 1.0 1.0 1.0 0.5 0.5 0.25 0.25

  References:
    Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour",
    2017, https://arxiv.org/abs/1706.02677
  """
  require_in("[0, inf)", learning_rate=learning_rate)
  require_static(0, warmup_steps=warmup_steps)
  _check_boundaries(boundaries, warmup_steps)
  require_in("(0, 1]", factor=factor)
  drops = optax.piecewise_constant_schedule(
    learning_rate, dict.fromkeys(boundaries, factor)
  )
  return warmup(drops, warmup_steps)


def warmup_stable_decay(
  learning_rate: jax.typing.ArrayLike,
  total_steps: int,
  *,
  warmup_steps: int = 0,
  decay_fraction: int | float = 0.2,
  shape: Literal["linear", "sqrt", "cosine"] = "linear",
  end: int | float = 0.0,
) -> optax.Schedule:
  """Raises the rate, holds it, and lets it fall over the last updates.

  η·min(1, (t + 1) / warmup_steps)·(end + (1 - end)·f(x)), with x running from
  0 to 1 over the last `decay_fraction` of the updates and f(x) = 1 - x
  (`"linear"`), 1 - √x (`"sqrt"`) or (1 + cos πx) / 2 (`"cosine"`).

  Until the fall begins nothing depends on `total_steps`: a checkpoint of the
  flat part can be trained on under a larger one, and each length costs the
  fall alone. Where the length is fixed, a cosine is as good and one choice
  less. The reference found 1 - √x to end a little lower than a line; we have
  not measured it.

  Args:
    learning_rate: The rate of the flat part, at least 0.
    total_steps: Updates of the whole run, at least 1; after them the rate
      stays where it ended.
    warmup_steps: Updates until the full rate, at least 0; see `warmup`.
    decay_fraction: Share of the run over which the rate falls, in (0, 1];
      0.1 to 0.2 is usual.
    shape: How it falls.
    end: Where it ends, as a share of `learning_rate`, in [0, 1].

  Returns:
    A schedule. The last update, `total_steps - 1`, is a step before `end`, so
    that no update is made at a rate of 0.

  Raises:
    ValueError: If an argument is out of its range, or warm-up and decay do not
      fit into `total_steps`.

  >>> schedule = warmup_stable_decay(1.0, 8, warmup_steps=2, decay_fraction=0.5)
  >>> print(*(float(schedule(t)) for t in range(9)))
  0.5 1.0 1.0 1.0 1.0 0.75 0.5 0.25 0.0

  References:
    Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with
    Scalable Training Strategies", 2024, https://arxiv.org/abs/2404.06395
    Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations", 2024, https://arxiv.org/abs/2405.18392
  """
  require_in("[0, inf)", learning_rate=learning_rate)
  require_static(1, total_steps=total_steps)
  require_static(0, warmup_steps=warmup_steps)
  require_in("(0, 1]", decay_fraction=decay_fraction)
  require_one_of(("linear", "sqrt", "cosine"), shape=shape)
  require_in("[0, 1]", end=end)
  decay_steps = max(1, round(decay_fraction * total_steps))
  if warmup_steps + decay_steps > total_steps:
    raise ValueError(
      "warmup_steps and the decay must fit into total_steps, got "
      f"{warmup_steps=} and {decay_steps=} with {total_steps=}."
    )
  fall = _falls(shape, decay_steps)
  share = optax.join_schedules(
    [optax.constant_schedule(1.0), lambda t: end + (1 - end) * fall(t)],
    [total_steps - decay_steps],
  )
  return warmup(lambda count: learning_rate * share(count), warmup_steps)


def _falls(shape: str, steps: int) -> optax.Schedule:
  """Returns a schedule from 1 to 0."""
  if shape == "linear":
    return optax.linear_schedule(1.0, 0.0, steps)
  if shape == "cosine":
    return optax.cosine_decay_schedule(1.0, steps)
  return lambda count: 1 - jnp.sqrt(jnp.clip(count / steps, 0, 1))


def _check_boundaries(boundaries: Sequence[int], warmup_steps: int) -> None:
  whole = all(is_number(b) and b > 0 and b % 1 == 0 for b in boundaries)
  increasing = all(a < b for a, b in itertools.pairwise(boundaries))
  if not (boundaries and whole and increasing):
    raise ValueError(
      "boundaries must be positive whole numbers that increase, got "
      f"{boundaries=}."
    )
  if boundaries[0] < warmup_steps:
    raise ValueError(
      "boundaries must not begin before the warm-up is over, got "
      f"{boundaries=} with {warmup_steps=}."
    )
