"""`scale_by_relative_snr` against its formula."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.core import all_finite
from deepseek_jax.optim.balance import balanced_scales
from deepseek_jax.optim.guard import zero_non_finite
from deepseek_jax.optim.readback import learning_rates
from deepseek_jax.optim.variance import scale_by_relative_snr

SHAPES = {"clear": (4, 3), "mixed": (6,), "noisy": (5, 2), "still": (3,)}
SETTINGS = [
  {},
  {"power": 1.0, "decay": 0.0, "b1": 0.8, "b2": 0.95},
  {"power": 0.25, "min_scale": 0.8, "max_scale": 3.0, "decay": 0.9},
  {"power": 3.0, "min_scale": 0.1, "max_scale": 1.5, "b1": 0.5},
  {"power": 0.0},
]


def gradients(steps, seed=0):
  """Steps of gradients, with a part of noise that differs between leaves."""
  random = np.random.default_rng(seed)
  share = {"clear": 0.1, "mixed": 1.0, "noisy": 10.0, "still": 0.0}
  size = {"clear": 1e-3, "mixed": 1.0, "noisy": 30.0, "still": 0.0}
  return {
    name: size[name] * (1 + share[name] * random.normal(size=(steps, *shape)))
    for name, shape in SHAPES.items()
  }


def balanced(merits, power, low, high):
  """Bisects for the factor that gives the clipped powers mean logarithm 0."""
  logs = power * np.log(merits)
  below, above = np.log(low) - logs.max(), np.log(high) - logs.min()
  for _ in range(200):
    middle = (below + above) / 2
    mean = np.clip(logs + middle, np.log(low), np.log(high)).mean()
    below, above = (middle, above) if mean < 0 else (below, middle)
  return np.clip(np.exp(logs + middle), low, high)


def transcription(
  grads,
  power=0.5,
  min_scale=0.5,
  max_scale=2.0,
  decay=0.99,
  b1=0.9,
  b2=0.999,
):
  """The formula in NumPy and float64; a row of scales for each update."""
  names = sorted(grads)
  steps = len(grads[names[0]])
  scales = np.ones((steps, len(names)))
  signal, noise = np.zeros((steps + 1, 4)), np.zeros((steps + 1, 4))
  for t in range(1, steps + 1):
    moved = [i for i in range(len(names)) if signal[t - 1, i] + noise[t - 1, i]]
    if moved:
      s, n = signal[t - 1, moved], noise[t - 1, moved]
      share = np.clip(s / (s + n), 1e-3, 1 - 1e-3)
      snr = share / (1 - share)
      scales[t - 1, moved] = balanced(snr, power, min_scale, max_scale)
    weights1 = b1 ** np.arange(t - 1, -1, -1.0)
    weights2 = b2 ** np.arange(t - 1, -1, -1.0)
    weights1, weights2 = weights1 / weights1.sum(), weights2 / weights2.sum()
    kappa = np.sum(weights1**2)
    for i, name in enumerate(names):
      past = grads[name][:t].reshape(t, -1)
      m = np.mean((weights1 @ past) ** 2)
      v = np.mean(weights2 @ past**2)
      new_signal, new_noise = (m - kappa * v, v - m) if t > 1 else (0.0, 0.0)
      keep = decay if t > 1 else 1.0
      signal[t, i] = keep * signal[t - 1, i] + (1 - keep) * new_signal
      noise[t, i] = keep * noise[t - 1, i] + (1 - keep) * new_noise
  return scales


def run(tx, grads):
  """All updates and the scales that they used, then the last state."""
  grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
  state, (updates, scales) = runner(tx)(grads)
  return updates, np.asarray(scales), state


quick = scale_by_relative_snr(decay=0.5)


@functools.cache
def runner(tx):
  def step(state, grad):
    updates, state = tx.update(grad, state, grad)
    return state, (updates, state.rate_scales)

  def scan(grads):
    params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)
    return jax.lax.scan(step, tx.init(params), grads)

  return jax.jit(scan)


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_its_transcription(settings):
  grads = gradients(12)
  _, scales, _ = run(scale_by_relative_snr(**settings), grads)
  expected = transcription(grads, **settings)
  np.testing.assert_allclose(scales, expected, rtol=2e-4)
  if settings.get("power") != 0:
    assert np.ptp(expected) > 0.3


def test_reads_from_adam_what_it_would_keep_itself():
  grads = gradients(6)
  settings = {"b1": 0.8, "b2": 0.99, "decay": 0.5}
  _, expected, _ = run(scale_by_relative_snr(**settings), grads)
  adam = optax.scale_by_adam(b1=0.8, b2=0.99)
  updates, scales, state = run(scale_by_relative_snr(adam, **settings), grads)
  np.testing.assert_allclose(scales, expected, rtol=1e-4)
  assert jax.tree.structure(state.inner_state) == jax.tree.structure(
    adam.init({name: jnp.ones(1) for name in grads})
  )

  def step(state, grad):
    return adam.update(grad, state)[::-1]

  grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)
  start = adam.init(jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads))
  _, plain = jax.jit(lambda g: jax.lax.scan(step, start, g))(grads)
  for i, name in enumerate(sorted(grads)):
    factors = scales[:, i].reshape(-1, *[1] * len(SHAPES[name]))
    np.testing.assert_allclose(updates[name], factors * plain[name], rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 3, 40])
def test_signal_and_noise_are_unbiased_from_the_second_update_on(steps):
  random = np.random.default_rng(1)
  noise = random.normal(size=(steps, 20_000))
  grads = {"noise": noise, "quarter": 1 + 2 * noise[:, ::-1]}
  tx = scale_by_relative_snr(decay=0.0, b2=0.9)
  _, _, state = run(tx, grads)
  kappa = 0.1 * (1 + 0.9**steps) / (1.9 * (1 - 0.9**steps))
  np.testing.assert_allclose(state.levels.noise / (1 - kappa), [1, 4], rtol=0.1)
  np.testing.assert_allclose(
    state.levels.signal / (1 - kappa), [0, 1], atol=0.1
  )


def test_the_constant_gradient_gets_more_and_the_noise_less():
  random = np.random.default_rng(2)
  grads = {"constant": np.ones((30, 8)), "noise": random.normal(size=(30, 8))}
  _, scales, _ = run(scale_by_relative_snr(), grads)
  np.testing.assert_allclose(scales[-1], [2.0, 0.5], rtol=1e-5)
  np.testing.assert_array_equal(scales[:2], 1.0)


@pytest.mark.parametrize("unit", [1e-9, 1e6])
def test_does_not_depend_on_the_unit_of_the_gradient(unit):
  grads = gradients(8)
  scaled = jax.tree.map(lambda g: unit * g, grads)
  _, scales, _ = run(quick, grads)
  _, same, _ = run(quick, scaled)
  np.testing.assert_allclose(same, scales, rtol=1e-4)


@pytest.mark.parametrize("bounds", [(0.5, 2.0), (0.9, 5.0), (0.01, 1.01)])
@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_balanced_scales_keep_their_bounds_and_their_mean(bounds, size):
  random = np.random.default_rng(size)
  merits = np.exp(3 * random.normal(size=size)).astype(np.float32)
  known = np.append(merits, np.nan)
  scales = balanced_scales(jnp.asarray(known), 0.7, *bounds)
  assert scales[-1] == 1
  expected = balanced(np.float64(merits), 0.7, *bounds)
  np.testing.assert_allclose(scales[:-1], expected, rtol=1e-4)
  np.testing.assert_allclose(np.mean(np.log(scales)), 0, atol=1e-5)


def test_without_knowledge_all_scales_are_one():
  nothing = jnp.full(3, jnp.nan)
  np.testing.assert_array_equal(balanced_scales(nothing, 0.5, 0.5, 2.0), 1.0)
  assert balanced_scales(jnp.zeros(0), 0.5, 0.5, 2.0).shape == (0,)


partitioned = optax.partition(
  {"adam": optax.scale_by_adam(), "sgd": optax.identity()},
  {"clear": "adam", "mixed": "sgd", "noisy": "adam", "still": "adam"},
)
masked = optax.chain(
  optax.masked(
    optax.scale_by_adam(),
    {"clear": True, "mixed": False, "noisy": True, "still": True},
  ),
  optax.scale(0.5),
)


@pytest.mark.parametrize("inner", [partitioned, masked])
def test_leaves_without_moments_are_left_alone(inner):
  grads = gradients(6)
  _, scales, _ = run(scale_by_relative_snr(inner, decay=0.5), grads)
  del grads["mixed"]
  alone = scale_by_relative_snr(optax.scale_by_adam(), decay=0.5)
  _, expected, _ = run(alone, grads)
  np.testing.assert_array_equal(scales[:, 1], 1.0)
  np.testing.assert_allclose(scales[:, [0, 2, 3]], expected, rtol=1e-5)
  assert np.ptp(expected) > 0.3


def test_the_factors_of_inner_and_of_the_leaves_are_read_together():
  inner = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
  grads = gradients(6)
  _, scales, state = run(scale_by_relative_snr(inner, decay=0.5), grads)
  rates = learning_rates(state, {k: jnp.zeros(s) for k, s in SHAPES.items()})
  np.testing.assert_allclose(
    [rates[name] for name in sorted(SHAPES)], 0.1 * scales[-1], rtol=1e-6
  )


quick_float16 = scale_by_relative_snr(mu_dtype=jnp.float16, decay=0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("tx", [quick, quick_float16], ids=["32", "16"])
def test_no_broken_element_enters_the_moments(bad, tx):
  broken = gradients(5)
  broken["mixed"][1, 0] = bad
  mended = gradients(5)
  mended["mixed"][1, 0] = 0.0
  updates, scales, state = run(tx, broken)
  _, expected, _ = run(tx, mended)
  np.testing.assert_array_equal(scales, expected)
  assert all_finite(state)
  np.testing.assert_array_equal(
    updates["mixed"][1, 0], np.float32(bad) * expected[1, 1]
  )


def test_what_overflows_only_in_the_sum_does_not_stay():
  grads = gradients(40)
  grads["clear"][1] = 1.5e19
  tx = scale_by_relative_snr(b1=0.5)
  _, scales, state = run(tx, grads)
  assert all_finite((scales, state))
  assert scales[-1][0] > scales[-1][2]


def test_moments_that_are_not_finite_are_not_taken_in():
  grads = gradients(4)
  grads["noisy"][2, 0, 0] = math.nan
  inner = optax.scale_by_adam()
  _, scales, state = run(scale_by_relative_snr(inner), grads)
  assert all_finite((scales, state.levels))
  guarded = optax.chain(zero_non_finite(), inner)
  _, _, state = run(scale_by_relative_snr(guarded), grads)
  assert all_finite(state)


@pytest.mark.parametrize(
  "kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit]
)
def test_sharded_parameters_change_nothing(kind):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
  place = lambda x: jax.device_put(
    x, jax.sharding.NamedSharding(mesh, jax.P("x" if x.ndim == 1 else None))
  )
  random = np.random.default_rng(0)
  grads = [
    {"a": jnp.asarray(random.normal(size=8)), "b": jnp.ones((2, 2))}
    for _ in range(4)
  ]
  tx = scale_by_relative_snr(decay=0.5)
  update = jax.jit(tx.update)
  state = tx.init(grads[0])
  for grad in grads:
    expected, state = update(grad, state)
  with jax.set_mesh(mesh):
    sharded = jax.jit(tx.init)(jax.tree.map(place, grads[0]))
    types = jax.tree.map(jax.typeof, sharded)
    for grad in grads:
      updates, sharded = update(jax.tree.map(place, grad), sharded)
  assert jax.tree.map(jax.typeof, sharded) == types
  for name in expected:
    np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"power": -0.1}, r"power must be in \[0, inf\), got power=-0.1"),
    ({"min_scale": 0.0}, r"min_scale must be in \(0, 1\], got min_scale=0.0"),
    ({"max_scale": 0.9}, "max_scale must"),
    ({"decay": 1.0}, "decay must"),
    ({"b1": 0.0}, r"b1 must be in \(0, 1\), got b1=0.0"),
    ({"b2": 1.0}, "b2 must"),
    ({"inner": optax.adam(0.1), "mu_dtype": jnp.bfloat16}, "mu_dtype must be"),
  ],
)
def test_arguments_out_of_range_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    scale_by_relative_snr(**settings)


@pytest.mark.parametrize(
  "inner", [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)]
)
def test_an_inner_transform_without_moments_is_named(inner):
  tx = scale_by_relative_snr(inner)
  with pytest.raises(ValueError, match=r"inner must keep moments .* of 2, in"):
    tx.init({"a": jnp.ones(2), "b": jnp.ones(2)})


def test_the_state_takes_no_second_moment_of_the_elements():
  tx = scale_by_relative_snr(mu_dtype=jnp.bfloat16)
  params = {"a": jnp.ones((50, 50)), "b": jnp.ones((50, 50))}
  leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
  sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
  of_leaves = 4 * 2  # Mean square, signal, noise and scale.
  assert sum(sizes) == 2 * 5000 + 4 * of_leaves + 4
