"""Laws of sparse activations: gradients, what is read, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import deepseek_jax as dj
from deepseek_jax import nn
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.checkpoint import Checkpoints

FEATURES = 32


def split(module):
  structure, params, rest = nnx.split(module, nnx.Param, ...)
  return structure, nnx.as_pure(params), nnx.as_pure(rest)


# Gradients.


def numbers(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("gradient", ["exact", "straight_through", "smooth"])
def test_gradients_at_a_threshold_are_their_formulas(shifted, gradient):
  x, weight = numbers(50), numbers(50, seed=1)
  threshold, width = 0.3, 0.2
  y, pull = jax.vjp(
    lambda x, t: nn.threshold_relu(
      x, t, shifted=shifted, gradient=gradient, width=width
    ),
    jnp.asarray(x, jnp.float32),
    jnp.float32(threshold),
  )
  passes = x > threshold
  expected = np.where(passes, x - threshold * shifted, 0)
  np.testing.assert_allclose(y, expected, atol=1e-6)
  assert np.array_equal(np.asarray(y) == 0, ~passes)

  opened = 1 / (1 + np.exp(-(x - threshold) / width))
  steep = x * opened * (1 - opened) / width
  up = {
    "exact": passes,
    "straight_through": passes | (x > 0),
    "smooth": opened if shifted else opened + steep,
  }[gradient]
  down = {
    "exact": -1.0 * passes * shifted,
    "straight_through": -1.0 * passes if shifted else -steep,
    "smooth": -opened if shifted else -steep,
  }[gradient]
  of_x, of_threshold = pull(jnp.asarray(weight, jnp.float32))
  np.testing.assert_allclose(of_x, weight * up, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(of_threshold, (weight * down).sum(), rtol=1e-4)


def test_pressure_is_an_l1_term_in_the_loss():
  x = jnp.asarray(numbers(12, FEATURES), jnp.float32)
  plain, pressed = (
    nn.SparseReLU(FEATURES),
    nn.SparseReLU(FEATURES, pressure=0.7),
  )
  np.testing.assert_array_equal(plain(x), pressed(x))
  task = lambda y: jnp.sin(y).mean()
  found = jax.grad(lambda x: task(nn.SparseReLU(FEATURES, pressure=0.7)(x)))(x)

  def with_term(x):
    y = nn.SparseReLU(FEATURES)(x)
    return task(y) + 0.7 * jnp.abs(y).mean()

  np.testing.assert_allclose(found, jax.grad(with_term)(x), atol=1e-7)


# Reading.


class Pair(nnx.Module):
  def __init__(self, features=None):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(4, 8, rngs=rngs)
    self.inner = nnx.List([nn.SparseReLU(8), nn.DynamicSparseReLU(features)])

  def __call__(self, x):
    return self.inner[1](self.inner[0](self.first(x)))


def test_zeros_of_a_model_are_those_that_numpy_counts():
  model = Pair(features=8)
  batches = [jnp.asarray(numbers(5, 4, seed=i), jnp.float32) for i in range(4)]
  before = jax.tree.map(np.asarray, split(model)[1:])
  found = nn.measure_sparsity(model, batches)
  after = split(model)[1:]
  jax.tree.map(np.testing.assert_array_equal, after, before)

  model.eval()
  hidden = [jax.nn.relu(model.first(x)) for x in batches]
  both = hidden, [model.inner[1](h) for h in hidden]
  for path, given in zip(("inner/0", "inner/1"), both, strict=True):
    given = np.concatenate(given)
    assert found[path].zeros == pytest.approx(np.mean(given == 0), abs=1e-6)
    assert found[path].dead == np.mean((given == 0).all(0))


def test_layer_that_knows_no_channels_tells_zeros_alone():
  model = Pair()
  model(jnp.asarray(numbers(5, 4), jnp.float32))
  read = nn.sparsity(model)["inner/1"]
  assert 0 < read.zeros < 1
  assert np.isnan(read.dead)


def test_nothing_was_read_before_the_first_call():
  assert np.isnan(nn.SparseReLU(4).sparsity())
  assert np.isnan(nn.sparsity(nnx.List([nn.SparseReLU(4)]))["0"]).all()
  assert nn.sparsity(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) == {}


def call(layer, times, x):
  for _ in range(times):
    layer(jnp.asarray([x], jnp.float32))


def test_channel_that_ceased_to_fire_counts_as_dead():
  layer = nn.SparseReLU(2)
  call(layer, 50, [1, 1])
  assert not layer.dead().any()
  call(layer, 800, [1, -1])
  assert layer.dead().tolist() == [False, True]


# Checkpoints, and training by who knows nothing of it.


def test_state_comes_back_from_a_checkpoint_bit_for_bit(tmp_path):
  columns = {"x": numbers(64, 4).astype(np.float32), "y": np.arange(64) % 3}
  data = dj.data.from_arrays(
    columns, columns, columns, inputs=("x",), target="y"
  )
  stream = iter(dj.data.batches(data.train, 32, prefetch=0))

  def make(train):
    model = nnx.Sequential(
      nnx.Linear(4, 8, rngs=nnx.Rngs(0)),
      nn.TargetSparseReLU(8),
      nn.LearnedSparseReLU(8),
      nn.DynamicSparseReLU(8, per="channel"),
    )
    for seed in range(train):
      model(jnp.asarray(numbers(5, 4, seed=seed), jnp.float32))
    return state_lib.create(model, optax.sgd(0.1), task="classification")

  saved = make(train=3)
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(saved, stream, {}, step=1, best_step=None)
  checkpoints.wait()
  found, _ = checkpoints.restore(1, make(train=0), stream)
  checkpoints.close()
  assert jax.tree.structure(found.rest) == jax.tree.structure(saved.rest)
  jax.tree.map(np.testing.assert_array_equal, found.rest, saved.rest)


# What cannot be.


@pytest.mark.parametrize(
  ("kind", "options", "message"),
  [
    (nn.SparseReLU, {"features": 0}, "features must be .* features=0"),
    (nn.SparseReLU, {"floor": 1.0}, r"floor must be in \[0, 1\), .*1.0"),
    (nn.SparseReLU, {"features": None, "floor": 0.1}, "features must be given"),
    (nn.SparseReLU, {"threshold": np.inf}, "threshold must be finite"),
    (nn.SparseReLU, {"pressure": np.nan}, "pressure must be finite"),
    (nn.SparseReLU, {"pressure": -1.0}, "pressure must be at least 0.*-1.0"),
    (nn.SparseReLU, {"width": 0.0}, "width must be .*above 0.*0.0"),
    (nn.DynamicSparseReLU, {"rate": 0.0}, r"rate must be in \(0, 1\].*0.0"),
    (nn.DynamicSparseReLU, {"rate": 1.5}, r"rate must be in \(0, 1\].*1.5"),
    (
      nn.DynamicSparseReLU,
      {"features": None, "per": "channel"},
      "features must be given with per='channel'",
    ),
    (nn.TargetSparseReLU, {"features": None}, "features must be at least 2"),
    (nn.TargetSparseReLU, {"features": 1}, "features must be at least 2.*1"),
    (nn.TargetSparseReLU, {"sparsity": 0.0}, r"sparsity must be in \(0, 1\)"),
    (nn.TargetSparseReLU, {"sparsity": 1.0}, r"sparsity must be in \(0, 1\)"),
    (nn.TargetSparseReLU, {"sparsity": np.nan}, "sparsity must be in .*nan"),
    (nn.TargetSparseReLU, {"warmup": -1}, "warmup must be an integer.*-1"),
    (nn.LearnedSparseReLU, {"threshold": 5.0}, r"threshold must be in \[-4"),
    (nn.LearnedSparseReLU, {"gradient": "exact"}, "gradient must be 'straight"),
  ],
)
def test_arguments_out_of_range_are_named(kind, options, message):
  with pytest.raises(ValueError, match=message):
    kind(**{"features": FEATURES, **options})


def test_inputs_of_other_width_are_refused():
  with pytest.raises(ValueError, match=r"features=32 .*shape=\(2, 4\)"):
    nn.SparseReLU(FEATURES)(jnp.ones((2, 4)))


def test_share_below_which_channels_are_dead_is_checked():
  with pytest.raises(ValueError, match="below must be in"):
    nn.SparseReLU(4).dead(1.0)


# By name.


@pytest.mark.parametrize("name", nn.SPARSE_ACTIVATIONS)
def test_every_call_by_name_builds_a_new_layer(name):
  first, second = (nn.activation_layer(name, 4) for _ in range(2))
  assert isinstance(first, nn.SPARSE_ACTIVATIONS[name])
  assert first is not second
  assert first(jnp.ones((2, 4))).shape == (2, 4)


def test_functions_by_name_are_the_plain_ones():
  for name, function in nn.ACTIVATIONS.items():
    assert nn.activation_layer(name, 4) is function
  layer = nn.SparseReLU(4)
  assert nn.activation_layer(layer, 4) is layer


def test_options_reach_the_layer_and_are_refused_by_a_function():
  layer = nn.activation_layer(
    "target_sparse_relu", 4, options={"sparsity": 0.5}
  )
  assert layer.target == 0.5
  with pytest.raises(ValueError, match=r"options must be empty .*'relu'"):
    nn.activation_layer("relu", 4, options={"sparsity": 0.5})
  with pytest.raises(ValueError, match="options must be empty"):
    nn.activation_layer(nn.SparseReLU(4), 4, options={"sparsity": 0.5})


@pytest.mark.parametrize(
  ("typo", "nearest"),
  [("target_sparse_rellu", "target_sparse_relu"), ("rellu", "relu")],
)
def test_unknown_layers_are_answered_with_the_nearest_of_both_tables(
  typo, nearest
):
  with pytest.raises(ValueError, match=f"nearest: .*{nearest}"):
    nn.activation_layer(typo, 4)


def test_layer_without_room_for_state_says_so():
  with pytest.raises(ValueError, match="no room for the state"):
    nn.activation("dynamic_sparse_relu")
