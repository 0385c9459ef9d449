"""`compact_moments` and its codes: what they keep, and what they never do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import optim
from deepseek_jax.core import all_finite
from deepseek_jax.optim.codes import (
  BlockInt8,
  from_int8,
  to_bfloat16,
  to_int8,
)
from deepseek_jax.optim.compact import (
  bytes_per_parameter,
  compact_moments,
  expand_moments,
)

DTYPES = ("int8", "bfloat16")
ROUNDINGS = {
  "int8": lambda x, count: from_int8(to_int8(x, count, 0, 32)),
  "bfloat16": lambda x, count: to_bfloat16(x, count, 0).astype(jnp.float32),
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def spread(seed, shape, decades=3):
  """Numbers of both signs, over some orders of magnitude."""
  random = np.random.default_rng(seed)
  sizes = 10.0 ** random.uniform(-decades, 0, shape)
  return (sizes * random.choice([-1, 1], shape)).astype(np.float32)


def grid(block):
  """All numbers that a block can hold, in float64, from its docstring."""
  scale = np.abs(block).max().astype(np.float64)
  if (block >= 0).all():
    return scale * (np.arange(255) / 254) ** 4
  codes = np.arange(-127, 128)
  return scale * np.sign(codes) * (codes / 127) ** 4


def rounded_often(dtype, values, times=2_000):
  counts = jnp.arange(times)
  rounded = jax.vmap(lambda c: ROUNDINGS[dtype](values, c))(counts)
  return np.asarray(rounded, np.float64)


@pytest.mark.parametrize("one_sign", [False, True])
def test_int8_rounds_to_a_neighbour_on_its_grid(one_sign):
  values = spread(0, (4, 64))
  values = np.abs(values) if one_sign else values
  found = np.asarray(from_int8(to_int8(values, 0, 0, 32)))
  blocks = zip(values.reshape(-1, 32), found.reshape(-1, 32), strict=True)
  for block, rounded in blocks:
    points = grid(block)
    gaps = np.abs(rounded[:, None] - points)
    np.testing.assert_array_less(gaps.min(1), 1e-5 * np.abs(rounded))
    # At most one point away: nothing of the grid lies in between.
    low, high = np.minimum(block, rounded), np.maximum(block, rounded)
    slack = 1e-5 * np.abs(high - low)
    between = (points > (low + slack)[:, None]) & (
      points < (high - slack)[:, None]
    )
    is_end = gaps <= 1e-5 * np.abs(rounded)[:, None]
    assert not (between & ~is_end).any()


@each_dtype
@pytest.mark.parametrize("one_sign", [False, True])
def test_rounding_has_no_bias(dtype, one_sign):
  values = spread(1, (64,))
  values = np.abs(values) if one_sign else values
  rounded = rounded_often(dtype, values)
  error = rounded.mean(0) - values
  sigma = rounded.std(0) / math.sqrt(len(rounded))
  assert (rounded.std(0) > 0).mean() > 0.9
  assert (np.abs(error) < 5 * sigma + 1e-6 * np.abs(values)).all()


@each_dtype
def test_zero_stays_zero_and_nothing_else_becomes_zero(dtype):
  tiny = np.float32(1e-30)
  values = np.array([0, tiny, -tiny, 1, 0, 0, 0, tiny], np.float32)
  rounded = rounded_often(dtype, np.tile(values, 8), times=50)
  zero = np.tile(values == 0, 8)
  assert (rounded[:, zero] == 0).all()
  assert (rounded[:, ~zero] != 0).all()
  np.testing.assert_array_equal(
    np.sign(rounded[0]), np.sign(np.tile(values, 8))
  )


@each_dtype
def test_what_is_not_finite_becomes_zero_and_spares_its_neighbours(dtype):
  values = np.array([math.nan, 1.0, math.inf, -2.0, -math.inf, 3e38, 0, 1])
  rounded = ROUNDINGS[dtype](jnp.asarray(values, jnp.float32), 0)
  assert all_finite(rounded)
  assert (np.asarray(rounded)[[0, 2, 4]] == 0).all()
  values[5] = 4.0
  rounded = ROUNDINGS[dtype](jnp.asarray(values, jnp.float32), 0)
  np.testing.assert_allclose(np.asarray(rounded)[[1, 3, 5]], [1, -2, 4], 0.04)


@pytest.mark.parametrize(
  ("shape", "blocks"), [((6, 96), 3), ((7,), 1), ((2, 3, 37), 1), ((5, 40), 2)]
)
def test_blocks_divide_every_axis(shape, blocks):
  values = jnp.asarray(spread(2, shape))
  packed = to_int8(values, 0, 0, 32)
  assert packed.codes.shape == shape
  assert packed.codes.dtype == jnp.int8
  assert packed.scales.shape == (*shape[:-1], blocks)
  np.testing.assert_allclose(from_int8(packed), values, rtol=1.5)


def followed(tx, params):
  """The mean of an average of squares after a large and a small gradient."""

  def step(state, size):
    grads = jax.tree.map(lambda p: jnp.full_like(p, size), params)
    return tx.update(grads, state, params)[1], None

  sizes = jnp.where(jnp.arange(4_000) < 2_000, 1.0, 0.1)
  state = jax.jit(lambda s: jax.lax.scan(step, s, sizes)[0])(tx.init(params))
  nu = expand_moments(optax.tree.get(state, "nu"))
  return np.asarray(nu, np.float32).mean()


@each_dtype
@pytest.mark.parametrize("params_dtype", [jnp.float32, jnp.bfloat16])
def test_an_average_follows_its_target(dtype, params_dtype):
  base = optax.scale_by_rms(decay=0.999)
  params = jnp.ones((8, 64), params_dtype)
  found = followed(compact_moments(base, dtype, min_size=1), params)
  expected = followed(base, params.astype(jnp.float32))
  np.testing.assert_allclose(found, expected, rtol=0.03)


@pytest.mark.parametrize(
  ("dtype", "most"), [("int8", 2.04), ("bfloat16", 4.01)]
)
def test_adam_takes_the_bytes_that_were_promised(dtype, most):
  params = {"kernel": jnp.ones((64, 512)), "embedding": jnp.ones((100, 256))}
  tx = compact_moments(optax.adam(1e-3), dtype)
  state = jax.eval_shape(tx.init, params)
  assert bytes_per_parameter(state, params) < most
  assert bytes_per_parameter(optax.adam(1e-3).init(params), params) > 8


# Equal to the last bit is what users run, not what the tests compile hastily.
FULLY = {
  "xla_backend_optimization_level": 3,
  "xla_llvm_disable_expensive_passes": False,
}


@each_dtype
def test_steps_stay_near_those_of_float32(dtype):
  base = optax.scale_by_adam()
  tx = compact_moments(base, dtype, min_size=1)
  params = jnp.zeros((16, 64))
  scale = jnp.abs(spread(3, (16, 64), decades=2))

  def step(states, key):
    grads = scale * (1 + jax.random.normal(key, params.shape))
    a, first = base.update(grads, states[0], params)
    b, second = tx.update(grads, states[1], params)
    return (first, second), jnp.linalg.norm(a - b) / jnp.linalg.norm(a)

  keys = jax.random.split(jax.random.key(0), 500)
  start = (base.init(params), tx.init(params))
  run = jax.jit(
    lambda states: jax.lax.scan(step, states, keys)[1],
    compiler_options=FULLY,
  )
  errors = run(start)
  assert errors[0] == 0
  assert errors[-100:].mean() < {"int8": 0.15, "bfloat16": 0.03}[dtype]


def test_only_moments_are_packed():
  params = {"kernel": jnp.ones((8, 64)), "bias": jnp.ones(64)}

  def init(params):
    like = jax.tree.map(jnp.zeros_like, params)
    return {
      "moment": like,
      "basis": {"kernel": jnp.eye(64)},
      "rates": jnp.ones(9),
    }

  update = lambda grads, state, params=None: (grads, state)
  inner = optax.GradientTransformation(init, update)
  state = compact_moments(inner, min_size=100).init(params).inner_state
  assert isinstance(state["moment"]["kernel"], BlockInt8)
  assert state["moment"]["bias"].dtype == jnp.float32
  assert state["basis"]["kernel"].dtype == jnp.float32
  assert state["rates"].dtype == jnp.float32


@each_dtype
@pytest.mark.parametrize(
  "wrap",
  [
    lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
    lambda tx: optax.partition(
      {"a": tx, "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}
    ),
  ],
)
def test_masks_and_partitions_stand_inside_or_outside(dtype, wrap):
  params = {"kernel": jnp.ones((8, 64)), "bias": jnp.ones(64)}
  pack = lambda tx: compact_moments(tx, dtype, min_size=100)
  states = [
    wrap(pack(optax.adam(0.1))).init(params),
    pack(wrap(optax.adam(0.1))).init(params),
  ]
  for state in states:
    mu = optax.tree.get(state, "mu")["kernel"]
    assert isinstance(mu, BlockInt8) or mu.dtype == jnp.bfloat16


@each_dtype
def test_rates_are_read_through(dtype):
  params = {"kernel": jnp.ones((8, 64)), "bias": jnp.ones(64)}
  adam = optax.inject_hyperparams(optax.adam)(learning_rate=0.25)
  tx = compact_moments(adam, dtype, min_size=1)
  rates = optim.learning_rates(tx.init(params), params)
  assert {path: float(rate) for path, rate in rates.items()} == {
    "bias": 0.25,
    "kernel": 0.25,
  }
  masked = optax.masked(tx, {"kernel": True, "bias": False})
  rates = optim.learning_rates(masked.init(params), params, strict=False)
  assert {path: float(rate) for path, rate in rates.items()} == {"kernel": 0.25}


def sharded_updates(dtype, mesh, spec, shape):
  """The second update and state, and the types of both states."""
  tx = compact_moments(optax.adam(0.1), dtype, min_size=1, block=16)
  params, grads = jnp.ones(shape), jnp.asarray(spread(4, shape))
  if mesh is not None:
    place = jax.sharding.NamedSharding(mesh, spec)
    params, grads = jax.device_put((params, grads), place)
  step = jax.jit(tx.update)
  _, first = step(grads, jax.jit(tx.init)(params), params)
  updates, second = step(grads, first, params)
  types = [jax.tree.map(jax.typeof, state) for state in (first, second)]
  return jax.device_get((updates, second)), types


AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


@pytest.mark.parametrize(
  ("dtype", "kind", "spec", "shape"),
  [
    ("int8", AUTO, jax.P("x", None), (8, 64)),
    ("int8", AUTO, jax.P("y", "x"), (4, 24)),
    ("int8", EXPLICIT, jax.P("x", None), (8, 64)),
    ("int8", EXPLICIT, jax.P("y", "x"), (4, 24)),  # Shards cut through blocks.
    ("int8", EXPLICIT, jax.P(None, ("x", "y")), (3, 128)),
    ("int8", EXPLICIT, jax.P("x"), (16,)),
    ("bfloat16", AUTO, jax.P("y", "x"), (4, 24)),
    ("bfloat16", EXPLICIT, jax.P("y", "x"), (4, 24)),
  ],
)
def test_sharding_changes_nothing(dtype, kind, spec, shape):
  expected, _ = sharded_updates(dtype, None, spec, shape)
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
  with jax.set_mesh(mesh):
    found, (before, after) = sharded_updates(dtype, mesh, spec, shape)
  assert before == after
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6
    )


@each_dtype
def test_a_bad_gradient_never_enters_the_state(dtype):
  tx = compact_moments(optax.adam(0.1), dtype, min_size=1)
  params = jnp.ones((2, 32))
  state = tx.init(params)
  for bad in (math.nan, math.inf, 1e25):
    _, state = tx.update(params.at[0, 3].set(bad), state, params)
    assert all_finite(expand_moments(state))
  updates, _ = tx.update(params, state, params)
  assert all_finite(updates)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"block": 1}, "block must be an integer, at least 2, got block=1"),
    ({"min_size": 0}, "min_size must be an integer, at least 1"),
  ],
)
def test_arguments_out_of_range_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    compact_moments(optax.adam(0.1), **arguments)


@pytest.mark.parametrize(
  "inner",
  [
    optim.anytime_average(optax.adam(0.1)),
    optim.deepseek(),
    optax.chain(optax.clip(1.0), optax.contrib.schedule_free_adamw(0.1)),
  ],
  ids=["average", "deepseek", "schedule_free"],
)
def test_averages_of_parameters_are_refused(inner):
  params = {"kernel": jnp.ones((64, 64))}
  with pytest.raises(ValueError, match=r"inner must hold moments.* Wrap"):
    compact_moments(inner).init(params)
  with pytest.raises(ValueError, match="inner must hold moments"):
    jax.eval_shape(compact_moments(inner).init, params)


def test_no_parameters_have_no_bytes_each():
  with pytest.raises(ValueError, match="params must hold a parameter"):
    bytes_per_parameter(optax.adam(0.1).init({}), {})
