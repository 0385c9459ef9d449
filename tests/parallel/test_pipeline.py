"""Laws of pipelines: they are their layers in turn, on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from stacks import (
  FEATURES,
  LAYERS,
  ROWS,
  arguments,
  compiled,
  layer,
  make_mesh,
  normal,
  placed,
)

from deepseek_jax import parallel

slow = pytest.mark.slow


def in_turn(params, x, *shared):
  apply = lambda x, own: (layer(own, (), x, *shared)[0], None)
  return jax.lax.scan(apply, x, params)[0]


def loss_of(run):
  return jax.value_and_grad(
    lambda *args: jnp.square(run(*args) - 0.3).sum(), argnums=(0, 1, 2, 3)
  )


@functools.cache
def expected():
  return jax.jit(in_turn)(*arguments()), jax.jit(loss_of(in_turn))(*arguments())


def stored(params, repeats):
  order = np.array(parallel.storage_order(LAYERS, repeats))
  return jax.tree.map(lambda v: v[order], params)


def unstored(params, repeats):
  order = np.argsort(parallel.storage_order(LAYERS, repeats))
  return jax.tree.map(lambda v: v[order], params)


def assert_close(found, wanted, rtol=1e-5):
  def check(a, b):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())

  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(check, found, wanted)


@pytest.mark.parametrize(
  ("name", "repeats", "remat"),
  [
    ("stage 2, data 2, tensor 2", 1, False),
    ("stage 2, data 2, tensor 2", 2, True),
    pytest.param("one device", 2, True, marks=slow),
    pytest.param("stage 4, fsdp 2", 1, True, marks=slow),
    pytest.param("stage 2, replica 2, sequence 2", 2, "dots", marks=slow),
  ],
)
def test_a_pipeline_is_its_layers_in_turn(name, repeats, remat):
  mesh = make_mesh(name)
  params, *others = arguments()
  args = placed(mesh, stored(params, repeats), *others)

  def run(*args):
    return parallel.pipeline(
      layer, *args, microbatches=8, repeats=repeats, remat=remat
    )[0]

  def both(*args):
    return run(*args), loss_of(run)(*args)

  y, (loss, grads) = compiled(mesh, both, *args)(*args)
  grads = (unstored(grads[0], repeats), *grads[1:])
  assert_close((y, (loss, grads)), expected())
  # The rows are cut over stages too: all of them share in what comes next.
  parts = mesh.size // mesh.shape["tensor"] // mesh.shape["sequence"]
  assert y.sharding.shard_shape(y.shape)[0] == ROWS // parts


def remembering(params, state, x, factor):
  """A layer with state of every kind, and what it computes from it."""
  # As random numbers: others in every call.
  noise = jnp.sin(state["calls"].astype(jnp.float32)) * factor
  size = jnp.abs(x).mean()
  # As a threshold does: first it follows, then it counts.
  level = 0.8 * state["level"] + 0.2 * size
  y = jnp.tanh(x @ params["inward"]) @ params["outward"] * noise
  state = {
    "key": state["key"],
    "calls": state["calls"] + 1,
    "level": level,
    "most": jnp.maximum(state["most"], size.astype(jnp.bfloat16)),
  }
  return x + y * level, state


def fresh_state():
  return {
    "key": jax.random.split(jax.random.key(3), LAYERS),
    "calls": jnp.arange(LAYERS, dtype=jnp.uint32),
    "level": jnp.linspace(0.5, 1.5, LAYERS),
    "most": jnp.zeros(LAYERS, jnp.bfloat16),
  }


def one_microbatch_after_the_other(params, state, x, factor, microbatches):
  """What is meant: no pipeline, and every micro-batch through all layers."""

  def through_all(state, rows):
    x, factor = rows
    state = jax.lax.stop_gradient(state)
    apply = lambda x, own: remembering(*own, x, factor)
    x, state = jax.lax.scan(apply, x, (params, state))
    return state, x

  cut = lambda v: jnp.stack([v[m::microbatches] for m in range(microbatches)])
  state, y = jax.lax.scan(through_all, state, (cut(x), cut(factor)))
  return y.swapaxes(0, 1).reshape(x.shape), state


@pytest.mark.parametrize(
  ("name", "repeats"),
  [
    pytest.param("stage 2, data 2, tensor 2", 2, marks=slow),
    pytest.param("stage 4, fsdp 2", 1, marks=slow),
  ],
)
def test_state_goes_on_from_microbatch_to_microbatch(name, repeats):
  mesh, microbatches = make_mesh(name), 4

  def loss(run, params, *args):
    y, state = run(params, *args)
    return jnp.square(y).sum(), (y, state)

  def run(params, state, x, factor):
    return parallel.pipeline(
      remembering, params, x, factor, state=state, microbatches=microbatches,
      repeats=repeats,
    )  # fmt: skip

  params, x, factor, _ = arguments()
  state = fresh_state()
  wanted = jax.value_and_grad(
    functools.partial(
      loss,
      functools.partial(
        one_microbatch_after_the_other, microbatches=microbatches
      ),
    ),
    has_aux=True,
  )
  wanted = jax.jit(wanted)(params, state, x, factor)
  found = jax.value_and_grad(functools.partial(loss, run), has_aux=True)
  args = stored(params, repeats), stored(state, repeats), x, factor
  args = jax.device_put(args, NamedSharding(mesh, P()))
  (value, (y, state)), grads = compiled(mesh, found, *args)(*args)
  found = (value, (y, unstored(state, repeats))), unstored(grads, repeats)
  plain = lambda tree: jax.tree.map(
    lambda v: (
      jax.random.key_data(v)
      if jnp.issubdtype(v.dtype, jax.dtypes.prng_key)
      else v
    ),
    tree,
  )
  assert_close(plain(found), plain(wanted))


@jax.custom_vjp
def pulled(x):
  """Gives `x`, and adds to its gradient what no loss asked for."""
  return x


pulled.defvjp(lambda x: (x, x), lambda x, grad: (grad + jnp.sign(x),))


def test_stages_that_wait_leave_no_trace_in_gradients():
  """Neither of what a layer adds by itself nor of what is not a number."""
  mesh = make_mesh("stage 4, fsdp 2")

  def layer(params, state, x):
    # Of zeros, and of rows that went through layers in a wrong order, this
    # overflows or divides by zero.
    size = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
    x = x / size
    bad = jnp.where(jnp.abs(x[..., :1]) > 2, jnp.inf, 0.0)
    return pulled(x * params[None] + 2 * params[None]) + bad, state

  def loss(run):
    return jax.value_and_grad(
      lambda *args: jnp.square(run(*args)).sum(), argnums=(0, 1)
    )

  def in_turn(params, x):
    return jax.lax.scan(lambda x, own: layer(own, (), x), x, params)[0]

  def piped(params, x):
    return parallel.pipeline(layer, params, x, microbatches=4)[0]

  args = normal(LAYERS, FEATURES), normal(ROWS, FEATURES)
  wanted = jax.jit(loss(in_turn))(*args)
  args = jax.device_put(args, NamedSharding(mesh, P()))
  assert_close(compiled(mesh, loss(piped), *args)(*args), wanted)


def test_bfloat16_compiles_and_runs_on_cpus():
  mesh = make_mesh("stage 2, data 2, tensor 2")
  half = lambda tree: jax.tree.map(lambda v: v.astype(jnp.bfloat16), tree)

  def step(*args):
    run = lambda *args: parallel.pipeline(layer, *half(args), microbatches=4)[0]
    return loss_of(run)(*args)

  params, *others = arguments()
  args = placed(mesh, params, *others)
  value, grads = compiled(mesh, step, *args)(*args)
  wanted, exact = expected()[1]
  assert abs(float(value) / float(wanted) - 1) < 0.02
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def test_a_layer_may_divide_its_own_work_by_hand():
  """Another `jax.shard_map` within, as in attention cut by sequence."""
  mesh = make_mesh("stage 2, data 2, tensor 2")
  params, x, factor, shift = arguments()

  def product(x, inward, outward):
    y = jnp.tanh(x @ inward) @ outward
    return jax.lax.psum(y, "tensor")

  def by_hand(params, state, x, factor, shift):
    y = jax.shard_map(
      product,
      in_specs=(P(), P(None, "tensor"), P("tensor")),
      out_specs=P(),
      axis_names={"tensor"},
      check_vma=False,
    )(x, params["inward"], params["outward"])
    return x + factor * y + shift, state

  def run(*args):
    return parallel.pipeline(by_hand, *args, microbatches=4)[0]

  args = placed(mesh, params, x, factor, shift)
  found = compiled(mesh, loss_of(run), *args)(*args)
  assert_close(found, expected()[1])


def test_shared_arguments_may_be_anything():
  """Trees, numbers that shape the program, and nothing at all."""

  def layer(params, state, x, options, power, nothing):
    assert nothing is None
    assert isinstance(power, int)
    return x * params + options["rows"] * options["all"] ** power, state

  params, x = normal(LAYERS), normal(ROWS, 3)
  options = {"rows": normal(ROWS, 1), "all": normal(1, 3)}
  run = lambda *args: parallel.pipeline(
    layer, *args, options, 2, None, microbatches=2
  )[0]
  y = jax.jit(run)(params, x)
  wanted = x
  for i in range(LAYERS):
    wanted, _ = layer(params[i], (), wanted, options, 2, None)
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)


def traced(mesh, rows=ROWS, layers=LAYERS, **how):
  """What tracing a pipeline for a mesh says."""
  counts = []

  def layer(params, state, x):
    counts.append((parallel.batch_parts(), x.shape[0]))
    return x, state

  run = lambda params, x: parallel.pipeline(layer, params, x, **how)[0]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    jax.eval_shape(run, jnp.ones(layers), jnp.ones((rows, 1)))
  return counts[0]


def test_micro_batches_are_four_a_stage_where_rows_allow():
  mesh = make_mesh("stage 2, data 2, tensor 2")
  assert traced(mesh, rows=64) == (8, 8)
  assert traced(mesh, rows=24) == (6, 4)
  assert traced(mesh, rows=4) == (2, 2)
  assert traced(mesh, rows=8, microbatches=2) == (2, 4)
  assert parallel.batch_parts() == 1


@pytest.mark.parametrize(
  ("how", "said"),
  [
    ({"rows": 6}, r"multiple of stages=2 \* 2 devices.*got 6 rows"),
    (
      {"microbatches": 8, "rows": 8},
      r"multiple of microbatches=8 \* 2 devices.*got 8 rows",
    ),
    ({"microbatches": 3}, "microbatches=3 for 2 stages"),
    ({"microbatches": 0}, "got microbatches=0"),
    ({"layers": 6, "repeats": 2}, r"stages \* repeats = 2 \* 2 = 4, got 6"),
    ({"layers": 3}, "= 2, got 3"),
  ],
  ids=str,
)
def test_what_makes_no_pipeline_is_named(how, said):
  with pytest.raises(ValueError, match=said):
    traced(make_mesh("stage 2, data 2, tensor 2"), **how)


ODD = {"inward": np.ones((4, 2)), "outward": np.ones((3, 2))}


@pytest.mark.parametrize(
  ("params", "x", "how", "said"),
  [
    ({}, np.ones((8, 1)), {}, "params must have .* layers, got params={"),
    (np.ones(4), {}, {}, "x must have arrays .* rows of a batch, got x={"),
    (ODD, np.ones((8, 2)), {}, r"as many layers, got shape \(3, 2\) at "
     "'params/outward' beside 4 of params/inward"),
    (np.ones(()), np.ones((8, 1)), {}, r"shape \(\) at 'params'"),
    (np.ones(4), (np.ones(8), np.ones(4)), {}, r"rows .* \(4,\) at 'x/1'"),
    (np.ones(4), np.ones(8), {"state": np.ones(2)}, "at 'state' beside 4"),
    (np.ones(4), np.ones(8), {"remat": "foo"}, "remat must be .*remat='foo'"),
  ],
)  # fmt: skip
def test_arrays_that_make_no_layers_are_named(params, x, how, said):
  with pytest.raises(ValueError, match=said):
    parallel.pipeline(lambda w, state, x: (x, state), params, x, **how)


@pytest.mark.parametrize(
  ("sizes", "said"),
  [
    ((4, 0), "^repeats must be an integer, at least 1, got repeats=0.$"),
    ((0, 1), "num_layers=0"),
    ((5, 2), r"multiple of stages \* repeats = 1 \* 2 = 2, got 5"),
  ],
)
def test_an_order_has_every_layer_once(sizes, said):
  with pytest.raises(ValueError, match=said):
    parallel.storage_order(*sizes)


def test_parameters_on_stages_want_a_current_mesh():
  """They would all be fetched by all, without a word."""
  mesh = make_mesh("stage 4, fsdp 2")
  params = jax.device_put(jnp.ones(LAYERS), NamedSharding(mesh, P("stage")))
  run = lambda w, x: parallel.pipeline(lambda w, s, x: (w * x, s), w, x)[0]
  for call in (run, jax.jit(run)):
    with pytest.raises(ValueError, match=r"params .*stage=4.*jax\.set_mesh"):
      call(params, jnp.ones((8, 1)))
  with jax.set_mesh(mesh):
    assert jax.jit(run)(params, jnp.ones((8, 1))).sharding.spec[0]
