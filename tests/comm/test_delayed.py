"""Gradients that are exchanged some steps late."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanges import (
  PLACEMENTS,
  SMALL,
  STEPS,
  Run,
  assert_equal,
  gradients,
  params,
  prepared,
)

from deepseek_jax import comm

AT = PLACEMENTS["data"]


def assert_late(late, prompt, steps):
  for name, x in prompt.items():
    assert not np.asarray(late[name][:steps]).any()
    np.testing.assert_array_equal(late[name][steps:], x[: STEPS - steps])


@pytest.mark.parametrize("place", ["data", "fsdp"])
def test_updates_are_those_of_some_steps_ago(place):
  grads = gradients(4)
  late, _ = prepared("delayed", place)(grads)
  prompt, _ = prepared("int8", place)(grads)
  assert_late(late, prompt, 2)


@functools.cache
def late_signs():
  # What it would know of zeros at the start, it would know for two steps.
  exchange = comm.one_bit("data", block=16, warmup=1, refresh=2, **SMALL)
  return Run(comm.delayed(exchange, 1), AT, params())


def test_the_exchange_begins_with_the_first_gradient():
  grads = gradients(4)
  late, state = late_signs()(grads)
  prompt, _ = prepared("one_bit", "data")(grads)
  assert_late(late, prompt, 1)
  assert state.exchange.count == STEPS - 1


def test_bad_gradients_wait_as_zeros():
  bad, zeroed = gradients(4), gradients(4)
  bad["first"][-1, 0, 2], zeroed["first"][-1, 0, 2] = np.inf, 0
  bad["bias"][0, 1], zeroed["bias"][0, 1] = np.nan, 0
  run = prepared("delayed", "data")
  assert_equal(run(bad), run(zeroed))


def test_what_waits_keeps_the_type_of_the_parameters():
  tx = comm.delayed(comm.int_all_reduce("data", **SMALL))
  run = Run(tx, AT, params({"first": (12, 8)}, jnp.bfloat16))
  grads = gradients(4, shapes={"first": (12, 8)})
  updates, state = run(grads)
  assert updates["first"].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(state.pending)} == {
    jnp.dtype(jnp.bfloat16)
  }
