"""The recipe as a whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import optim

PARAMS = {
  "embed": {"table": jnp.linspace(-1, 1, 12).reshape(4, 3)},
  "norm": {"scale": jnp.ones(3)},
}


def gradients(step):
  random = np.random.default_rng(step)
  return jax.tree.map(
    lambda p: jnp.asarray(random.normal(size=p.shape), p.dtype), PARAMS
  )


def descend(tx, steps=20, losses=None):
  """Parameters after some updates along the same gradients."""
  update = jax.jit(tx.update)
  params, state = PARAMS, tx.init(PARAMS)
  for step in range(steps):
    extra = {} if losses is None else {"value": losses[step]}
    updates, state = update(gradients(step), state, params, **extra)
    params = optax.apply_updates(params, updates)
  return params


def assert_close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_adamw_whose_decay_is_masked(weight_decay):
  ours = optim.deepseek(1e-2, weight_decay=weight_decay)
  theirs = optax.adamw(1e-2, weight_decay=weight_decay, mask=optim.matrices)
  assert_close(descend(ours), descend(theirs))


def test_takes_the_arguments_of_adamw():
  schedule = optax.cosine_decay_schedule(1e-2, 20)
  everything = lambda params: jax.tree.map(lambda _: True, params)
  arguments = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "mu_dtype": jnp.bfloat16}
  ours = optim.deepseek(
    schedule, weight_decay=0.1, mask=everything, **arguments
  )
  theirs = optax.adamw(schedule, weight_decay=0.1, **arguments)
  assert_close(descend(ours), descend(theirs))


def test_a_tree_of_booleans_is_a_mask():
  mask = {"embed": {"table": False}, "norm": {"scale": True}}
  ours = optim.deepseek(1e-2, weight_decay=0.1, mask=mask)
  theirs = optax.adamw(1e-2, weight_decay=0.1, mask=mask)
  assert_close(descend(ours), descend(theirs))


def test_warmup_scales_the_first_updates():
  warm = optim.deepseek(1e-2, warmup_steps=10)
  schedule = lambda t: 1e-2 * jnp.minimum(1.0, (t + 1) / 10)
  assert_close(descend(warm), descend(optax.adamw(schedule, weight_decay=0.0)))


def test_the_loss_part_rests_without_a_loss_and_works_with_one():
  plain, driven = optim.deepseek(1e-2), optim.deepseek(1e-2, loss_power=0.5)
  assert_close(descend(driven), descend(plain))
  by_hand = optax.chain(plain, optim.scale_by_loss_ratio(0.5))
  losses = np.geomspace(3.0, 0.1, 20, dtype=np.float32)
  after = descend(driven, losses=losses)
  assert_close(after, descend(by_hand, losses=losses))
  assert np.any(after["norm"]["scale"] != descend(plain)["norm"]["scale"])


def test_the_scale_holds_while_no_loss_is_passed():
  tx = optim.deepseek(1e-2, loss_power=1.0)
  state = tx.init(PARAMS)
  for value in (1.0, 0.5):
    _, state = tx.update(gradients(0), state, PARAMS, value=value)
  before = optim.learning_rates(state, PARAMS)
  _, state = tx.update(gradients(1), state, PARAMS)
  after = optim.learning_rates(state, PARAMS)
  assert before == after
  assert before["norm/scale"] < 1e-2


def test_an_injected_rate_can_be_turned_while_running():
  tx = optax.inject_hyperparams(optim.deepseek)(
    learning_rate=1e-2, weight_decay=0.1, warmup_steps=4
  )
  update = jax.jit(tx.update)
  state = tx.init(PARAMS)
  _, state = update(gradients(0), state, PARAMS)
  state.hyperparams["learning_rate"] = jnp.float32(1e-3)
  _, state = update(gradients(1), state, PARAMS)
  rates = optim.learning_rates(state, PARAMS)
  np.testing.assert_allclose(rates["norm/scale"], 1e-3 * 2 / 4)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"learning_rate": -1.0}, "learning_rate must"),
    ({"learning_rate": float("nan")}, "learning_rate must"),
    ({"weight_decay": -0.1}, "weight_decay must"),
    ({"warmup_steps": -1}, "warmup_steps must"),
    ({"warmup_steps": 1.5}, "steps must be a whole number"),
    ({"b1": 1.0}, r"b1 must be in \[0, 1\), got b1=1.0"),
    ({"b2": -0.1}, "b2 must"),
    ({"eps": -1.0}, "eps must"),
    ({"loss_power": float("inf")}, "power must be finite"),
  ],
)
def test_arguments_out_of_range_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    optim.deepseek(**arguments)
