"""Laws of schedules: every visit once, in order, handed on without waiting."""

import itertools

import jax
import numpy as np
import pytest

from deepseek_jax import parallel

SHAPES = [(1, 3, 1), (1, 2, 3), (2, 2, 1), (2, 4, 3), (3, 6, 2), (4, 8, 1)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape):
  stages, microbatches, repeats = shape
  return parallel.Schedule(
    stages=stages, microbatches=microbatches, repeats=repeats
  )


def visits(shape):
  """(group of layers, micro-batch) -> tick, of all visits that count."""
  stages = shape[0]
  plan = make(shape).plan()
  found = {}
  for stage, tick in np.argwhere(plan.is_working):
    group = plan.repeat[stage, tick] * stages + stage
    key = int(group), int(plan.microbatch[stage, tick])
    assert key not in found
    found[key] = int(tick)
  return found


@each_shape
def test_every_group_visits_every_microbatch_once_and_in_order(shape):
  stages, microbatches, repeats = shape
  found = visits(shape)
  everything = itertools.product(range(stages * repeats), range(microbatches))
  assert set(found) == set(everything)
  for group in range(stages * repeats):
    ticks = [found[group, m] for m in range(microbatches)]
    assert ticks == sorted(ticks)


@each_shape
def test_what_is_handed_on_is_taken_in_the_next_tick(shape):
  stages, _, repeats = shape
  found = visits(shape)
  for (group, microbatch), tick in found.items():
    if group + 1 < stages * repeats:
      assert found[group + 1, microbatch] == tick + 1


@each_shape
def test_the_bubble_is_what_is_idle_in_the_plan(shape):
  stages, microbatches, repeats = shape
  plan = make(shape).plan()
  idle = 1 - plan.is_working.mean()
  assert abs(parallel.bubble(stages, microbatches, repeats) - idle) < 1e-12
  assert ((plan.repeat >= 0) & (plan.repeat < repeats)).all()


def test_traced_numbers_give_the_same_plan():
  schedule = make((3, 6, 2))
  stages = np.arange(3)[:, None]
  ticks = np.arange(schedule.ticks)[None]
  found = jax.jit(lambda *at: schedule.visit(*at))(ticks, stages)
  for one, other in zip(found, schedule.plan(), strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_circular_schedule_is_drawn_with_letters():
  assert str(make((2, 2, 2))).splitlines() == [
    "stage 0 | 0a  1a  0b  1b  .",
    "stage 1 | .   0a  1a  0b  1b",
    "2 stages, 2 micro-batches, 2 repeats: 5 ticks, of which a stage idles "
    "20.0 %",
  ]


@pytest.mark.parametrize(
  ("shape", "said"),
  [
    ((0, 2, 1), "^stages must be .*got stages=0"),
    ((2, 2, 0), "^repeats must be .*got repeats=0"),
    ((4, 6, 1), "^microbatches must be a multiple .*microbatches=6 for 4 st"),
    ((4, 2, 1), "microbatches=2 for 4 stages"),
  ],
)
def test_numbers_that_make_no_schedule_are_named(shape, said):
  with pytest.raises(ValueError, match=said):
    make(shape)


@pytest.mark.parametrize(
  ("shape", "said"),
  [
    ((4, -3, 1), "microbatches must be .* got microbatches=-3"),
    ((0, 0, 1), "stages must be .* got stages=0"),
    ((2, 2, 0), "repeats must be .* got repeats=0"),
  ],
)
def test_numbers_that_have_no_bubble_are_named(shape, said):
  with pytest.raises(ValueError, match=said):
    parallel.bubble(*shape)
