"""Learning rates read from the states of all kinds of chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import optim
from deepseek_jax.optim.polyak import cap_by_polyak

PARAMS = {
  "head": {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))},
  "stages": {0: {"kernel": jnp.ones((2, 2))}},
}
BIAS, KERNEL, STAGE = "head/bias", "head/kernel", "stages/0/kernel"
RULES = (("head/.*", 1.0), (".*", 0.25))
GRADS = jax.tree.map(lambda x: 0.5 * x, PARAMS)
by_head = lambda tree: {
  "head": jax.tree.map(lambda _: "head", tree["head"]),
  "stages": jax.tree.map(lambda _: "rest", tree["stages"]),
}
in_head = lambda tree: jax.tree.map(
  lambda label: label == "head", by_head(tree)
)
injected = optax.inject_hyperparams


def same(rate):
  return {BIAS: rate, KERNEL: rate, STAGE: rate}


halving = lambda count: 0.4 * 0.5**count
READABLE = {
  "rate": (optim.scale_by_rate(0.1), same(0.1)),
  "schedule": (optim.scale_by_rate(halving), same(0.1)),
  "layers": (
    optax.chain(optim.scale_by_layer(RULES), optim.scale_by_rate(0.4)),
    {BIAS: 0.4, KERNEL: 0.4, STAGE: 0.1},
  ),
  "loss": (
    optax.chain(
      optim.scale_by_rate(0.4), optim.scale_by_loss_ratio(1.0, decay=0.0)
    ),
    same(0.1),
  ),
  "capped": (
    cap_by_polyak(decay=0.0, inner=optim.scale_by_rate(0.4)),
    same(0.1),
  ),
  "capped_injected": (
    cap_by_polyak(decay=0.0, inner=injected(optax.sgd)(learning_rate=0.4)),
    same(0.1),
  ),
  "capped_in_a_partition": (
    optax.partition(
      {
        "head": cap_by_polyak(decay=0.0, inner=injected(optax.sgd)(0.3)),
        "rest": optim.scale_by_rate(0.2),
      },
      by_head,
    ),
    {BIAS: 1 / 6, KERNEL: 1 / 6, STAGE: 0.2},
  ),
  "deepseek": (
    optim.deepseek(
      0.4, warmup_steps=6, layer_rules=RULES, loss_power=0.5, cap=0.1
    ),
    None,
  ),
  "injected": (injected(optax.adam)(learning_rate=0.1), same(0.1)),
  "injected_schedule": (injected(optax.adam)(learning_rate=halving), same(0.1)),
  "injected_deepseek": (
    injected(optim.deepseek)(learning_rate=0.1, warmup_steps=6),
    same(0.05),
  ),
  "injected_in_a_chain": (
    optax.chain(
      optax.clip_by_global_norm(1.0),
      injected(optax.adamw)(learning_rate=0.4),
      optim.scale_by_layer(RULES),
    ),
    {BIAS: 0.4, KERNEL: 0.4, STAGE: 0.1},
  ),
  "plateau": (
    optax.chain(optim.scale_by_rate(0.4), optax.contrib.reduce_on_plateau()),
    same(0.4),
  ),
  "multi_steps": (optax.MultiSteps(optim.scale_by_rate(halving), 3), same(0.4)),
  "partition": (
    optax.partition(
      {"head": optim.scale_by_rate(0.3), "rest": injected(optax.adam)(0.2)},
      by_head,
    ),
    {BIAS: 0.3, KERNEL: 0.3, STAGE: 0.2},
  ),
  "masked_factor": (
    optax.chain(
      optax.masked(optim.scale_by_loss_ratio(1.0, decay=0.0), in_head),
      optim.scale_by_rate(0.4),
    ),
    {BIAS: 0.1, KERNEL: 0.1, STAGE: 0.4},
  ),
  "guarded_finite": (
    optax.apply_if_finite(optim.scale_by_rate(0.1), 3),
    same(0.1),
  ),
  "schedule_free": (
    optax.contrib.schedule_free(optim.scale_by_rate(0.1), 0.1),
    same(0.1),
  ),
}
UNREADABLE = {
  "adam": optax.adam(1e-3),
  "adam_with_schedule": optax.adam(halving),
  "schedule_after_rate": optax.chain(
    optim.scale_by_rate(0.1), optax.scale_by_schedule(halving)
  ),
  "injected_other_argument": injected(optax.scale_by_adam)(b1=0.9),
  "stateless_injected_in_a_mask": optax.masked(
    injected(optax.sgd)(learning_rate=0.1), in_head
  ),
}


@functools.cache
def state_after_three(tx):
  """The state after three updates; the loss falls to a quarter."""
  update = jax.jit(optax.with_extra_args_support(tx).update)
  params, state = PARAMS, tx.init(PARAMS)
  for value in (2.0, 1.0, 0.5):
    updates, state = update(GRADS, state, params, value=jnp.float32(value))
    params = optax.apply_updates(params, updates)
  return state


@pytest.mark.parametrize("name", READABLE)
def test_rates_are_the_product_of_what_the_states_record(name):
  tx, expected = READABLE[name]
  state = state_after_three(tx)
  rates = jax.jit(optim.learning_rates)(state, PARAMS)
  assert list(rates) == [BIAS, KERNEL, STAGE]
  assert all(r.dtype == jnp.float32 and r.shape == () for r in rates.values())
  if expected:
    np.testing.assert_allclose(
      list(rates.values()), list(expected.values()), rtol=1e-6
    )


@pytest.mark.parametrize(
  "name", ["rate", "schedule", "layers", "loss", "capped"]
)
def test_rates_are_what_the_update_did(name):
  tx, _ = READABLE[name]
  state = tx.init(PARAMS)
  for value in (3.0, 2.0, 1.0):
    updates, state = tx.update(GRADS, state, PARAMS, value=value)
    rates = optim.learning_rates(state, PARAMS)
    np.testing.assert_allclose(updates["head"]["bias"], -0.5 * rates[BIAS])
    np.testing.assert_allclose(
      updates["stages"][0]["kernel"], -0.5 * rates[STAGE]
    )


def test_the_rate_of_the_recipe_is_warm_up_times_layer_times_loss_times_cap():
  tx, _ = READABLE["deepseek"]
  first = optim.learning_rates(tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(first[BIAS], 0.4 / 6, rtol=1e-6)
  state = state_after_three(tx)
  rates = optim.learning_rates(state, PARAMS)
  capped = state.inner_state
  loss = capped.inner_state["loss"].rate_scale
  assert 0.5 < loss < 1.0
  assert 0.0 < capped.rate_scale < 1.0
  expected = 0.4 * 3 / 6 * loss * capped.rate_scale
  np.testing.assert_allclose(rates[BIAS], expected, rtol=1e-6)
  np.testing.assert_allclose(rates[STAGE], rates[BIAS] / 4, rtol=1e-6)


def test_rates_of_many_runs_at_once_have_one_entry_a_run():
  peaks = jnp.array([0.1, 0.2])
  make = lambda peak: optax.chain(
    optim.scale_by_layer(RULES), optim.scale_by_rate(peak)
  )
  states = jax.vmap(lambda peak: make(peak).init(PARAMS))(peaks)
  read = jax.vmap(lambda state: optim.learning_rates(state, PARAMS))
  rates = read(states)
  np.testing.assert_allclose(rates[BIAS], peaks)
  np.testing.assert_allclose(rates[STAGE], peaks / 4)


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_rates_are_an_error_with_a_remedy(name):
  state = UNREADABLE[name].init(PARAMS)
  with pytest.raises(ValueError, match=r"head/bias.*inject_hyperparams"):
    optim.learning_rates(state, PARAMS)
  assert optim.learning_rates(state, PARAMS, strict=False) == {}


def test_a_frozen_part_is_left_out_when_not_strict():
  tx = optax.partition(
    {"head": optim.deepseek(0.1), "rest": optax.set_to_zero()}, by_head
  )
  state = tx.init(PARAMS)
  with pytest.raises(ValueError, match="stages/0/kernel"):
    optim.learning_rates(state, PARAMS)
  assert list(optim.learning_rates(state, PARAMS, strict=False)) == [
    BIAS,
    KERNEL,
  ]


def test_the_reason_is_given():
  state = optax.adam(halving).init(PARAMS)
  with pytest.raises(ValueError, match=r"optax.scale_by_schedule"):
    optim.learning_rates(state, PARAMS)
