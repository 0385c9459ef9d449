"""Laws of a stack: however it is run, it is its layers in turn."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import nn, parallel
from deepseek_jax.parallel import hlo, hlo_cost

FEATURES, DEPTH = 4, 4
WAYS = {
  "scan": {"scan": True},
  "remat": {"remat": True},
  "scan and remat": {"scan": True, "remat": True},
  "scan and dots": {"scan": True, "remat": "dots"},
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


class Append(nnx.Module):
  """x -> 10 x + its number: the digits of the result say the order."""

  def __init__(self, number, period):
    self.number = nnx.Param(jnp.float32(number))
    self.kind = number % period

  def __call__(self, x):
    return 10 * x + self.number[...]


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

  assert kept(remat=True) <= DEPTH < kept()


def test_with_dots_no_product_is_computed_twice():
  def products(remat):
    stack = nn.LayerStack(layers(), scan=True, remat=remat)
    stack.eval()
    structure, state = nnx.split(stack)
    loss = lambda state, x: nnx.merge(structure, state)(x).sum()
    step = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))
    compiled = step.lower(state, normal(8, FEATURES)).compile()
    return hlo_cost.work(hlo.parse(compiled)).total_flops

  assert products("dots") == products(False)
  assert products(True) == products(False) * 4 / 3


def test_what_to_recompute_is_one_of_three():
  with pytest.raises(
    ValueError, match="False, True or 'dots', got remat='all'"
  ):
    nn.LayerStack(layers(), remat="all")


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
  stack = nn.LayerStack(
    [Append(i, period) for i in range(4)], period=period, **way
  )
  assert float(stack(jnp.float32(7))) == 70123


@pytest.mark.parametrize(("period", "repeats"), [(1, 2), (2, 2), (1, 4)])
def test_layers_come_in_turn_whatever_their_place(period, repeats):
  given = [Append(i, period) for i in range(4)]
  stack = nn.LayerStack(given, scan=True, period=period, repeats=repeats)
  numbers = [float(layer.number[...]) for layer in stack.unstacked()]
  assert numbers == [0, 1, 2, 3]
  np.testing.assert_array_equal(stack(jnp.full(2, 7.0)), [70123, 70123])


def pipeline_mesh():
  return parallel.make_mesh(parallel.MeshSpec(stage=2, data=2, tensor=2))


def stepped(stack, run, x, shift, mesh=None):
  """Loss, gradients and state after a step in training mode."""
  stack.train()
  structure, params, rest = pure(stack)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def step(params, rest, x, shift):
    stack = nnx.merge(structure, params, rest)
    y = run(stack, x, shift)
    return jnp.square(y).sum(), (y, pure(stack)[2])

  args = params, rest, x, shift
  if mesh is None:
    return jax.jit(step)(*args)
  args = jax.device_put(args, NamedSharding(mesh, PartitionSpec()))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(step)(*args)


def one_after_the_other(stack, x, *shared):
  """Calls a stack for four parts of the rows, which make one batch."""
  with parallel.cut_batch(4):
    parts = [stack(x[m::4], *shared) for m in range(4)]
  return jnp.stack(parts, 1).reshape(x.shape)


def by_layer(stack, found):
  """Gradients and state as a loop would have them, of a stack of any kind."""
  (_, (y, rest)), grads = found
  structure = nnx.split(stack, nnx.Param, ...)[0]
  flat = lambda params, rest: nn.LayerStack(
    nnx.merge(structure, params, rest).unstacked()
  )
  _, params, rest = pure(flat(grads, rest))
  return jax.tree.map(lambda x: np.asarray(plain(x)), (y, params, rest))


@pytest.mark.parametrize(
  "how",
  [
    {"period": 2},
    pytest.param({"repeats": 2, "remat": True}, marks=slow),
  ],
  ids=["stages", "circular"],
)
def test_a_pipeline_calls_layers_for_one_microbatch_after_the_other(how):
  """The same numbers on any mesh, of random numbers and thresholds too."""
  x, shift, period = normal(8, FEATURES), normal(1, FEATURES), how.get("period")
  period = period or 1
  loop = nn.LayerStack(layers(period), period=period)
  expected = stepped(loop, one_after_the_other, x, shift)
  stack = nn.LayerStack(layers(period), scan=True, microbatches=4, **how)
  run = lambda stack, *args: stack(*args)
  found = stepped(stack, run, x, shift, pipeline_mesh())
  found = by_layer(stack, found)
  assert_close(found, by_layer(loop, expected))
  assert found[2]["layers"][3]["calls"] == 3 + 4


def test_pressure_in_a_pipeline_is_that_of_the_whole_batch():
  """Though a micro-batch is smaller, and stages that wait see no rows."""

  def layer(seed):
    return nnx.Sequential(
      nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(seed)),
      nn.SparseReLU(pressure=30.0),
    )

  x = normal(8, FEATURES)
  run = lambda stack, x, shift: stack(x)
  loop, stack = (
    nn.LayerStack([layer(i) for i in range(DEPTH)], **how)
    for how in ({}, {"scan": True, "microbatches": 4})
  )
  expected = by_layer(loop, stepped(loop, run, x, x))
  for mesh in (None, pipeline_mesh()):
    found = by_layer(stack, stepped(stack, run, x, x, mesh))
    assert_close(found[:2], expected[:2])
  plain = nn.LayerStack([layer(i) for i in range(DEPTH)])
  for one in plain.layers:
    one.layers[1].pressure = 0.0
  without = by_layer(plain, stepped(plain, run, x, x))
  with pytest.raises(AssertionError):
    assert_close(without[:2], expected[:2])


@slow
def test_experts_may_be_cut_over_devices_in_a_pipeline():
  def layer(seed):
    return nn.MixtureOfExperts(
      FEATURES, 4, 4, balance="auxiliary", auxiliary_weight=3.0,
      rngs=nnx.Rngs(seed),
    )  # fmt: skip

  x = normal(16, 3, FEATURES)
  loop, stack = (
    nn.LayerStack([layer(i) for i in range(2)], **how)
    for how in ({}, {"scan": True, "microbatches": 4})
  )
  run = lambda call: lambda stack, x, shift: call(stack, x)
  expected = stepped(loop, run(one_after_the_other), x, x)
  mesh = parallel.make_mesh(parallel.MeshSpec(stage=2, data=2, expert=2))
  found = stepped(stack, run(lambda stack, x: stack(x)), x, x, mesh)
  assert_close(by_layer(stack, found), by_layer(loop, expected))


def test_in_evaluation_a_pipeline_writes_nothing():
  mesh = pipeline_mesh()
  stack = nn.LayerStack(layers(), scan=True)
  stack.eval()
  x = normal(8, FEATURES)
  expected = stack(x)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    everywhere = NamedSharding(mesh, PartitionSpec())
    found = jax.jit(lambda x: stack(x))(jax.device_put(x, everywhere))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  calls = [int(layer.calls[...]) for layer in stack.unstacked()]
  assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ({}, "^scan must be True on a mesh with stages.*with 2 stages"),
    (
      {"scan": True, "period": 4},
      r"multiple of stages \* repeats \* period = 2 \* 1 \* 4 = 8, got 4",
    ),
    ({"scan": True, "microbatches": 3}, "multiple of the stages.*=3 for 2"),
    ({"scan": True, "microbatches": 8}, "rows.*microbatches=8 .* got 8 rows"),
  ],
)
def test_a_stack_that_makes_no_pipeline_is_named(how, message):
  stack = nn.LayerStack(layers(how.get("period", 1)), **how)
  mesh = pipeline_mesh()
  with (
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    pytest.raises(ValueError, match=message),
  ):
    jax.eval_shape(lambda x: stack(x), normal(8, FEATURES))


@pytest.mark.parametrize(
  ("how", "message"),
  [
    ({"microbatches": 2}, "^microbatches and repeats are for scan=True, got"),
    ({"repeats": 2}, "are for scan=True.*repeats=2"),
    ({"scan": True, "microbatches": 0}, "^microbatches must be .*=0"),
    ({"scan": True, "repeats": 0}, "^repeats must be .*=0"),
    (
      {"scan": True, "repeats": 2, "period": 4},
      r"^period \* repeats must divide the number of layers, got .*=8 for 4",
    ),
  ],
  ids=str,
)
def test_parts_of_a_stack_are_checked(how, message):
  with pytest.raises(ValueError, match=message):
    nn.LayerStack(layers(), **how)


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
