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


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 1e30])
def test_a_skipped_update_leaves_no_trace_but_its_count(bad):
  tx = optim.skip_non_finite(optax.adam(0.1))
  state = tx.init(PARAMS)
  _, state = tx.update(PARAMS, state)
  broken = jax.tree.map(lambda x: x, PARAMS)
  broken["head"]["bias"] = broken["head"]["bias"].at[0].set(bad)
  updates, after = tx.update(broken, state)
  jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0.0), updates)
  jax.tree.map(
    np.testing.assert_array_equal, after.inner_state, state.inner_state
  )
  assert (state.skipped, after.skipped) == (0, 1)


def test_float16_squares_do_not_count_as_infinite():
  tx = optim.skip_non_finite(optax.sgd(1.0))
  grads = jnp.full(4, 1e3, jnp.float16)
  updates, state = tx.update(grads, tx.init(grads))
  assert state.skipped == 0
  np.testing.assert_array_equal(updates, -grads)
