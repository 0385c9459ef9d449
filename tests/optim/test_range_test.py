"""The range test where theory says which rates are stable."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import optim
from deepseek_jax.optim.range_test import learning_rate_range_test

NOISE = np.random.default_rng(0).normal(size=(201, 16)).astype(np.float32)


def quadratic(curvature):
  """A loss whose batches are noisy minima."""
  return lambda params, batch: 0.5 * curvature * jnp.mean((params - batch) ** 2)


def grid_factor(low, high, steps):
  return (high / low) ** (1 / (steps - 1))


@pytest.mark.parametrize("curvature", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("decay", [0.0, 0.8, 0.95])
def test_sgd_without_noise_is_stable_to_two_over_the_curvature(
  curvature, decay
):
  test = learning_rate_range_test(
    optax.sgd,
    quadratic(curvature),
    jnp.ones(()),
    [jnp.zeros(1)],
    low=1e-4,
    high=1e3,
    decay=decay,
  )
  factor = grid_factor(1e-4, 1e3, 100)
  assert 1 / factor <= test.largest_stable * curvature / 2 <= factor
  assert test.diverged
  assert test.suggestion <= test.largest_stable


@pytest.mark.parametrize("curvature", [0.1, 100.0])
@pytest.mark.parametrize("steps", [60, 200])
def test_sgd_with_noise_is_stable_to_two_over_the_curvature(curvature, steps):
  test = learning_rate_range_test(
    optax.sgd, quadratic(curvature), jnp.ones(()), NOISE, high=1e3, steps=steps
  )
  factor = grid_factor(1e-6, 1e3, steps)
  assert factor**-3 <= test.largest_stable * curvature / 2 <= factor**3
  assert test.diverged


def test_the_suggestion_is_where_the_loss_falls_fastest():
  # From far away, the rate at which the smoothed loss falls most is one that
  # contracts: rate times curvature is below 1, and not tiny.
  test = learning_rate_range_test(
    optax.sgd, quadratic(2.0), jnp.full((), 30.0), NOISE, steps=100
  )
  assert 0.02 < 2.0 * test.suggestion < 1.0


def test_losses_are_those_that_follow_the_update():
  rates = np.geomspace(1e-3, 1.0, 10)
  test = learning_rate_range_test(
    optax.sgd,
    quadratic(1.0),
    jnp.ones(()),
    [jnp.zeros(1)],
    low=1e-3,
    high=1.0,
    steps=10,
    decay=0.5,
  )
  losses = 0.5 * np.cumprod(np.concatenate([[1], 1 - rates])) ** 2
  weights = [0.5 ** np.arange(n, -1, -1) for n in range(11)]
  means = [w @ losses[: len(w)] / w.sum() for w in weights]
  np.testing.assert_allclose(test.rates, rates)
  np.testing.assert_allclose(test.losses, losses[1:], rtol=1e-4, atol=1e-12)
  np.testing.assert_allclose(test.smoothed, means[1:], rtol=1e-4)
  assert not test.diverged
  assert test.largest_stable == pytest.approx(1.0)


@pytest.mark.parametrize(
  "make_tx",
  [
    optim.deepseek,
    optax.adamw,
    optax.inject_hyperparams(optax.adam),
    lambda rate: optax.chain(
      optim.scale_by_loss_ratio(0.5), optim.scale_by_rate(rate)
    ),
  ],
)
def test_compiles_once_and_leaves_the_parameters_alone(make_tx):
  traces = []

  def loss(params, batch):
    traces.append(1)
    return jnp.mean((params["a"] * batch - params["b"]) ** 2)

  params = {"a": jnp.ones(()), "b": np.ones((), np.float32)}
  test = learning_rate_range_test(
    make_tx, loss, params, iter(NOISE), high=0.1, steps=12
  )
  assert len(traces) == 1
  assert len(test.rates) == len(test.losses) == 12
  assert float(params["a"]) == float(params["b"]) == 1.0


def test_a_loss_that_is_not_finite_ends_the_test():
  # Past a radius of 2 the loss is NaN.
  loss = lambda params, batch: jnp.sqrt(4 - params**2) + batch
  test = learning_rate_range_test(
    optax.sgd, loss, jnp.ones(()), [jnp.ones(())], high=100.0, steps=30
  )
  assert test.diverged
  assert len(test.rates) == len(test.losses) < 30
  assert np.all(np.isfinite(test.losses + test.smoothed))


def test_a_loss_that_never_falls_suggests_nothing():
  test = learning_rate_range_test(
    optax.sgd,
    lambda params, batch: jnp.mean(params**2),
    jnp.zeros(2),
    [0.0],
    steps=10,
  )
  assert np.isnan(test.suggestion)
  assert "nan" in str(test)


def test_negative_losses_can_fall_without_divergence():
  loss = lambda params, batch: jnp.mean((params - batch) ** 2) - 100.0
  test = learning_rate_range_test(
    optax.sgd, loss, jnp.ones(()), NOISE, high=0.3, steps=30
  )
  assert not test.diverged
  assert len(test.rates) == 30


def test_prints_a_short_table():
  test = learning_rate_range_test(
    optax.sgd, quadratic(1.0), jnp.ones(()), NOISE, steps=40
  )
  head, *rows, suggestion, stable = str(test).splitlines()
  assert head.split() == ["rate", "loss", "smoothed"]
  assert len(rows) == 10
  assert float(rows[0].split()[0]) == pytest.approx(1e-6)
  assert f"{test.suggestion:.2e}" in suggestion
  assert f"{test.largest_stable:.2e} (loss diverged)" in stable
  with pytest.raises(dataclasses.FrozenInstanceError):
    test.suggestion = 1.0


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"low": 1.0, "high": 1.0}, r"high must be in \(1.0, inf\), got high=1.0"),
    ({"low": 0.0}, r"low must be in \(0, inf\)"),
    ({"high": float("inf")}, "high must"),
    ({"steps": 9}, "steps must be an integer, at least 10, got steps=9"),
    ({"decay": 1.0}, "decay must"),
    ({"divergence": 1.0}, r"in \(1, inf\], got divergence=1.0"),
    ({"batches": []}, "batches must last"),
    ({"batches": iter(NOISE[:12]), "steps": 12}, "batches must last"),
    ({"loss": lambda params, batch: params * jnp.nan}, "loss must be finite"),
  ],
)
def test_arguments_out_of_range_are_named(settings, message):
  arguments = {
    "loss": quadratic(1.0),
    "params": jnp.ones(()),
    "batches": NOISE,
  }
  with pytest.raises(ValueError, match=message):
    learning_rate_range_test(optax.sgd, **(arguments | settings))


def test_sharded_parameters_stay_where_they_are():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  place = jax.sharding.NamedSharding(mesh, jax.P("x"))
  loss = lambda params, batch: jnp.mean((params - batch) ** 2)
  plain, sharded = (
    learning_rate_range_test(
      optim.deepseek, loss, params, [jnp.zeros(8)], steps=10
    )
    for params in (jnp.ones(8), jax.device_put(jnp.ones(8), place))
  )
  np.testing.assert_allclose(sharded.losses, plain.losses, rtol=1e-5)
