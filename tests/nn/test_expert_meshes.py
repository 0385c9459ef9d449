"""Laws of mixtures of experts whose tokens and experts lie on many devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import nn, parallel
from deepseek_jax.train import state as state_lib

FEATURES, HIDDEN, EXPERTS, TOP_K = 12, 16, 8, 2
BATCH, TIME = 8, 16
slow = pytest.mark.slow


def build(**options):
  defaults = {"num_experts": EXPERTS, "top_k": TOP_K}
  return nn.MixtureOfExperts(
    FEATURES, HIDDEN, **defaults | options, rngs=nnx.Rngs(0)
  )


def draw(batch=BATCH, time=TIME):
  x = np.random.default_rng(0).normal(size=(batch, time, FEATURES))
  return jnp.asarray(x, jnp.float32)


def mesh_of(**sizes):
  sizes = {"data": 1} | sizes
  devices = jax.devices()[: math.prod(sizes.values())]
  return parallel.make_mesh(parallel.MeshSpec(**sizes), devices)


def training_step(layer):
  """Returns (params, rest, x) -> (loss, (y, rest)), grads; and the state."""
  structure, params, rest = state_lib.split(layer)

  def loss(params, rest, x):
    layer = nnx.merge(structure, params, rest)
    y = layer(x).astype(jnp.float32)
    return jnp.square(jnp.sin(y)).mean(), (y, state_lib.split(layer)[2])

  return jax.value_and_grad(loss, (0, 2), has_aux=True), params, rest


def placed(mesh, params, rest, x):
  """Experts over "expert", their units over "tensor", storage over "fsdp"."""

  def put(path, leaf):
    spec = P()
    if "experts" in jax.tree_util.keystr(path):
      is_down = "down" in jax.tree_util.keystr(path)
      dims = ("tensor", "fsdp") if is_down else ("fsdp", "tensor")
      spec = P("expert", *dims)
    return jax.device_put(leaf, NamedSharding(mesh, spec))

  params, rest = jax.tree_util.tree_map_with_path(put, (params, rest))
  rows = NamedSharding(mesh, P(parallel.BATCH_AXES, "sequence"))
  return params, rest, jax.device_put(x, rows)


def run_on(mesh, layer, x):
  """Returns the result of a step on a mesh, and the compiled step."""
  step, *state = training_step(layer)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    arguments = placed(mesh, *state, x)
    compiled = jax.jit(step).lower(*arguments).compile()
  return jax.device_get(compiled(*arguments)), compiled


@pytest.fixture(scope="module")
def one_device():
  """The step of one device, by kind of balance."""
  found = {}

  def run(balance):
    if balance not in found:
      step, *state = training_step(build(balance=balance, num_shared=1))
      found[balance] = jax.device_get(jax.jit(step)(*state, draw()))
    return found[balance]

  return run


def assert_equal(found, expected, rtol=1e-5):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize(
  ("sizes", "balance"),
  [
    ({"expert": 2, "sequence": 2, "tensor": 2}, "bias"),
    *(
      pytest.param(sizes, balance, marks=slow)
      for sizes, balance in (
        ({"expert": 2, "fsdp": 2, "sequence": 2}, "auxiliary"),
        ({"data": 2, "expert": 2, "tensor": 2}, "bias"),
        ({"expert": 8}, "bias"),
        ({"expert": 4, "replica": 2}, "bias"),
        ({"expert": 2, "fsdp": 4}, "bias"),
        ({"tensor": 8}, "bias"),
        ({"data": 4, "sequence": 2}, "bias"),
      )
    ),
  ],
  ids=str,
)
def test_any_mesh_computes_what_one_device_does(one_device, sizes, balance):
  layer = build(balance=balance, num_shared=1)
  found, _ = run_on(mesh_of(**sizes), layer, draw())
  assert_equal(found, one_device(balance))
  # Loads were counted on all devices: state and outputs are equal, and moved.
  rest = found[0][1][1]
  assert rest["reading"]["calls"] == 1
  assert rest["reading"]["dropped"] == 0
  assert balance != "bias" or rest["bias"].any()


def test_what_finds_no_room_is_dropped_counted_and_said():
  factor, sizes = 0.75, {"expert": 4, "data": 2}
  layer, x, mesh = build(capacity_factor=factor), draw(), mesh_of(**sizes)
  found, compiled = run_on(mesh, layer, x)
  y, rest = found[0][1]
  tokens = BATCH * TIME // 8
  room = math.ceil(factor * tokens * TOP_K / EXPERTS)
  routing = jax.jit(lambda x: layer.route(x))(x)
  chosen = np.asarray(routing.chosen).reshape(8, tokens, TOP_K)
  kept = np.ones_like(chosen, bool)
  for device in range(8):
    taken = np.zeros(EXPERTS, int)
    for token, experts in enumerate(chosen[device]):
      kept[device, token] = taken[experts] < room
      taken[experts] += 1
  share = 1 - kept.mean()
  assert 0.1 < share < 0.6
  np.testing.assert_allclose(rest["reading"]["dropped"], share, rtol=1e-6)
  # What is dropped weighs nothing, and nothing makes up for it.
  weights = routing.weights * kept.reshape(BATCH, TIME, TOP_K)
  expected = jax.jit(lambda x: layer.experts(x, routing.chosen, weights)[0])(x)
  np.testing.assert_allclose(y, expected, atol=1e-6)
  # Bytes by hand: there and back, and both again for the gradients; three of
  # four parts leave a device.
  rows = 4 * EXPERTS * room * 3 // 4
  sent = parallel.wire_bytes(compiled, mesh)["all-to-all"]
  assert sent == {"expert": 4 * FEATURES * rows}


def test_rows_that_do_not_divide_are_computed_by_all():
  layer, x = build(capacity_factor=0.1), draw(batch=3, time=5)
  structure, *state = state_lib.split(layer)
  run = lambda params, rest, x: nnx.merge(structure, params, rest)(x)
  expected = jax.jit(run)(*state, x)
  mesh = mesh_of(expert=2, data=2)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    params, rest, _ = placed(mesh, *state, draw())
    found = jax.jit(run)(params, rest, x)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_experts_that_do_not_divide_are_an_error():
  layer = build(num_experts=6)
  mesh = mesh_of(expert=4)
  with (
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    pytest.raises(
      ValueError, match=r"^num_experts must be a multiple .*6 for expert=4"
    ),
  ):
    jax.eval_shape(lambda x: layer(x), draw())


@slow
def test_it_may_stand_inside_of_a_pipeline():
  """In a `jax.shard_map` of stages, forth and back."""
  layers = [build(), build(num_shared=0)]
  layers[1].router.kernel[...] *= -1
  structure = state_lib.split(layers[0])[0]
  stacked = jax.tree.map(
    lambda *x: jnp.stack(x), *(state_lib.split(layer)[1:] for layer in layers)
  )
  call = lambda state, i, x: nnx.merge(
    structure, *jax.tree.map(lambda x: x[i], state)
  )(x)

  def by_stage(state, x):
    run = lambda state, x: jax.lax.psum(call(state, 0, x), "stage")
    return jax.shard_map(
      run, in_specs=(P("stage"), P()), out_specs=P(), axis_names={"stage"}
    )(state, x)

  def in_turn(state, x):
    return call(state, 0, x) + call(state, 1, x)

  def gradients(run):
    loss = lambda params, rest, x: jnp.square(run((params, rest), x)).mean()
    return jax.jit(jax.value_and_grad(loss))

  expected = gradients(in_turn)(*stacked, draw())
  mesh = mesh_of(stage=2, data=2, expert=2)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    rows = NamedSharding(mesh, P(parallel.BATCH_AXES))
    state = jax.device_put(stacked, NamedSharding(mesh, P("stage")))
    found = gradients(by_stage)(*state, jax.device_put(draw(), rows))
  assert_equal(found, expected)


@slow
def test_bfloat16_runs_on_a_mesh():
  layer, wide = build(dtype=jnp.bfloat16), build()
  found, _ = run_on(mesh_of(expert=2, data=2, tensor=2), layer, draw())
  expected, _ = run_on(mesh_of(), wide, draw())
  np.testing.assert_allclose(found[0][1][0], expected[0][1][0], atol=0.03)
  # The router is float32.
  assert_equal(found[0][1][1], expected[0][1][1])
