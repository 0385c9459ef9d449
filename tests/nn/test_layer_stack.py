"""Laws of a stack: however it is run, it is its layers in turn."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import nn

FEATURES, DEPTH = 4, 4
WAYS = {
  "scan": {"scan": True},
  "remat": {"remat": True},
  "scan and remat": {"scan": True, "remat": True},
}
each_way = pytest.mark.parametrize("way", WAYS)
slow = pytest.mark.slow


class Calls(nnx.Variable):
  """Calls in training mode."""


class Layer(nnx.Module):
  """Every kind of state that a layer may have beside parameters."""

  def __init__(self, seed: int, scale: float):
    self.linear = nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(seed))
    self.activation = nn.DynamicSparseReLU(rate=0.5)
    self.activation.threshold[...] = jnp.full((), 0.1 * seed)
    self.dropout = nnx.Dropout(0.3, rngs=nnx.Rngs(dropout=100 + seed))
    self.calls = Calls(jnp.full((), seed, jnp.int32))
    self.scale = scale  # A layer of another scale is of another kind.
    self.deterministic = False

  def __call__(self, x, shift=None):
    if not self.deterministic:
      self.calls[...] += 1
    y = self.dropout(self.activation(self.linear(x)))
    y = x + self.scale * y
    return y if shift is None else y + shift


def layers(period=1):
  return [Layer(seed, scale=1 + seed % period) for seed in range(DEPTH)]


def normal(*shape):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def pure(stack):
  structure, params, rest = nnx.split(stack, nnx.Param, ...)
  return structure, *map(nnx.to_pure_dict, map(nnx.as_pure, (params, rest)))


def one_by_one(tree, period):
  """Returns what a scanned stack holds as a loop would."""
  cut = lambda i: jax.tree.map(lambda x: x[i // period], tree["layers"])
  return {"layers": {i: cut(i)[i % period] for i in range(DEPTH)}}


@functools.cache
def trained(period, graph=True, **how):
  """Output, gradients and state after two steps in training mode."""
  with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
    stack = nn.LayerStack(layers(period), period=period, **how)
    stack.train()
    structure, params, rest = pure(stack)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(params, rest, x, shift):
      stack = nnx.merge(structure, params, rest)
      y = stack(stack(x, shift), shift)
      return jnp.square(y).sum(), (y, pure(stack)[2])

    x, shift = normal(3, FEATURES), normal(FEATURES)[None]
    (_, (y, rest)), grads = step(params, rest, x, shift)
  if how.get("scan"):
    grads, rest = (one_by_one(tree, period) for tree in (grads, rest))
  return jax.tree.map(np.asarray, jax.tree.map(plain, (y, grads, rest)))


def plain(x):
  is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(x) if is_key else x


def assert_close(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
    first, second,
  )  # fmt: skip


@each_way
@pytest.mark.parametrize("period", [2, pytest.param(1, marks=slow)])
def test_however_it_runs_it_computes_and_remembers_the_same(way, period):
  expected = trained(period)
  assert_close(trained(period, **WAYS[way]), expected)
  state = expected[2]["layers"][3]
  assert state["calls"] == 3 + 2
  assert state["dropout"]["rngs"]["count"] == 2
  assert abs(state["activation"]["threshold"] - 0.3) > 1e-3


@pytest.mark.parametrize(
  "way",
  ["scan and remat"]
  + [pytest.param(way, marks=slow) for way in ("loop", "scan", "remat")],
)
def test_tree_mode_is_graph_mode(way):
  found = trained(2, graph=False, **WAYS.get(way, {}))
  assert_close(found, trained(2))


@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=str)
def test_in_evaluation_it_may_be_closed_over(way):
  stack, x = nn.LayerStack(layers(), **way), normal(3, FEATURES)
  stack.eval()
  before = jax.tree.map(plain, pure(stack)[2])
  expected = functools.reduce(lambda x, layer: layer(x), stack.unstacked(), x)
  runs = (
    jax.jit(lambda x: stack(x)),
    jax.vmap(lambda x: stack(x)),
    lambda x: jax.jvp(stack, (x,), (x,))[0],
  )
  for run in runs:
    np.testing.assert_allclose(run(x), expected, atol=1e-5)
  jax.tree.map(
    np.testing.assert_array_equal, before, jax.tree.map(plain, pure(stack)[2])
  )


@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=str)
def test_eager_calls_in_training_move_the_state(way):
  stack = nn.LayerStack(layers(), **way)
  stack.train()
  for _ in range(3):
    stack(normal(3, FEATURES))
  calls = [int(layer.calls[...]) for layer in stack.unstacked()]
  assert calls == [3, 4, 5, 6]


def test_flax_may_transform_it_too():
  stack = nn.LayerStack(layers(), scan=True, remat=True)
  stack.train()
  # In tree mode `nnx.grad` is asked for gradients of integers, too.
  with nnx.set_graph_mode(True), nnx.set_graph_updates(True):
    grads = nnx.jit(nnx.grad(lambda stack, x: stack(x).sum()))(
      stack, normal(3, FEATURES)
    )
  assert [int(layer.calls[...]) for layer in stack.unstacked()] == [1, 2, 3, 4]
  assert all(np.asarray(g).any() for g in jax.tree.leaves(nnx.as_pure(grads)))


def test_scan_compiles_one_body():
  traces = []

  class Counted(Layer):
    def __call__(self, x):
      traces.append(1)
      return super().__call__(x)

  for scan, bodies in ((True, 1), (False, DEPTH)):
    stack = nn.LayerStack([Counted(i, 1) for i in range(DEPTH)], scan=scan)
    stack.eval()
    traces.clear()
    jax.make_jaxpr(lambda x, stack=stack: stack(x))(normal(3, FEATURES))
    assert len(traces) == bodies


def test_remat_keeps_nothing_but_what_enters_a_layer():
  def kept(**how):
    stack = nn.LayerStack(layers(), **how)
    stack.eval()
    run = lambda x: jax.vjp(stack, x)[1]
    leaves = jax.tree.leaves(jax.eval_shape(run, normal(50, FEATURES)))
    return sum(leaf.shape[-2:] == (50, FEATURES) for leaf in leaves)

  assert kept(remat=True) <= DEPTH
  assert kept() > DEPTH


def test_unstacked_layers_are_those_it_was_made_of():
  given = layers(2)
  stack = nn.LayerStack(given, scan=True, period=2)
  kernels = stack.layers[1].linear.kernel[...]
  assert kernels.shape == (DEPTH // 2, FEATURES, FEATURES)
  for one, other in zip(stack.unstacked(), given, strict=True):
    assert one.scale == other.scale
    jax.tree.map(
      np.testing.assert_array_equal,
      *(jax.tree.map(plain, pure(layer)[1:]) for layer in (one, other)),
    )
  loop = nn.LayerStack(given)
  assert all(a is b for a, b in zip(loop.unstacked(), given, strict=True))


def test_a_stack_is_a_copy_and_leaves_its_layers_alone():
  given = layers()
  stack = nn.LayerStack(given, scan=True)
  stack(normal(3, FEATURES))
  assert [int(layer.calls[...]) for layer in given] == [0, 1, 2, 3]


@pytest.mark.parametrize("period", [1, 2, 4])
@pytest.mark.parametrize("way", [{}, *WAYS.values()], ids=str)
def test_layers_come_in_turn(period, way):
  class Append(nnx.Module):
    """x -> 10 x + its number: the digits of the result say the order."""

    def __init__(self, number):
      self.number = nnx.Param(jnp.float32(number))
      self.kind = number % period

    def __call__(self, x):
      return 10 * x + self.number[...]

  stack = nn.LayerStack([Append(i) for i in range(4)], period=period, **way)
  assert float(stack(jnp.float32(7))) == 70123


def test_layers_are_counted():
  with pytest.raises(ValueError, match=r"^number_of_layers must be .*got"):
    nn.LayerStack([])


@pytest.mark.parametrize(("period", "message"), [
  (0, "^period must be .*got period=0"),
  (3, "^period must divide the number of layers, got period=3 for 4"),
])  # fmt: skip
def test_a_period_divides_the_layers(period, message):
  with pytest.raises(ValueError, match=message):
    nn.LayerStack(layers(), period=period)


def test_scan_refuses_layers_that_differ():
  with pytest.raises(ValueError, match=r"^scan needs equal layers at places 0"):
    nn.LayerStack(layers(2), scan=True)
  wider = [nnx.Linear(FEATURES, n, rngs=nnx.Rngs(0)) for n in (FEATURES, 5)]
  with pytest.raises(ValueError, match="scan=False"):
    nn.LayerStack(wider, scan=True)


def test_layers_are_modules(monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  mixed = [nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jnp.tanh]
  with pytest.raises(ValueError, match=r"^layers must be modules, .*tanh"):
    nn.LayerStack(mixed)
