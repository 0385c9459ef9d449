"""Workers that meet one by one, against their rule in NumPy."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exchanges import assert_equal
from walks import (
  RATE,
  SHAPES,
  STEPS,
  WORKERS,
  Walk,
  Walker,
  assert_same_walk,
  saved,
  targets,
)

from deepseek_jax import comm
from deepseek_jax.comm.asynchronous import Clock, _tick

SPEEDS = (1.0, 0.5, 0.75, 0.25)
EQUAL = (1.0,) * WORKERS
COMPRESSION = comm.int_all_reduce("data", block=8, min_size=8)
CASES = {
  "even": {"speeds": SPEEDS, "period": 4},
  "uneven": {"speeds": SPEEDS, "period": 2, "even": False},
  "bounded": {
    "speeds": (1.0, 1.0, 1.0, 0.25),
    "period": 1,
    "max_staleness": 0,
    "even": False,
  },
  "equal": {"speeds": EQUAL, "period": 3, "momentum": 0.0, "outer_rate": 1.0},
  "compressed": {
    "speeds": EQUAL,
    "period": 3,
    "momentum": 0.0,
    "outer_rate": 1.0,
    "compression": COMPRESSION,
  },
}


@functools.cache
def walker(name):
  return Walker(comm.asynchronous(optax.sgd(RATE), "data", **CASES[name]))


@functools.cache
def walk(name):
  return walker(name)(targets())


def hand_ins(speeds, period, ticks, max_staleness=4, even=True, **_):
  """Who steps and who hands in at every tick, one worker after the other."""
  lengths = [max(1, math.ceil(period * s)) if even else period for s in speeds]
  steps, rounds, found = [0] * len(speeds), [0] * len(speeds), []
  for tick in range(ticks):
    slowest, works, ready = min(rounds), [], []
    for w, speed in enumerate(speeds):
      due = math.floor((tick + 1) * speed) > math.floor(tick * speed)
      if due and rounds[w] - slowest <= max_staleness:
        works.append(w)
        steps[w] += 1
      if w in works and steps[w] == lengths[w]:
        ready.append(w)
        steps[w] = 0
        rounds[w] += 1
    found.append((works, ready))
  return found


def leaf_walk(goals, events, outer_rate=0.7, momentum=0.9, **_):
  shape = goals.shape[2:]
  common, m, waiting = np.ones(shape), np.zeros(shape), np.zeros(shape)
  workers = np.ones((WORKERS, *shape))
  begun, total, found = workers.copy(), 0, []
  for (works, ready), goal in zip(events, goals.astype(float), strict=True):
    for w in works:
      workers[w] -= RATE * (workers[w] - goal[w])
    share = sum((begun[w] - workers[w] for w in ready), 0 * common) / WORKERS
    waiting = waiting + share
    common = common - outer_rate * share
    if (total + len(ready)) // WORKERS > total // WORKERS:
      m, waiting = momentum * m + waiting, 0 * common
      common = common - outer_rate * momentum * m
    total += len(ready)
    for w in ready:
      workers[w] = begun[w] = common
    found.append((common, workers.copy()))
  return map(np.stack, zip(*found, strict=True))


@pytest.mark.parametrize("name", ["even", "uneven", "bounded", "equal"])
def test_equals_its_transcription(name):
  settings = CASES[name]
  events = hand_ins(ticks=STEPS, **settings)
  found = {
    name: leaf_walk(goals, events, **settings)
    for name, goals in targets().items()
  }
  params, workers = (
    dict(zip(found, values, strict=True))
    for values in zip(*found.values(), strict=True)
  )
  expected = Walk(params, None, workers, None, None)
  assert_same_walk(walk(name), expected, atol=4e-6)
  handed = [bool(ready) for _, ready in events]
  assert (walk(name).sent > 0).tolist() == handed
  moved = walk(name).updates["kernel"].reshape(STEPS, -1).any(-1)
  assert moved.tolist() == handed


@pytest.mark.parametrize("name", ["equal", "compressed"])
def test_equal_workers_meet_as_in_diloco(name):
  tx = comm.diloco(
    optax.sgd(RATE),
    "data",
    period=3,
    outer=optax.sgd(1.0),
    compression=CASES[name].get("compression"),
  )
  assert_same_walk(walk(name), Walker(tx)(targets()))


@pytest.mark.parametrize("name", ["uneven", "compressed"])
def test_a_walk_goes_on_from_saved_arrays_bit_for_bit(name):
  end = walk(name).end
  expected = walker(name)(targets(1), end)
  assert_equal(walker(name)(targets(1), saved(end)).end, expected.end)
  assert_equal(walker(name)(targets()).end, end)


@functools.cache
def clocks(speeds, period, bound, even, ticks=200):
  lengths = [max(1, math.ceil(period * s)) if even else period for s in speeds]
  rates = np.asarray(speeds, np.float32)
  none = jnp.zeros(len(speeds), jnp.int32)

  def step(clock, _):
    clock, *_ = _tick(clock, rates, np.asarray(lengths, np.int32), bound)
    return clock, clock

  start = Clock(none[0], none, none, none, none[0])
  return jax.jit(lambda: jax.lax.scan(step, start, length=ticks)[1])()


UNEVEN = [
  ((0.745, 0.765), 5, 0, True),  # The bound is reached.
  ((0.15, 0.648), 3, 1, False),
  ((1.0, 0.454, 0.447), 6, 0, True),
  ((1.0, 0.112, 0.843), 4, 1, False),
  ((1.0, 0.05, 0.508, 0.628), 1, 3, False),
]


@pytest.mark.parametrize(("speeds", "period", "bound", "even"), UNEVEN)
def test_no_worker_is_staler_than_the_bound(speeds, period, bound, even):
  found = clocks(speeds, period, bound, even)
  limit = 2 * (bound + 1) * (len(speeds) - 1)
  assert 0 < found.stalest[-1] <= limit
  if (period, bound) == (5, 0):
    assert found.stalest[-1] == limit
  ahead = found.rounds.max(1) - found.rounds.min(1)
  assert ahead.max() == bound + 1
  assert found.rounds[-1].min() > 0  # None waits for ever.


@pytest.mark.parametrize("bound", [0, 4])
def test_slow_workers_hand_in_as_often_with_less_work(bound):
  rounds = clocks((1.0, 0.5, 0.25, 0.1), 20, bound, True).rounds[-1]
  assert rounds.tolist() == [10, 10, 10, 10]
  alike = clocks((1.0, 0.5, 0.25, 0.1), 20, 99, False).rounds[-1]
  assert alike.tolist() == [10, 5, 2, 1]


def test_a_gradient_of_zeros_moves_nothing():
  still = {name: np.ones_like(x) for name, x in targets().items()}
  for name in ("even", "compressed"):
    found = walker(name)(still)
    for leaf in SHAPES:
      assert (found.params[leaf] == 1).all()
      assert (found.workers[leaf] == 1).all()


def test_gradients_that_are_not_finite_count_as_zero():
  goals = targets()
  goals["kernel"][5, 0, 2, 3] = np.nan
  goals["bias"][8, 0] = np.inf
  for name in ("uneven", "compressed"):
    found = walker(name)(goals)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.end))


def test_types_of_parameters_are_kept():
  tx = comm.asynchronous(
    optax.adam(0.1), "data", speeds=SPEEDS, period=2, compression=COMPRESSION
  )
  found = Walker(tx, jnp.bfloat16)(targets())
  for tree in (found.params, found.updates, found.workers):
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.bfloat16.dtype}


def test_the_order_of_speeds_is_that_of_the_devices():
  events = hand_ins(SPEEDS, 2, STEPS)
  steps = np.zeros(WORKERS, int)
  for w in itertools.chain.from_iterable(works for works, _ in events):
    steps[w] += 1
  assert steps.tolist() == [12, 6, 9, 3]
  workers = walk("even").workers["kernel"]
  at_first = (workers[0] != 1).any((1, 2))
  assert at_first.tolist() == [True, False, False, False]
