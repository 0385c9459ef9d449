"""Laws of activations whose sparsity adapts: rules, state, and what is held."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepseek_jax import nn

FEATURES = 8
LAYERS = {
  "fixed": functools.partial(nn.SparseReLU, threshold=0.1, floor=0.2),
  "published": nn.DynamicSparseReLU,
  "published, shifted, by channel, woken": functools.partial(
    nn.DynamicSparseReLU, per="channel", shifted=True, floor=0.2
  ),
  "target": functools.partial(nn.TargetSparseReLU, sparsity=0.75, warmup=5),
  "target, smooth, pressed": functools.partial(
    nn.TargetSparseReLU, sparsity=0.75, gradient="smooth", pressure=0.1
  ),
  "learned": nn.LearnedSparseReLU,
  "learned, smooth, one": functools.partial(
    nn.LearnedSparseReLU, per="tensor", gradient="smooth", floor=0.0
  ),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def inputs(*shape, seed=0, dtype=jnp.float32):
  x = np.random.default_rng(seed).normal(size=(*shape, FEATURES))
  return jnp.asarray(x, dtype)


def build(name, **options):
  return LAYERS[name](FEATURES, **options)


def split(layer):
  structure, params, rest = nnx.split(layer, nnx.Param, ...)
  return structure, nnx.as_pure(params), nnx.as_pure(rest)


def step(structure):
  """Returns a function (params, rest, x) -> (y, rest), as a trainer has it."""

  def run(params, rest, x):
    layer = nnx.merge(structure, params, rest)
    y = layer(x)
    return y, split(layer)[2]

  return run


def state_of(layer):
  return {
    "/".join(map(str, path)): np.asarray(value)
    for path, value in nnx.to_flat_state(nnx.as_pure(nnx.state(layer)))
  }


def assert_states(found, expected, **tolerance):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, **tolerance)


# The published rule.


def published(x, threshold, rate, axis):
  """The rule as it is printed, in NumPy."""
  rate, rest = np.float32(rate), np.float32(1 - rate)
  size = np.mean(np.abs(x), axis, dtype=np.float32)
  threshold = rest * threshold + rate * size
  return np.where(x > threshold, x, np.float32(0)), threshold


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_published_rule_is_its_transcription_bit_for_bit(per, jit):
  layer = nn.DynamicSparseReLU(FEATURES, per=per)
  structure, params, rest = split(layer)
  run = jax.jit(step(structure)) if jit else step(structure)
  threshold = np.full((FEATURES,) if per == "channel" else (), 0.5, np.float32)
  axis = (0, 1) if per == "channel" else None
  rng = np.random.default_rng(3)
  for _ in range(40):
    # Sums of eighths are exact in any order, so that only the rule is compared.
    x = (rng.integers(-24, 25, (4, 16, FEATURES)) / 8).astype(np.float32)
    y, rest = run(params, rest, jnp.asarray(x))
    expected, threshold = published(x, threshold, 0.01, axis)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(rest["threshold"], threshold)
  assert np.min(threshold) > 0.5


def test_published_rule_is_near_its_transcription_on_any_numbers():
  layer = nn.DynamicSparseReLU(FEATURES, threshold=2.0, rate=0.3)
  threshold = np.float32(2)
  for seed in range(10):
    x = inputs(5, 3, seed=seed)
    y = layer(x)
    expected, threshold = published(np.asarray(x), threshold, 0.3, None)
    np.testing.assert_allclose(layer.threshold[...], threshold, rtol=1e-6)
    np.testing.assert_array_equal(y, expected)


def test_published_rule_needs_no_number_of_features():
  layer, other = nn.DynamicSparseReLU(), nn.DynamicSparseReLU(FEATURES)
  for seed in range(3):
    x = inputs(4, seed=seed)
    np.testing.assert_array_equal(layer(x), other(x))
  assert layer.sparsity() == pytest.approx(float(other.sparsity()))


def test_fixed_threshold_of_zero_is_relu():
  x = inputs(4, 5)
  layer = nn.SparseReLU(FEATURES)
  np.testing.assert_array_equal(layer(x), jax.nn.relu(x))
  grads = jax.grad(lambda x: jnp.square(nn.SparseReLU(FEATURES)(x)).sum())(x)
  np.testing.assert_allclose(grads, 2 * jax.nn.relu(x))


# State: what moves when, in which types, and over which batch.


@each_layer
def test_state_rests_in_evaluation_and_moves_in_training(name):
  layer = build(name)
  layer(inputs(4))
  layer.eval()
  before = state_of(layer)
  layer(3 * inputs(4, seed=1))
  after = state_of(layer)
  for path, value in before.items():
    np.testing.assert_array_equal(after[path], value)
  layer.train()
  layer(3 * inputs(4, seed=1))
  assert any(np.any(state_of(layer)[p] != v) for p, v in before.items())


@each_layer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_types_are_kept_and_zeros_are_exact(name, dtype):
  layer = build(name)
  x = inputs(32, dtype=dtype)
  before = {path: value.dtype for path, value in state_of(layer).items()}
  for _ in range(3):
    y = layer(x)
  assert (y.shape, y.dtype) == (x.shape, x.dtype)
  zeros = np.mean(np.asarray(y, np.float32) == 0)
  assert 0.2 < zeros < 1
  assert {p: v.dtype for p, v in state_of(layer).items()} == before
  assert set(before.values()) <= {np.dtype("float32"), np.dtype("int32")}


@each_layer
def test_nothing_but_a_learned_threshold_is_trained(name):
  params = nnx.to_flat_state(nnx.state(build(name), nnx.Param))
  assert [p for p, _ in params] == [("threshold",)] * name.startswith("learned")


@each_layer
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_batch_passes_and_does_not_stay(name, bad):
  layer = build(name)
  layer(inputs(4))
  y = layer(inputs(4).at[0, 0].set(bad))
  assert not np.isfinite(y[0, 0])
  assert all(np.isfinite(value).all() for value in state_of(layer).values())


@contextlib.contextmanager
def mode(graph):
  with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
    yield


@each_layer
def test_graph_mode_is_tree_mode(name):
  found = []
  for graph in (True, False):
    with mode(graph):
      structure, params, rest = split(build(name))
      run = jax.jit(step(structure))
      for seed in range(3):
        y, rest = run(params, rest, inputs(6, seed=seed))
      found.append((y, rest))
  assert_states(found[0][0], found[1][0], atol=0)
  assert_states(found[0][1], found[1][1], atol=0)


def mesh():
  return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def several_steps(run, params, rest, place=lambda x: x):
  for seed in range(3):
    # Of another size in each shard: means of shards are not that of the batch.
    x = inputs(16, 3, seed=seed)
    x = x * jnp.arange(1, 17, dtype=jnp.float32)[:, None, None]
    y, rest = run(params, rest, place(x))
  return y, rest


@each_layer
def test_sharded_batch_under_jit_is_the_whole_batch(name):
  structure, params, rest = split(build(name))
  expected = several_steps(jax.jit(step(structure)), params, rest)
  rows = NamedSharding(mesh(), PartitionSpec("data"))
  found = several_steps(
    jax.jit(step(structure)), params, rest, lambda x: jax.device_put(x, rows)
  )
  assert_states(found, expected, rtol=1e-5, atol=1e-6)


def sharded(structure):
  whole, rows = PartitionSpec(), PartitionSpec("data")
  return jax.jit(
    jax.shard_map(
      step(structure),
      mesh=mesh(),
      in_specs=(whole, whole, rows),
      out_specs=(rows, whole),
    )
  )


@each_layer
def test_named_axis_makes_shards_the_whole_batch(name):
  expected = several_steps(
    jax.jit(step(split(build(name))[0])), *split(build(name))[1:]
  )
  structure, params, rest = split(build(name, axis_name="data"))
  found = several_steps(sharded(structure), params, rest)
  assert_states(found, expected, rtol=1e-5, atol=1e-6)


@each_layer
def test_shards_without_a_named_axis_are_refused(name):
  # What each device would make of its own share is not one state.
  structure, params, rest = split(build(name))
  with pytest.raises(ValueError, match="out_specs"):
    several_steps(sharded(structure), params, rest)


@each_layer
def test_gradients_of_shards_are_those_of_the_whole_batch(name):
  def loss(params, rest, x, structure, mean):
    y, _ = step(structure)(params, rest, x)
    return mean(jnp.square(y))

  structure, params, rest = split(build(name))
  x = inputs(16, 3)
  of_x = functools.partial(jax.grad, argnums=2)
  expected = jax.jit(of_x(lambda *args: loss(*args, structure, jnp.mean)))(
    params, rest, x
  )

  structure, params, rest = split(build(name, axis_name="data"))
  one = of_x(lambda *args: loss(*args, structure, jnp.mean))
  whole, rows = PartitionSpec(), PartitionSpec("data")
  found = jax.jit(
    jax.shard_map(
      lambda *args: one(*args) / 8,
      mesh=mesh(),
      in_specs=(whole, whole, rows),
      out_specs=rows,
    )
  )(params, rest, x)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@each_layer
def test_vmap_keeps_a_state_for_each(name):
  structure, params, rest = split(build(name))
  many = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 3), tree)
  x = jnp.stack([inputs(6, seed=seed) * (seed + 1) for seed in range(3)])
  ys, rests = jax.vmap(step(structure))(many(params), many(rest), x)
  for i in range(3):
    y, one = step(structure)(params, rest, x[i])
    np.testing.assert_allclose(ys[i], y, atol=1e-6)
    assert_states(jax.tree.map(lambda x, i=i: x[i], rests), one, atol=1e-6)


@pytest.mark.parametrize("options", [{"scan": True}, {"remat": True}], ids=str)
@each_layer
def test_stacked_layers_carry_their_states(name, options):
  def stack(**options):
    make = functools.partial(nn.GatedFeedForward, 4, FEATURES)
    layers = [make(activation=build(name), rngs=nnx.Rngs(i)) for i in range(3)]
    return nn.LayerStack(layers, **options)

  def run(stack):
    structure, params, rest = split(stack)

    @jax.jit
    def grads(params, rest, x):
      def loss(params):
        y, new = step(structure)(params, rest, x)
        return jnp.square(y - 1).mean(), new

      return jax.grad(loss, has_aux=True)(params)

    for seed in range(3):
      g, rest = grads(params, rest, inputs(2, seed=seed)[..., :4])
    return nnx.merge(structure, g, rest)

  expected, found = run(stack()), run(stack(**options))
  for one, other in zip(expected.layers, found.unstacked(), strict=True):
    assert_states(split(other)[1:], split(one)[1:], rtol=1e-4, atol=1e-6)
  assert len(nn.sparsity(found)) == 3
  for one, other in zip(
    nn.sparsity(expected).values(), nn.sparsity(found).values(), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=1e-6)
