"""`decay_weights` against Optax, and against solutions in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import optim
from deepseek_jax.optim.decay import decay_weights

PARAMS = {
  "bias": jnp.array([1.0, -2.0]),
  "kernel": jnp.array([[1.0, -2.0], [0.01, 0.0]]),
}
GRADS = {
  "bias": jnp.array([0.3, -0.1]),
  "kernel": jnp.array([[0.5, 0.2], [0.1, -0.1]]),
}
halving = lambda count: 0.4 * 0.5**count
in_bias = lambda tree: {"bias": True, "kernel": False}


def descend(tx, gradient, params, steps):
  def step(carry, _):
    params, state = carry
    updates, state = tx.update(gradient(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  scan = lambda carry: jax.lax.scan(step, carry, length=steps)[0]
  return jax.jit(scan)((params, tx.init(params)))[0]


def undecayed(rate):
  return optax.chain(optax.scale_by_adam(), optim.scale_by_rate(rate))


@pytest.mark.parametrize("rate", [0.1, halving], ids=["number", "schedule"])
@pytest.mark.parametrize("mask", [None, in_bias, in_bias(None), True])
def test_l2_is_optax_add_decayed_weights(rate, mask):
  ours = optax.chain(undecayed(rate), decay_weights(rate, l2=0.1, mask=mask))
  theirs = optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(
      0.1, mask=optim.matrices if mask is None else mask
    ),
    optim.scale_by_rate(rate),
  )
  a, b = (descend(tx, lambda _: GRADS, PARAMS, 4) for tx in (ours, theirs))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
  decayed = "bias" if mask else "kernel"
  free = descend(undecayed(rate), lambda _: GRADS, PARAMS, 4)
  assert not np.allclose(a[decayed], free[decayed], rtol=1e-3)


def soft_threshold(x, amount):
  return np.sign(x) * np.maximum(np.abs(x) - amount, 0.0)


@pytest.mark.parametrize("rate", [0.3, lambda t: 0.5 / (1 + 0.01 * t)])
@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_solves_the_lasso_of_an_orthonormal_design(rate, l2):
  # min ½|y - Xw|² + ½·l2·|w|² + l1·|w|₁ is S(Xᵀy, l1) / (1 + l2) if XᵀX = 1.
  random = np.random.default_rng(0)
  design, _ = np.linalg.qr(random.normal(size=(20, 8)))
  truth = np.array([3.0, -2.0, 1.0, 0.5, -0.3, 0.1, 0.0, 0.0])
  y = design @ truth + 0.1 * random.normal(size=20)
  expected = soft_threshold(design.T @ y, 0.6) / (1 + l2)
  x, y = jnp.asarray(design, jnp.float32), jnp.asarray(y, jnp.float32)[:, None]
  tx = optax.chain(
    optim.scale_by_rate(rate), decay_weights(rate, l2=l2, l1=0.6)
  )
  w = descend(tx, lambda w: x.T @ (x @ w - y), jnp.ones((8, 1)), 100)
  np.testing.assert_allclose(w[:, 0], expected, atol=1e-5)
  np.testing.assert_array_equal(w[:, 0] == 0, expected == 0)
  assert 3 <= np.sum(expected == 0) <= 5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zeros_are_exact_and_stay(dtype):
  random = np.random.default_rng(1)
  params, update = (
    jnp.asarray(scale * random.normal(size=(64, 4)), dtype)
    for scale in (1.0, 1e-3)
  )
  tx = decay_weights(0.1, l1=5.0, l2=0.1)
  state = tx.init(params)
  zeros = []
  for _ in range(3):
    updates, state = tx.update(update, state, params)
    assert updates.dtype == dtype
    params = optax.apply_updates(params, updates)
    zeros.append(int(jnp.sum(params == 0)))
  assert 0 < zeros[0] < zeros[1] < zeros[2] < params.size


def test_small_updates_keep_their_digits():
  # p' - p in float32 would keep two digits of an update of 1e-5 at p = 1000.
  params, update = jnp.full((1, 1), 1000.0), jnp.full((1, 1), 1.2345e-5)
  tx = decay_weights(0.1, l1=1e-5)
  updates, _ = tx.update(update, tx.init(params), params)
  np.testing.assert_allclose(updates, 1.1345e-5, rtol=1e-5)


def test_vectors_are_left_alone_by_default():
  tx = decay_weights(1.0, l1=0.5, l2=0.5)
  updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  assert updates["bias"] is GRADS["bias"]
  assert not np.array_equal(updates["kernel"], GRADS["kernel"])


def test_the_rate_is_not_counted_twice_when_read_back():
  tx = optax.inject_hyperparams(
    lambda learning_rate: optax.chain(
      optim.scale_by_rate(learning_rate), decay_weights(learning_rate, l1=0.1)
    )
  )(learning_rate=0.5)
  rates = optim.learning_rates(tx.init(PARAMS), PARAMS)
  assert set(map(float, rates.values())) == {0.5}


def test_missing_params_are_named():
  tx = decay_weights(0.1, l1=0.1)
  with pytest.raises(ValueError, match="decay_weights needs params"):
    tx.update(GRADS, tx.init(PARAMS))


@pytest.mark.parametrize("name", ["rate", "l1", "l2"])
@pytest.mark.parametrize("bad", [-0.1, math.inf, math.nan])
def test_arguments_out_of_range_are_named(name, bad):
  with pytest.raises(ValueError, match=f"{name} must be .* got {name}={bad}"):
    decay_weights(**({"rate": 0.1} | {name: bad}))
