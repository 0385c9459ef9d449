"""Schedules against their formulas in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import optim
from deepseek_jax.optim.schedules import warmup_stable_decay, warmup_step

TIMES = np.arange(60)
FALLS = {
  "linear": lambda x: 1 - x,
  "sqrt": lambda x: 1 - np.sqrt(x),
  "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}


def ramp(steps):
  return np.minimum(1, (TIMES + 1) / max(steps, 1))


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0])
def test_step_equals_its_formula(warmup_steps, factor):
  schedule = warmup_step(0.3, warmup_steps, [7, 20, 21], factor)
  drops = sum(boundary <= TIMES for boundary in (7, 20, 21))
  expected = 0.3 * ramp(warmup_steps) * factor**drops
  np.testing.assert_allclose(schedule(TIMES), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", FALLS)
@pytest.mark.parametrize(
  ("warmup_steps", "decay_fraction", "decay_steps", "end"),
  [(0, 0.2, 10, 0.0), (5, 0.5, 25, 0.1), (0, 1.0, 50, 0.0), (49, 1e-9, 1, 0.5)],
)
def test_stable_decay_equals_its_formula(
  shape, warmup_steps, decay_fraction, decay_steps, end
):
  schedule = warmup_stable_decay(
    0.3,
    50,
    warmup_steps=warmup_steps,
    decay_fraction=decay_fraction,
    shape=shape,
    end=end,
  )
  x = np.clip((TIMES - 50 + decay_steps) / decay_steps, 0, 1)
  expected = 0.3 * ramp(warmup_steps) * (end + (1 - end) * FALLS[shape](x))
  np.testing.assert_allclose(schedule(TIMES), expected, rtol=1e-5, atol=1e-7)
  assert schedule(49) > schedule(50) == schedule(59)


@pytest.mark.parametrize("shape", FALLS)
def test_the_flat_part_does_not_depend_on_the_length(shape):
  short, long = (
    warmup_stable_decay(0.3, total, warmup_steps=4, shape=shape)
    for total in (50, 1000)
  )
  flat = np.arange(40)
  np.testing.assert_array_equal(short(flat), long(flat))


@pytest.mark.parametrize(
  "make",
  [
    lambda rate: warmup_step(rate, 2, [4]),
    lambda rate: warmup_stable_decay(rate, 10, warmup_steps=2, shape="sqrt"),
  ],
)
def test_many_rates_can_be_tried_at_once(make):
  rates = jnp.array([0.1, 0.2])

  def rate_after_three(rate):
    tx = optim.scale_by_rate(make(rate))
    state = tx.init(jnp.ones(2))
    for _ in range(3):
      _, state = tx.update(jnp.ones(2), state)
    return state.learning_rate

  with jax.debug_nans(True):
    read = jax.jit(jax.vmap(rate_after_three))(rates)
  np.testing.assert_allclose(read, rates, rtol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((-0.1, 0, [5]), "learning_rate must"),
    ((0.1, -1, [5]), "warmup_steps must be an integer, at least 0, got"),
    ((0.1, 0, []), "boundaries must be positive"),
    ((0.1, 0, [0, 5]), "boundaries must be positive"),
    ((0.1, 0, [5, 5]), r"increase, got boundaries=\[5, 5\]"),
    ((0.1, 0, [6, 5]), "increase"),
    ((0.1, 6, [5]), "before the warm-up is over.*warmup_steps=6"),
    ((0.1, 0, [5], 0.0), "factor must"),
    ((0.1, 0, [5], 1.5), r"factor must be in \(0, 1\], got factor=1.5"),
    ((0.1, 0, [5], math.nan), "factor must"),
  ],
)
def test_steps_that_do_not_fit_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    warmup_step(*arguments)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"learning_rate": math.inf}, "learning_rate must"),
    ({"total_steps": 0}, "total_steps must be an integer, at least 1"),
    ({"warmup_steps": -1}, "warmup_steps must be an integer"),
    ({"decay_fraction": 0.0}, "decay_fraction must"),
    ({"decay_fraction": 1.1}, r"in \(0, 1\], got decay_fraction=1.1"),
    ({"decay_fraction": math.nan}, "decay_fraction must"),
    ({"end": -0.1}, "end must"),
    ({"end": 2}, r"end must be in \[0, 1\], got end=2"),
    ({"warmup_steps": 9}, "must fit.*warmup_steps=9 and decay_steps=2"),
    ({"warmup_steps": 1, "decay_fraction": 1}, "must fit"),
  ],
)
def test_phases_that_do_not_fit_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    warmup_stable_decay(
      **({"learning_rate": 0.1, "total_steps": 10} | settings)
    )
