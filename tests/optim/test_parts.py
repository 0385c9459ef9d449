"""The parts that have a rule of their own: layers, rate, warm-up, guard."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import optim

PARAMS = {
  "head": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
  "trunk": {"kernel": jnp.ones((2, 2))},
}


def test_layer_multipliers_are_the_first_match():
  tx = optim.scale_by_layer([("head/bias", 2.0), ("head/.*", 1.0), (".*", 0.5)])
  updates, state = tx.update(PARAMS, tx.init(PARAMS))
  assert updates["head"]["kernel"] is PARAMS["head"]["kernel"]
  np.testing.assert_array_equal(updates["head"]["bias"], 2.0)
  np.testing.assert_array_equal(updates["trunk"]["kernel"], 0.5)
  np.testing.assert_array_equal(state.rate_scales, [2.0, 1.0, 0.5])


def test_a_frozen_layer_does_not_move_even_when_its_gradient_is_nan():
  tx = optim.scale_by_layer([("head/.*", 1.0), ("trunk/.*", 0.0)])
  grads = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
  updates, _ = tx.update(grads, tx.init(PARAMS))
  np.testing.assert_array_equal(updates["trunk"]["kernel"], 0.0)


def test_a_restored_state_does_not_bring_back_an_older_table():
  old = optim.scale_by_layer([(".*", 0.5)])
  new = optim.scale_by_layer([(".*", 0.25)])
  updates, state = new.update(PARAMS, old.init(PARAMS))
  np.testing.assert_array_equal(updates["head"]["bias"], 0.25)
  np.testing.assert_array_equal(state.rate_scales, 0.25)


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ([("head/.*", 1.0)], "'trunk/kernel'"),
    ([("haed/.*", 1.0), (".*", 1.0)], r"'haed/\.\*'"),
    ([(".*", 1.0), ("head/.*", 2.0)], "an earlier rule"),
  ],
)
def test_tables_that_do_not_fit_are_named_at_init(rules, message):
  tx = optim.scale_by_layer(rules)
  with pytest.raises(ValueError, match=message):
    tx.init(PARAMS)


@pytest.mark.parametrize("multiplier", [-1.0, float("inf"), float("nan")])
def test_wrong_multipliers_are_named_at_once(multiplier):
  with pytest.raises(ValueError, match=r"multiplier=.* for 'a'"):
    optim.scale_by_layer([("a", multiplier)])


def test_rate_equals_that_of_optax():
  schedule = optax.cosine_decay_schedule(0.1, 5)
  ours = optim.scale_by_rate(schedule)
  theirs = optax.scale_by_learning_rate(schedule)
  a, b = ours.init(PARAMS), theirs.init(PARAMS)
  for _ in range(4):
    mine, a = ours.update(PARAMS, a)
    peer, b = theirs.update(PARAMS, b)
    jax.tree.map(np.testing.assert_array_equal, mine, peer)


def test_warmup_reaches_the_rate_and_leaves_the_schedule_in_place():
  decay = optax.linear_schedule(1.0, 0.0, 10)
  schedule = optim.warmup(decay, steps=4)
  times = np.arange(12)
  ramp = np.minimum(1, (times + 1) / 4)
  np.testing.assert_allclose(schedule(times), ramp * decay(times), rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1])
def test_no_warmup_is_the_identity(steps):
  schedule = optim.warmup(0.3, steps=steps)
  np.testing.assert_allclose([schedule(t) for t in range(3)], 0.3)


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_an_element_whose_square_is_not_finite_is_zeroed_alone(bad, dtype):
  grads = jnp.ones(3, dtype).at[1].set(bad)
  updates, _ = optim.zero_non_finite().update(grads, optax.EmptyState())
  assert updates.dtype == dtype
  np.testing.assert_array_equal(updates.astype(jnp.complex64), [1, 0, 1])


def test_float16_squares_do_not_count_as_infinite():
  grads = jnp.full(4, 1e3, jnp.float16)
  updates, _ = optim.zero_non_finite().update(grads, optax.EmptyState())
  np.testing.assert_array_equal(updates, grads)
