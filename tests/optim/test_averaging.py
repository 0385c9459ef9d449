"""`anytime_average` against the weighted mean of the iterates."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.optim.averaging import anytime_average, averaged_params
from deepseek_jax.optim.rates import scale_by_rate
from deepseek_jax.optim.readback import learning_rates

PARAMS = {
  "head": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
  "trunk": {"kernel": jnp.ones((2, 2))},
}
in_head = {"head": True, "trunk": False}


def weights(steps, fraction):
  """The weight of each iterate in NumPy and float64, straight from the rule."""
  rates = 1 / (1 + fraction * np.arange(steps, dtype=np.float64))
  result = np.zeros(steps)
  for t, rate in enumerate(rates):
    result *= 1 - rate
    result[t] = rate
  return result


def noisy(steps, noise=1.0):
  """A gradient a step, of 16 elements: a drift of their own and noise."""
  random = np.random.default_rng(0)
  drift = np.linspace(-0.1, 0.1, 16)
  grads = drift + noise * random.normal(size=(steps, 16))
  return jnp.asarray(grads, jnp.float32)


def run(tx, grads, dtype=jnp.float32, start=0.0):
  """Runs over the gradients; returns iterates (float64), average and state."""

  def step(carry, grad):
    params, state = carry
    updates, state = tx.update(grad.astype(dtype), state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  @jax.jit
  def all_steps(params, grads):
    carry = params, tx.init(params)
    (params, state), iterates = jax.lax.scan(step, carry, grads)
    return iterates, averaged_params(state, params), state

  params = jnp.full(grads.shape[1:], start, dtype)
  iterates, average, state = all_steps(params, grads)
  return np.asarray(iterates, np.float64), average, state


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("make", [optax.sgd, optax.adam])
def test_is_the_weighted_mean_of_the_iterates(make, fraction):
  tx = anytime_average(make(0.1), fraction)
  iterates, average, _ = run(tx, noisy(60))
  expected = weights(60, fraction) @ iterates
  np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)


def test_the_updates_are_those_of_the_inner_transform():
  grads = noisy(20)
  averaged, *_ = run(anytime_average(optax.adam(0.1)), grads)
  plain, *_ = run(optax.adam(0.1), grads)
  np.testing.assert_allclose(averaged, plain, rtol=1e-5, atol=1e-6)


def test_the_ends_are_the_plain_mean_and_the_latest_iterate():
  np.testing.assert_allclose(weights(50, 1.0), 1 / 50)
  np.testing.assert_array_equal(weights(50, 0.0), np.eye(50)[-1])


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_looks_back_in_proportion_to_the_length_of_the_run(fraction):
  # Under a constant drift of 1 a step, the displacement is the mean age.
  tx = anytime_average(optax.sgd(1.0), fraction)
  for steps in (500, 2_000):
    *_, state = run(tx, jnp.ones((steps, 1)))
    age = steps * fraction / (1 + fraction)
    np.testing.assert_allclose(state.displacement, age, rtol=0.02)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("noise", "steps"), [(1.0, 2_000), (0.01, 20_000)])
def test_a_narrow_displacement_follows_a_long_run(dtype, noise, steps):
  tx = anytime_average(optax.sgd(0.01), dtype=dtype)
  iterates, average, state = run(tx, noisy(steps, noise), start=100.0)
  assert state.displacement.dtype == dtype
  expected = weights(steps, 0.1) @ iterates
  gap = np.abs(expected - iterates[-1]).max()
  assert np.abs(average - expected).max() < 0.03 * gap


def test_bfloat16_rounded_to_the_nearest_would_not_follow():
  # Why there is a displacement, and why its rounding is spread.
  steps = 20_000
  tx = anytime_average(optax.sgd(0.01))
  iterates, *_ = run(tx, noisy(steps, 0.01), start=100.0)
  expected = weights(steps, 0.1) @ iterates
  keep = 1 - 1 / (1 + 0.1 * np.arange(steps))
  moves = np.diff(iterates, axis=0, prepend=100.0)

  def step(carry, found):
    average, d = carry
    keep, iterate, move = found
    average = keep * average + (1 - keep) * iterate
    d = keep * (d - move)
    return (average.astype(jnp.bfloat16), d.astype(jnp.bfloat16)), None

  carry = (jnp.full(16, 100, jnp.bfloat16), jnp.zeros(16, jnp.bfloat16))
  found = jax.tree.map(jnp.float32, (keep, iterates, moves))
  (average, d), _ = jax.jit(
    lambda carry, found: jax.lax.scan(step, carry, found)
  )(carry, found)
  gap = np.abs(expected - iterates[-1]).max()
  for naive in (average, iterates[-1] + d):
    assert np.abs(naive - expected).max() > 0.5 * gap


def test_a_narrow_displacement_fades_when_the_iterate_stands_still():
  tx = anytime_average(optax.sgd(0.01), dtype=jnp.bfloat16)
  grads = noisy(20_000).at[10_000:].set(0.0)
  iterates, _, state = run(tx, grads)
  halfway = np.abs(weights(10_000, 0.1) @ iterates[:10_000] - iterates[-1])
  assert np.abs(state.displacement).max() < 2e-3 * halfway.max()


def test_averages_the_parameters_as_stored():
  # Most updates are lost to the rounding of parameters around 1.
  tx = anytime_average(optax.sgd(3e-3), 0.2)
  iterates, average, state = run(tx, noisy(300), jnp.bfloat16, start=1.0)
  expected = weights(300, 0.2) @ iterates
  assert average.dtype == state.displacement.dtype == jnp.bfloat16
  found = iterates[-1] + np.asarray(state.displacement, np.float64)
  np.testing.assert_allclose(found, expected, atol=2e-3)
  *_, state = run(tx, jnp.full((300, 2), 0.1), jnp.bfloat16, start=1.0)
  np.testing.assert_array_equal(state.displacement, 0.0)


def test_float16_near_zero_does_not_drift():
  # Parameters and steps below float16's normal range.
  tx = anytime_average(optax.sgd(1e-6), 0.5)
  iterates, _, state = run(tx, noisy(2_000), jnp.float16)
  expected = weights(2_000, 0.5) @ iterates - iterates[-1]
  np.testing.assert_allclose(state.displacement, expected, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("with_params", [True, False])
def test_what_is_not_finite_stays_out(bad, with_params):
  tx = anytime_average(optax.sgd(1.0))
  params = jnp.ones(2)
  state = tx.init(params)
  for grad in (1.0, 2.0, bad, 1.0):
    grads = jnp.array([grad, 1.0])
    _, state = tx.update(grads, state, params if with_params else None)
    displacement = optax.tree.get(state, "displacement")
    assert np.isfinite(displacement).all()
  assert displacement[0] != 0


def test_a_displacement_that_overflows_stays_as_it_was():
  tx = anytime_average(optax.identity(), 1.0)
  *_, state = run(tx, jnp.full((9, 1), 3e4), jnp.float16, start=-6e4)
  assert np.isfinite(state.displacement).all()


def constant(tx):
  """A step with gradients of 1 on `PARAMS`, and the state to start with."""

  @jax.jit
  def step(params, state):
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params, value=1.0, other=0)
    return optax.apply_updates(params, updates), state

  return step, tx.init(PARAMS)


sgd = functools.partial(optax.sgd, 1.0)
mean = lambda inner=None: anytime_average(inner or sgd(), 1.0)
by_head = {"head": "head", "trunk": "rest"}
NESTED = {
  "alone": (mean(), (True, True)),
  "chain": (optax.chain(optax.clip(9.0), mean()), (True, True)),
  "named_chain": (optax.named_chain(("average", mean())), (True, True)),
  "injected": (
    optax.inject_hyperparams(anytime_average)(sgd(), fraction=1.0),
    (True, True),
  ),
  "masked": (
    optax.chain(
      optax.masked(mean(), in_head),
      optax.masked(optax.scale(-1.0), {"head": False, "trunk": True}),
    ),
    (True, False),
  ),
  "partition": (
    optax.partition({"head": mean(), "rest": sgd()}, by_head),
    (True, False),
  ),
  "two_partitions": (
    optax.partition({"head": mean(), "rest": mean()}, by_head),
    (True, True),
  ),
  "in_a_wrapper": (optax.apply_if_finite(mean(), 3), (True, True)),
  "none": (sgd(), (False, False)),
}


@pytest.mark.parametrize("name", NESTED)
def test_is_found_wherever_it_stands(name):
  tx, (head, trunk) = NESTED[name]
  step, state = constant(tx)
  params = PARAMS
  for _ in range(3):
    params, state = step(params, state)
  for read in (averaged_params, jax.jit(averaged_params)):
    average = read(state, params)
    # Iterates 0, -1, -2.
    assert jax.tree.structure(average) == jax.tree.structure(params)
    for part, covered in (("head", head), ("trunk", trunk)):
      for leaf in jax.tree.leaves(average[part]):
        np.testing.assert_allclose(leaf, -1.0 if covered else -2.0, atol=1e-6)


def test_averages_once_per_update_inside_multi_steps():
  step, state = constant(optax.MultiSteps(mean(), 3))
  params = PARAMS
  for _ in range(9):
    params, state = step(params, state)
  average = averaged_params(state, params)
  assert params["head"]["bias"][0] == -2
  assert average["head"]["bias"][0] == -1


def test_params_come_back_as_they_are_without_an_average():
  assert averaged_params(optax.adam(1.0).init(PARAMS), PARAMS) is PARAMS


def test_two_averages_of_a_parameter_are_named():
  for tx in (mean(mean()), optax.chain(mean(), optax.masked(mean(), in_head))):
    with pytest.raises(ValueError, match=r"two of \['head/bias'"):
      averaged_params(tx.init(PARAMS), PARAMS)


def test_a_state_of_other_parameters_is_named():
  with pytest.raises(ValueError, match=r"\['trunk/kernel'\], which they lack"):
    averaged_params(mean().init(PARAMS), {"head": PARAMS["head"]})


def test_learning_rates_are_read_through_it():
  tx = anytime_average(scale_by_rate(0.5))
  rates = learning_rates(tx.init(PARAMS), PARAMS)
  assert set(map(float, rates.values())) == {0.5}


def test_vmap_averages_each_row():
  tx = mean()
  params = jnp.arange(6.0).reshape(3, 2)

  def average(params):
    state = tx.init(params)
    for _ in range(3):
      updates, state = tx.update(params, state, params)
      params = optax.apply_updates(params, updates)
    return averaged_params(state, params)

  rows = [average(row) for row in params]
  np.testing.assert_allclose(jax.vmap(average)(params), jnp.stack(rows))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"fraction": -0.1}, r"fraction must be in \[0, 1\], got fraction=-0.1"),
    ({"fraction": 1.5}, "fraction must"),
    ({"fraction": math.nan}, "fraction must"),
    ({"dtype": jnp.int8}, "dtype must be a floating dtype or None"),
  ],
)
def test_arguments_out_of_range_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    anytime_average(optax.sgd(0.1), **arguments)
