"""Laws of arithmetic that stays finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.core import (
  all_finite,
  ema_value,
  init_ema,
  safe_ratio,
  scale_tree,
  select_tree,
  update_ema,
)

BAD = [float("nan"), float("inf"), float("-inf"), 1e300]
# Subnormals aside: the backend may flush them to zero.
floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@jax.jit
def run_ema(values, decay):
  step = lambda ema, value: (update_ema(ema, value, decay), None)
  return jax.lax.scan(step, init_ema(), values)[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(floats, min_size=5, max_size=5), st.floats(0, 0.99))
def test_ema_is_the_weighted_mean(values, decay):
  weights = decay ** np.arange(len(values) - 1, -1, -1)
  expected = np.dot(weights, values) / weights.sum()
  mean = ema_value(run_ema(jnp.asarray(values, jnp.float32), decay))
  scale = max(1e-3, np.abs(values).max())
  np.testing.assert_allclose(mean / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_bad_value_is_as_if_it_had_never_come(bad, place):
  values = np.asarray([1.0, 2.0, 3.0])
  with np.errstate(over="ignore"):
    dirty = np.insert(values, place, bad).astype(np.float32)
  clean = run_ema(values.astype(np.float32), 0.9)
  assert run_ema(dirty, 0.9) == clean


def test_ema_of_nothing_is_the_default():
  assert ema_value(init_ema(), default=7.0) == 7.0
  assert ema_value(update_ema(init_ema(), jnp.nan, 0.9), default=7.0) == 7.0


@pytest.mark.parametrize(
  ("numerator", "denominator"),
  [(1.0, 0.0), (0.0, 0.0), (1.0, np.nan), (np.inf, 1.0), (3e38, 1e-30)],
)
def test_ratio_and_its_gradient_are_finite(numerator, denominator):
  ratio, grads = jax.value_and_grad(safe_ratio, argnums=(0, 1))(
    numerator, denominator, 5.0
  )
  assert ratio == 5.0
  assert all_finite(grads)


def test_ratio_broadcasts_and_keeps_wide_dtypes():
  ratio = safe_ratio(jnp.ones((3,), jnp.bfloat16), 2.0)
  assert ratio.dtype == jnp.float32
  np.testing.assert_array_equal(ratio, 0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_one_bad_element_anywhere_is_found(bad, dtype):
  tree = {"a": jnp.ones((2, 2), dtype), "b": [jnp.arange(3), None]}
  assert all_finite(tree)
  tree["a"] = tree["a"].at[1, 0].set(bad)
  assert not all_finite(tree)


def test_select_keeps_dtypes_and_random_keys():
  tree = {
    "x": jnp.ones(2, jnp.bfloat16),
    "n": jnp.ones((), jnp.int8),
    "key": jax.random.key(1),
  }
  other = {
    "x": jnp.zeros(2, jnp.bfloat16),
    "n": jnp.zeros((), jnp.int8),
    "key": jax.random.key(2),
  }
  for condition, expected in ((True, tree), (False, other)):
    chosen = jax.jit(select_tree)(condition, tree, other)
    equal = jax.tree.map(lambda a, b: jnp.all(a == b), chosen, expected)
    assert all(jax.tree.leaves(equal))
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, chosen, expected)
    assert all(jax.tree.leaves(same))


def test_select_of_different_structures_is_an_error():
  with pytest.raises(ValueError, match="key"):
    select_tree(True, {"a": 1.0}, {"b": 1.0})


def test_scaling_keeps_dtypes_and_rounds_once():
  tree = {"a": jnp.full(3, 3.0, jnp.bfloat16), "b": jnp.ones(2)}
  scaled = scale_tree(tree, jnp.float32(1 / 3))
  assert scaled["a"].dtype == jnp.bfloat16
  assert scaled["b"].dtype == jnp.float32
  np.testing.assert_array_equal(scaled["a"].astype(jnp.float32), 1.0)
