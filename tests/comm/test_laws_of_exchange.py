"""What every exchange obeys, wherever parameters lie."""

import math

import jax
import numpy as np
import pytest
from exchanges import (
  METHODS,
  PLACEMENTS,
  STEPS,
  assert_equal,
  gradients,
  held,
  joined,
  mean,
  prepared,
)

# What is asked by default: a method on more placements costs seconds, and the
# others of its kind go the same way there.
QUICK = {
  "data": METHODS,
  "fsdp": ("int8", "one_bit", "top_k", "power_sgd", "delayed"),
  "both": ("int8", "one_bit", "power_sgd"),
  "replica": ("int8", "power_sgd"),
}


def cases():
  for place, quick in QUICK.items():
    for method in METHODS:
      marks = [] if method in quick else [pytest.mark.slow]
      yield pytest.param(method, place, marks=marks, id=f"{method}-{place}")


each_case = pytest.mark.parametrize(("method", "place"), list(cases()))


def two_runs(run, grads, later):
  updates, state = run(grads)
  more, state = run(later, state)
  return updates, more, state


@each_case
def test_all_replicas_get_the_same_and_nothing_is_lost(method, place):
  run, at = prepared(method, place), PLACEMENTS[place]
  grads, later = (gradients(at.devices, seed=seed) for seed in range(2))
  updates, more, state = two_runs(run, grads, later)
  applied = [joined(at, x) for x in (updates, more)]
  wanted = [mean(x) for x in (grads, later)]
  unsent = held(at, state)
  for name in grads:
    total = sum(x[name].sum(0, dtype=np.float64) for x in applied)
    total = total + unsent.get(name, 0)
    exact = sum(x[name].sum(0) for x in wanted)
    size = np.abs(grads[name]).max()
    np.testing.assert_allclose(total, exact, rtol=0, atol=4e-6 * size)


@each_case
def test_a_run_goes_on_from_saved_arrays_bit_for_bit(method, place):
  run, at = prepared(method, place), PLACEMENTS[place]
  grads, later = (gradients(at.devices, seed=seed) for seed in range(2))
  _, state = run(grads)
  saved = jax.tree.map(np.array, state)
  expected = run(later, state)
  assert_equal(run(later, run.restore(saved)), expected)


@each_case
def test_what_is_not_finite_counts_as_zero(method, place):
  run, at = prepared(method, place), PLACEMENTS[place]
  bad, zeroed = gradients(at.devices), gradients(at.devices)
  places = {
    "first": [(0, 0, 3, 4), (1, 1, 0, 0), (STEPS - 1, 0, 11, 7)],
    "bias": [(1, 0, 2)],
    "conv": [(STEPS - 1, 1, 0, 1, 3, 0)],
  }
  values = [math.nan, math.inf, -math.inf]
  for name, where in places.items():
    for value, place_in in zip(values, where, strict=False):
      bad[name][place_in] = value
      zeroed[name][place_in] = 0
  # All of a device's gradient, as after a loss of NaN.
  bad["second"][2, 1], zeroed["second"][2, 1] = math.nan, 0
  found = run(bad)
  assert_equal(found, run(zeroed))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@each_case
def test_what_is_always_zero_stays_zero(method, place):
  run, at = prepared(method, place), PLACEMENTS[place]
  never = {"second": np.ones((12, 8), bool), "first": np.zeros((12, 8), bool)}
  never["first"][[0, 7]] = True  # Tokens that never come.
  if method != "power_sgd":
    never["first"][3, 2] = True
  states, found = None, []
  for seed in range(2):
    grads = gradients(at.devices, seed=seed)
    for name, where in never.items():
      grads[name] = np.where(where, np.float32(0), grads[name])
    updates, states = run(grads, states)
    found.append(joined(at, updates))
  for updates in found:
    for name, where in never.items():
      assert not updates[name][:, where].any()
  assert np.abs(found[1]["first"][:, ~never["first"]]).max() > 0


@each_case
def test_vectors_and_small_parameters_are_averaged_exactly(method, place):
  run, at = prepared(method, place), PLACEMENTS[place]
  grads = gradients(at.devices)
  updates = joined(at, run(grads)[0])
  late = 2 if method == "delayed" else 0
  for name in ("bias", "small"):
    exact = mean(grads)[name][: STEPS - late]
    np.testing.assert_allclose(
      updates[name][late:], exact, rtol=1e-6, atol=1e-6
    )
