"""The published rules against transcriptions in NumPy and float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import optim
from deepseek_jax.core import all_finite
from deepseek_jax.optim.classic import loss_level_sgd, variance_scaled

RANDOM = np.random.default_rng(0)
PARAMS = {"bias": RANDOM.normal(size=3), "kernel": RANDOM.normal(size=(3, 4))}
ROWS = [
  {key: RANDOM.normal(size=p.shape) * scale for key, p in PARAMS.items()}
  for scale in np.geomspace(10.0, 0.01, 20)
]
LOSSES = [3.0, 1.0, 0.999, 0.5, 0.1, 0.09, 0.0, -1.0, 0.4, 2.0]


def single(tree):
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def train(tx, rows, losses=None):
  """The parameters after every step."""
  params = single(PARAMS)
  losses = losses or [1.0] * len(rows)
  grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(single, rows))

  def step(carry, row):
    params, state = carry
    grad, loss = row
    updates, state = tx.update(grad, state, params, value=loss)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  scan = lambda rows: jax.lax.scan(step, (params, tx.init(params)), rows)[1]
  return jax.jit(scan)((grads, jnp.asarray(losses, jnp.float32)))


def assert_close(run, expected):
  # In float32, 1 - 0.999 is off by 5e-5 of itself, and the steps are 0.1 long.
  for key in PARAMS:
    theirs = np.stack([params[key] for params in expected])
    np.testing.assert_allclose(run[key], theirs, rtol=1e-5, atol=1e-5)


def loss_level_transcription(rows, losses, lr, weight_decay):
  params, run = dict(PARAMS), []
  for grad, loss in zip(rows, losses, strict=True):
    if loss < 0.1:
      rate = lr * 10
    elif loss < 1.0:
      rate = lr * 5
    else:
      rate = lr
    params = {
      key: p - rate * grad[key] - rate * weight_decay * p
      for key, p in params.items()
    }
    run.append(params)
  return run


def variance_transcription(rows, mode, lr=0.1, b1=0.9, b2=0.999, eps=1e-8):
  params, run = dict(PARAMS), []
  m = {key: np.zeros_like(p) for key, p in params.items()}
  v = {key: np.zeros_like(p) for key, p in params.items()}
  for t, grad in enumerate(rows, start=1):
    everything = np.concatenate([g.ravel() for g in grad.values()])
    for key, g in grad.items():
      square = {
        "global": np.mean(everything**2),
        "tensor": np.mean(g**2),
        "element": g**2,
      }[mode]
      m[key] = b1 * m[key] + (1 - b1) * g
      v[key] = b2 * v[key] + (1 - b2) * square
      rate = lr / (np.sqrt(v[key] / (1 - b2**t)) + eps)
      params = params | {key: params[key] - rate * m[key] / (1 - b1**t)}
    run.append(params)
  return run


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_loss_level_sgd_equals_its_transcription(weight_decay):
  rows = ROWS[: len(LOSSES)]
  run = train(loss_level_sgd(0.01, weight_decay=weight_decay), rows, LOSSES)
  assert_close(run, loss_level_transcription(rows, LOSSES, 0.01, weight_decay))


@pytest.mark.parametrize("mode", ["global", "tensor", "element"])
@pytest.mark.parametrize("b", [(0.9, 0.999), (0.0, 0.5)])
def test_variance_scaled_equals_its_transcription(mode, b):
  b1, b2 = b
  run = train(variance_scaled(0.1, b1=b1, b2=b2, mode=mode), ROWS)
  expected = variance_transcription(ROWS, mode, b1=b1, b2=b2)
  assert_close(run, expected)


def test_by_element_it_is_adam():
  ours, theirs = (
    train(variance_scaled(0.1, mode="element"), ROWS),
    train(optax.with_extra_args_support(optax.adam(0.1)), ROWS),
  )
  for key in PARAMS:
    np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-6)


def test_the_modes_differ_and_agree_on_a_single_leaf():
  runs = [
    train(variance_scaled(0.1, mode=m), ROWS) for m in ("global", "tensor")
  ]
  assert not np.allclose(runs[0]["bias"], runs[1]["bias"], rtol=1e-2)
  grad = jnp.array([3.0, -1.0, 0.0])
  first, second = (
    tx.update(grad, tx.init(grad))[0]
    for tx in (variance_scaled(mode="global"), variance_scaled(mode="tensor"))
  )
  np.testing.assert_allclose(first, second, rtol=1e-6)


@pytest.mark.parametrize("mode", ["global", "tensor", "element"])
@pytest.mark.parametrize("unit", [1e-10, 1e10])
def test_variance_scaled_does_not_depend_on_the_unit_of_the_loss(mode, unit):
  tx = variance_scaled(0.1, eps=0.0, mode=mode)
  scaled = [{key: unit * g for key, g in row.items()} for row in ROWS[:5]]
  assert_close(train(tx, scaled), variance_transcription(ROWS[:5], mode, eps=0))


@pytest.mark.parametrize("mode", ["global", "tensor", "element"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25, 1.8e19])
def test_no_gradient_breaks_the_variance(mode, bad):
  tx = variance_scaled(0.1, mode=mode)
  grads = single(PARAMS)
  broken = grads | {"bias": jnp.full(3, bad)}
  state = tx.init(grads)
  for grad in (broken, grads):
    updates, state = tx.update(grad, state)
    assert all_finite((updates, state))


def test_a_bad_loss_keeps_the_factor():
  tx = loss_level_sgd(1.0)
  x = jnp.ones(())
  state, seen = tx.init(x), []
  for loss in (math.nan, 0.5, math.nan, -math.inf, math.inf, 0.05, math.nan):
    updates, state = tx.update(x, state, value=loss)
    seen.append(-float(updates))
    assert optim.learning_rates(state, x)[""] == seen[-1]
  assert seen == [1.0, 5.0, 5.0, 5.0, 5.0, 10.0, 10.0]


def test_levels_of_ones_own():
  tx = loss_level_sgd(1.0, levels=[(-1, 0.5), (2, 3)])
  x = jnp.ones(())
  scale = lambda loss: -float(tx.update(x, tx.init(x), value=loss)[0])
  assert [scale(loss) for loss in (-2.0, -1.0, 1.9, 2.0)] == [
    0.5,
    3.0,
    3.0,
    1.0,
  ]


@pytest.mark.parametrize(
  "make", [loss_level_sgd, variance_scaled], ids=["loss_level", "variance"]
)
def test_schedules_are_taken_and_read_back(make):
  tx = make(optax.linear_schedule(1.0, 0.0, 4))
  x = jnp.full(2, 2.0)
  state = tx.init(x)
  for rate in (1.0, 0.75, 0.5):
    _, state = tx.update(x, state, x, value=2.0)
    assert optim.learning_rates(state, x)[""] == rate


def test_the_missing_loss_is_named():
  tx = loss_level_sgd()
  with pytest.raises(TypeError, match=r"loss_level_sgd needs .*value=loss"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


@pytest.mark.parametrize(
  ("make", "settings", "message"),
  [
    (loss_level_sgd, {"learning_rate": -1.0}, "learning_rate must"),
    (
      loss_level_sgd,
      {"weight_decay": -0.1},
      r"decay must be in \[0, inf\)",
    ),
    (loss_level_sgd, {"levels": ()}, r"levels must .*, got levels=\(\)"),
    (loss_level_sgd, {"levels": ((1, 5), (0.1, 10))}, "rising loss"),
    (loss_level_sgd, {"levels": ((1, 5), (1, 10))}, "rising loss"),
    (loss_level_sgd, {"levels": ((math.inf, 5),)}, r"got \(inf, 5\)"),
    (loss_level_sgd, {"levels": ((1.0, -5.0),)}, "positive factor"),
    (variance_scaled, {"learning_rate": math.nan}, "learning_rate must"),
    (variance_scaled, {"b1": 1.0}, r"b1 must be in \[0, 1\), got b1=1.0"),
    (variance_scaled, {"b2": -0.1}, "b2 must"),
    (variance_scaled, {"eps": -1e-8}, "eps must"),
  ],
)
def test_arguments_out_of_range_are_named(make, settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)
