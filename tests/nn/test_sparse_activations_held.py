"""Laws of sparse activations: what was asked for is held, and layers live."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax import nn

FEATURES = 32
# Distances of inputs from the usual ones: (rows, features) -> what is added and
# by what they are multiplied.
INPUTS = {
  "normal": lambda rng, shape: rng.normal(size=shape),
  "heavy tails": lambda rng, shape: rng.standard_t(3, size=shape),
  "all positive": lambda rng, shape: rng.exponential(size=shape),
  "far below zero": lambda rng, shape: rng.normal(size=shape) - 100,
  "tiny": lambda rng, shape: 1e-4 * rng.normal(size=shape),
  "huge": lambda rng, shape: 1e4 * rng.normal(size=shape),
  "channels of other means": lambda rng, shape: (
    rng.normal(size=shape) + 3 * np.cos(np.arange(shape[-1]))
  ),
}


def split(module):
  structure, params, rest = nnx.split(module, nnx.Param, ...)
  return structure, nnx.as_pure(params), nnx.as_pure(rest)


def calls(layer, batches):
  """Calls a layer on each of some batches; the outputs, and the layer moved."""
  structure, params, rest = split(layer)

  @jax.jit
  def run(rest, batches):
    def body(rest, x):
      layer = nnx.merge(structure, params, rest)
      return split_rest(layer(x), layer)

    return jax.lax.scan(body, rest, batches)

  def split_rest(y, layer):
    return split(layer)[2], y

  rest, ys = run(rest, jnp.asarray(batches, jnp.float32))
  return np.asarray(ys), nnx.merge(structure, params, rest)


# What was asked for is held.


@pytest.mark.parametrize("sparsity", [0.3, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("kind", INPUTS)
def test_sparsity_asked_for_is_held_within_one_point(kind, sparsity):
  batches = INPUTS[kind](np.random.default_rng(0), (700, 64, FEATURES))
  layer = nn.TargetSparseReLU(FEATURES, sparsity=sparsity, warmup=50)
  ys, layer = calls(layer, batches)
  assert np.mean(ys[-100:] == 0) == pytest.approx(sparsity, abs=0.01)
  assert layer.sparsity() == pytest.approx(sparsity, abs=0.01)
  layer.eval()
  fresh = INPUTS[kind](np.random.default_rng(1), (512, FEATURES))
  zeros = np.mean(np.asarray(layer(jnp.asarray(fresh, jnp.float32))) == 0)
  assert zeros == pytest.approx(sparsity, abs=0.02)


def test_sparsity_is_held_while_the_inputs_drift():
  rng, steps = np.random.default_rng(0), np.arange(600)[:, None, None]
  # From a normal distribution to one with a single large channel, 30 times it.
  spike = 1 + steps / 60 * (np.arange(FEATURES) == 3)
  batches = rng.normal(size=(600, 64, FEATURES)) * spike * 30 ** (steps / 600)
  ys, _ = calls(nn.TargetSparseReLU(FEATURES, sparsity=0.9), batches)
  zeros = (ys == 0).mean((1, 2))
  assert np.abs(zeros[250:] - 0.9).max() < 0.03
  assert zeros[250:].mean() == pytest.approx(0.9, abs=0.01)


def test_target_rises_in_straight_line_to_what_was_asked_for():
  layer = nn.TargetSparseReLU(FEATURES, sparsity=0.9, warmup=400)
  batches = np.random.default_rng(0).normal(size=(600, 64, FEATURES))
  ys, _ = calls(layer, batches)
  zeros = (ys == 0).mean((1, 2))
  line = 0.5 + 0.4 * np.minimum(np.arange(600) / 400, 1)
  assert np.abs((zeros - line).reshape(-1, 10).mean(1)).max() < 0.06
  at_once = nn.TargetSparseReLU(FEATURES, sparsity=0.9, warmup=0)
  assert np.mean(calls(at_once, batches[:1])[0] == 0) == pytest.approx(
    0.9, abs=0.03
  )


def test_target_scales_and_shifts_with_its_token():
  layer = nn.TargetSparseReLU(FEATURES)
  layer.eval()
  x = jnp.asarray(
    np.random.default_rng(0).normal(size=(6, FEATURES)), jnp.float32
  )
  scale = jnp.arange(1.0, 7.0)[:, None]
  np.testing.assert_allclose(
    layer(scale * x - 5), scale * layer(x), rtol=1e-4, atol=2e-5
  )
  # Each by itself: a language model may not look ahead.
  np.testing.assert_array_equal(layer(x)[:3], layer(x.at[3:].set(9))[:3])


# Layers live.


class Net(nnx.Module):
  """Two units of input to one of output through many that may die."""

  def __init__(self, activation, shift, scale):
    rngs = nnx.Rngs(0)
    self.inward = nnx.Linear(4, FEATURES, rngs=rngs)
    self.activation = activation
    self.outward = nnx.Linear(FEATURES, 1, rngs=rngs)
    self.shift, self.scale = shift, scale

  def __call__(self, x):
    x = self.scale * self.inward(x) + self.shift
    return self.outward(self.activation(x) / self.scale)


ALIVE = {
  "fixed": functools.partial(nn.SparseReLU, floor=0.2),
  "published, woken": functools.partial(nn.DynamicSparseReLU, floor=0.2),
  "published, shifted, by channel, woken": functools.partial(
    nn.DynamicSparseReLU, floor=0.2, shifted=True, per="channel"
  ),
  "target": nn.TargetSparseReLU,
  "target, pressed": functools.partial(nn.TargetSparseReLU, pressure=0.1),
  "learned": nn.LearnedSparseReLU,
  "learned, shifted": functools.partial(
    nn.LearnedSparseReLU, shifted=True, gradient="exact"
  ),
}
STARTS = {
  "huge threshold": (1e3, 0.0, 1.0),
  "inputs far below zero": (None, -100.0, 1.0),
  "inputs far above zero": (None, 100.0, 1.0),
  "tiny inputs": (None, 0.0, 1e-4),
}


def trained(activation, start, steps=1000):
  """Trains for some steps; returns the activation, and losses of all steps."""
  threshold, shift, scale = STARTS[start]
  if threshold is not None:
    set_threshold(activation, threshold)
  structure, params, rest = split(Net(activation, shift, scale))
  tx = optax.adam(1e-2)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)
  target = jnp.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]

  def loss(params, rest):
    net = nnx.merge(structure, params, rest)
    return jnp.square(net(x) - target).mean(), split(net)[2]

  @jax.jit
  def run(params, rest):
    def body(carry, _):
      params, rest, state = carry
      (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(
        params, rest
      )
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(params, updates), rest, state), value

    start = params, rest, tx.init(params)
    return jax.lax.scan(body, start, None, steps)

  (params, rest, _), losses = run(params, rest)
  return nnx.merge(structure, params, rest).activation, np.asarray(losses)


def set_threshold(activation, threshold):
  if hasattr(activation, "threshold"):
    value = activation.threshold[...]
    activation.threshold[...] = jnp.full_like(value, threshold)
  else:
    activation.start = threshold


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ALIVE)
def test_no_layer_is_dead_after_a_thousand_steps_from_a_bad_start(name, start):
  activation, losses = trained(ALIVE[name](FEATURES), start)
  assert np.mean(activation.dead()) <= 0.1
  assert 0 < activation.sparsity() < 1 or start == "inputs far above zero"
  assert np.isfinite(losses).all()


def test_published_rule_dies_where_inputs_are_far_below_zero():
  # As printed. What the law above is about.
  activation, losses = trained(
    nn.DynamicSparseReLU(FEATURES), "inputs far below zero"
  )
  assert activation.dead().all()
  assert losses[-1] > 0.5


def test_single_silent_channel_is_woken_and_others_are_left_alone():
  batches = np.random.default_rng(0).normal(size=(1500, 64, FEATURES))
  batches[..., 5] -= 20
  _, layer = calls(nn.TargetSparseReLU(FEATURES, sparsity=0.75), batches)
  assert not layer.dead().any()
  rates = np.delete(np.asarray(layer.firing[...]), 5)
  assert np.abs(rates - 0.25).max() < 0.1
  _, left = calls(
    nn.TargetSparseReLU(FEATURES, sparsity=0.75, floor=0), batches
  )
  assert np.flatnonzero(left.dead()).tolist() == [5]


@pytest.mark.parametrize("pressure", [0.0, 3.0])
def test_learned_threshold_rises_under_pressure_alone(pressure):
  layer = nn.LearnedSparseReLU(FEATURES, pressure=pressure, floor=0)
  start = layer.threshold[...]
  structure, params, rest = split(layer)
  x = jnp.asarray(
    np.random.default_rng(0).normal(size=(64, FEATURES)), jnp.float32
  )

  def silent(params, rest):
    layer = nnx.merge(structure, params, rest)
    return 0.0 * layer(x).sum(), split(layer)[2]

  @jax.jit
  def step(params, rest):
    grads, rest = jax.grad(silent, has_aux=True)(params, rest)
    return jax.tree.map(lambda p, g: p - 10 * g, params, grads), rest

  for _ in range(300):
    params, rest = step(params, rest)
  (risen,) = jax.tree.leaves(params)
  if pressure:
    assert (risen > start + 0.1).all()
    assert (risen <= 4.5).all()
  else:
    np.testing.assert_array_equal(risen, start)
