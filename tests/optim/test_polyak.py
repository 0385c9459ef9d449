"""`cap_by_polyak` against its formula, and on losses with rates too high."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.core import all_finite
from deepseek_jax.optim.polyak import cap_by_polyak

LOSSES = [2.0, 1.7, math.nan, 0.9, 1.1, math.inf, 0.6, 0.3, 0.2, 0.2, 0.05]
GRADS = [
  {"a": np.asarray(a, np.float32), "b": np.float32(b)}
  for a, b in zip(
    np.random.default_rng(0).normal(size=(len(LOSSES), 2, 3)),
    np.linspace(-1, 1, len(LOSSES)),
    strict=True,
  )
]
SETTINGS = [
  {},
  {"fraction": 1.5, "decay": 0.0},
  {"lower": 0.1, "decay": 0.5},
  {"lower": -4.0, "fraction": 0.1},
]


def transcription(losses, grads, updates, fraction=0.5, lower=0.0, decay=0.0):
  """The formula in NumPy and float64, one scale for each step."""
  scales, seen = [], []
  for loss, grad, update in zip(losses, grads, updates, strict=True):
    if np.isfinite(loss):
      seen.append(loss)
    weights = decay ** np.arange(len(seen) - 1, -1, -1, dtype=np.float64)
    mean = np.dot(weights, seen) / weights.sum()
    promise = -sum(
      np.sum(np.float64(grad[key]) * np.float64(update[key])) for key in grad
    )
    limit = fraction * max(mean - lower, 0.0)
    scales.append(min(1.0, limit / promise) if promise > 0 else 1.0)
  return np.asarray(scales)


def stack(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def run(tx, losses, grads, give_grad=False):
  """The updates and the scales of a run with the same parameters throughout."""
  params = jax.tree.map(jnp.ones_like, grads[0])

  def step(state, row):
    loss, grad = row
    extra = {"grad": grad} if give_grad else {}
    updates, state = tx.update(grad, state, params, value=loss, **extra)
    return state, (updates, state)

  scan = jax.jit(lambda rows: jax.lax.scan(step, tx.init(params), rows)[1])
  return scan((jnp.asarray(losses, jnp.float32), stack(grads)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_its_transcription(settings):
  momentum = optax.sgd(0.3, momentum=0.9)
  plain, _ = run(optax.with_extra_args_support(momentum), LOSSES, GRADS)
  capped, state = run(cap_by_polyak(**settings, inner=momentum), LOSSES, GRADS)
  rows = [jax.tree.map(lambda x, i=i: x[i], plain) for i in range(len(LOSSES))]
  expected = transcription(LOSSES, GRADS, rows, **settings)
  np.testing.assert_allclose(state.rate_scale, expected, rtol=1e-5)
  np.testing.assert_allclose(
    capped["a"], plain["a"] * expected[:, None, None], rtol=1e-5
  )
  assert len(np.unique(expected)) > 2


def test_wrapping_is_passing_the_gradient():
  inner = optax.adam(3.0)
  around, _ = run(cap_by_polyak(inner=inner), LOSSES, GRADS)
  last, _ = run(optax.chain(inner, cap_by_polyak()), LOSSES, GRADS, True)
  jax.tree.map(np.testing.assert_array_equal, around, last)


def test_a_gradient_passed_by_hand_counts_before_what_comes_in():
  tx = cap_by_polyak(decay=0.0, inner=optax.sgd(1.0))
  x = jnp.float32(2.0)
  _, state = tx.update(x / 2, tx.init(x), x, value=1.0, grad=x)
  np.testing.assert_allclose(state.rate_scale, 0.5 / 2.0)


@pytest.mark.parametrize("unit", [1e-12, 1e-3, 1e9])
def test_does_not_depend_on_the_unit_of_the_loss(unit):
  signs = optax.chain(optax.scale_by_sign(), optax.scale(-1.0))
  _, state = run(cap_by_polyak(lower=-0.5, inner=signs), LOSSES, GRADS)
  scaled = [jax.tree.map(lambda x: np.float32(unit * x), g) for g in GRADS]
  _, other = run(
    cap_by_polyak(lower=-0.5 * unit, inner=signs),
    [unit * loss for loss in LOSSES],
    scaled,
  )
  np.testing.assert_allclose(other.rate_scale, state.rate_scale, rtol=1e-5)
  assert len(np.unique(state.rate_scale)) > 2


def test_the_promise_never_exceeds_its_share_of_the_loss():
  updates, _ = run(
    cap_by_polyak(0.5, decay=0.0, inner=optax.sgd(1e3)),
    [0.7] * len(GRADS),
    GRADS,
  )
  grads = stack(GRADS)
  promise = -np.sum(grads["a"] * updates["a"], axis=(1, 2))
  promise -= grads["b"] * updates["b"]
  np.testing.assert_allclose(promise, 0.35, rtol=1e-5)


def test_an_update_that_is_no_descent_is_left_alone():
  updates, state = run(cap_by_polyak(inner=optax.scale(7.0)), LOSSES, GRADS)
  np.testing.assert_array_equal(state.rate_scale, 1.0)
  np.testing.assert_array_equal(updates["a"], 7.0 * stack(GRADS)["a"])


@pytest.mark.parametrize(("update", "scale"), [(1e-30, 1.0), (1e30, 0.0)])
def test_promises_beyond_float32_do_not_overflow(update, scale):
  tx = cap_by_polyak()
  g = jnp.full(2, 1e-15 if update < 1 else 1e15)
  u = jnp.full(2, -update)
  updates, state = tx.update(u, tx.init(g), g, value=1.0, grad=g)
  assert state.rate_scale == scale
  np.testing.assert_array_equal(updates, scale * u)


def test_a_promise_without_a_value_leaves_the_scale_as_it_is():
  tx = cap_by_polyak()
  x = jnp.full(2, 1e30)
  _, state = tx.update(-x / 1e30, tx.init(x), x, value=1.0, grad=x)
  lopsided = x * jnp.array([1.0, -1.0])  # The sum is inf - inf.
  _, after = tx.update(lopsided, state, x, value=1.0, grad=x)
  assert 0 < after.rate_scale == state.rate_scale < 1


def test_before_any_loss_and_below_the_bound():
  tx = cap_by_polyak(lower=1.0, decay=0.0, inner=optax.sgd(1e3))
  x = jnp.ones(2)
  state = tx.init(x)
  scales = []
  for loss in (math.nan, math.inf, 0.5, math.nan, 1.0, 2.0):
    _, state = tx.update(x, state, x, value=loss)
    scales.append(float(state.rate_scale))
  np.testing.assert_allclose(scales, [1, 1, 1, 1, 0, 0.5 / 2e3], rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_elements_promise_nothing(bad):
  tx = cap_by_polyak(decay=0.0)
  x = jnp.ones(3)
  sound = x.at[1].set(0.0)
  _, expected = tx.update(-sound, tx.init(x), x, value=1.0, grad=sound)
  for grad, update in ((x.at[1].set(bad), -x), (x, -x.at[1].set(bad))):
    _, state = tx.update(update, tx.init(x), x, value=1.0, grad=grad)
    assert all_finite(state)
    np.testing.assert_array_equal(state.rate_scale, expected.rate_scale)
  assert expected.rate_scale < 1


@pytest.mark.parametrize("wrap", ["masked", "partition"])
@pytest.mark.parametrize("inner", [optax.sgd(10.0), None])
def test_only_the_leaves_inside_a_mask_promise(wrap, inner):
  tree = {"in": jnp.ones(3), "out": {"x": jnp.full(2, 5.0)}}
  tx = cap_by_polyak(decay=0.0, inner=inner)
  if wrap == "masked":
    tx = optax.masked(tx, {"in": True, "out": False})
  else:
    labels = {"in": "cap", "out": "as_is"}
    tx = optax.partition({"cap": tx, "as_is": optax.identity()}, labels)
  updates = tree if inner else jax.tree.map(lambda x: -10.0 * x, tree)
  new, _ = tx.update(updates, tx.init(tree), tree, value=1.0, grad=tree)
  np.testing.assert_allclose(new["in"], -1 / 6, rtol=1e-6)
  np.testing.assert_array_equal(new["out"]["x"], updates["out"]["x"])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_promise_is_summed_in_float32(dtype):
  # In half precision 2048 + 1 is 2048, and in float16 the sum overflows.
  x = jnp.ones(100_000, dtype)
  tx = cap_by_polyak(decay=0.0)
  updates, state = tx.update(-x, tx.init(x), x, value=1.0, grad=x)
  np.testing.assert_allclose(state.rate_scale, 0.5e-5, rtol=1e-6)
  assert updates.dtype == dtype


@pytest.mark.parametrize("rate", [0.1, 1e3])
def test_a_rate_too_high_still_descends_and_a_good_one_is_not_touched(rate):
  heights = jnp.array([1.0, 0.5, 0.2])
  loss = lambda x: jnp.sum(heights * x**2) / 2
  tx = cap_by_polyak(decay=0.0, inner=optax.sgd(rate))

  def step(carry, _):
    x, state = carry
    value, grad = jax.value_and_grad(loss)(x)
    updates, state = tx.update(grad, state, x, value=value)
    return (x + updates, state), state.rate_scale

  start = jnp.array([3.0, -2.0, 1.0])
  (x, _), scales = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200))(
    (start, tx.init(start))
  )
  assert loss(x) < 1e-3 * loss(start)
  if rate < 1:
    np.testing.assert_array_equal(scales, 1.0)
  else:
    assert jnp.max(scales) < 0.01


def test_what_is_missing_is_named():
  x = jnp.ones(2)
  tx = cap_by_polyak()
  with pytest.raises(TypeError, match=r"cap_by_polyak needs .*value=loss"):
    tx.update(x, tx.init(x), grad=x)
  with pytest.raises(TypeError, match=r"inner=optax.adam.*grad=grads"):
    tx.update(x, tx.init(x), value=1.0)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"fraction": 0}, r"fraction must be in \(0, 2\), got fraction=0"),
    ({"fraction": 2.0}, "fraction must"),
    ({"fraction": math.nan}, "fraction must"),
    ({"lower": -math.inf}, r"lower must be in \(-inf, inf\)"),
    ({"decay": 1.0}, r"decay must be in \[0, 1\), got decay=1.0"),
  ],
)
def test_arguments_out_of_range_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    cap_by_polyak(**settings)
