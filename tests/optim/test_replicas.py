"""Variance between replicas, against its formula and one device."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.core import all_finite
from deepseek_jax.optim.batch_size import noise_scale, suggest_batch_size
from deepseek_jax.optim.readback import learning_rates
from deepseek_jax.optim.replicas import (
  scale_by_microbatch_variance,
  scale_by_replica_variance,
)

SHAPES = {"agreed": (3, 4), "doubtful": (5,), "noise": ()}
P = jax.sharding.PartitionSpec
close = functools.partial(np.testing.assert_allclose, rtol=1e-4)


def mesh(size=8):
  kind = jax.sharding.AxisType.Auto
  return jax.make_mesh((size,), ("data",), axis_types=(kind,))


def gradients(steps, replicas, seed=0):
  """Gradients of all steps and replicas, their noise rising with the name."""
  random = np.random.default_rng(seed)
  part = {"agreed": 0.1, "doubtful": 2.0, "noise": 100.0}
  return {
    name: 1 + part[name] * random.normal(size=(steps, replicas, *shape))
    for name, shape in SHAPES.items()
  }


def at(grads, step):
  return {name: jnp.float32(grad[step]) for name, grad in grads.items()}


def params():
  return {name: jnp.zeros(shape) for name, shape in SHAPES.items()}


def transcription(grads, power, min_scale, max_scale, decay):
  """The formula in NumPy and float64: levels and unclipped scales."""
  signal, noise = np.zeros(3), np.zeros(3)
  for step in range(len(grads["noise"])):
    q = np.maximum(signal, 0) / np.maximum(signal + noise / 4, 1e-30)
    for i, name in enumerate(sorted(grads)):
      g = grads[name][step].reshape(4, -1)
      variance = g.var(axis=0, ddof=1).sum()
      length = np.sum(g.mean(axis=0) ** 2) - variance / 4
      signal[i] = decay * signal[i] + (1 - decay) * length
      noise[i] = decay * noise[i] + (1 - decay) * variance
  gains = np.clip(q, 1e-3, 1 - 1e-3) ** power
  scales = gains / np.exp(np.mean(np.log(gains)))
  assert scales.min() > min_scale
  assert scales.max() < max_scale
  return signal, noise, scales


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_equals_its_transcription(decay):
  grads = gradients(5, replicas=4)
  settings = {"power": 0.25, "min_scale": 0.01, "max_scale": 50.0}
  tx = scale_by_microbatch_variance(decay=decay, **settings)
  update, state = jax.jit(tx.update), tx.init(params())
  for step in range(5):
    updates, state = update(at(grads, step), state)
  signal, noise, scales = transcription(grads, decay=decay, **settings)
  close(state.levels.signal, signal, atol=1e-4)
  close(state.levels.noise, noise)
  close(state.rate_scales, scales, rtol=1e-3)
  for i, name in enumerate(sorted(grads)):
    mean = grads[name][-1].mean(axis=0)
    close(updates[name], scales[i] * mean, rtol=1e-3)
  assert np.ptp(scales) > 0.3


def sharded_step(tx, check_vma=True):
  """Hands each of eight replicas its own gradient."""

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh(),
    in_specs=(P("data"), P()),
    out_specs=P(),
    check_vma=check_vma,
  )
  def step(grads, state):
    local = jax.tree.map(lambda grad: grad[0], grads)
    return tx.update(local, state, params())

  return step


def vmapped_step(tx):
  update = jax.vmap(tx.update, (0, None, None), None, axis_name="data")
  return jax.jit(lambda grads, state: update(grads, state, params()))


adam = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
ROUTES = {
  "checked": sharded_step,
  "unchecked": functools.partial(sharded_step, check_vma=False),
  "vmap": vmapped_step,
}


@pytest.mark.parametrize("route", ROUTES)
def test_replicas_and_microbatches_are_one(route):
  grads = gradients(3, replicas=8)
  one, many = (
    scale_by_microbatch_variance(adam, decay=0.5),
    scale_by_replica_variance("data", adam, decay=0.5),
  )
  a, b = one.init(params()), many.init(params())
  step_one = jax.jit(lambda grads, state: one.update(grads, state, params()))
  step_many = ROUTES[route](many)
  for i in range(3):
    expected, a = step_one(at(grads, i), a)
    updates, b = step_many(at(grads, i), b)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(functools.partial(close, atol=1e-5), (updates, b), (expected, a))
  assert np.ptp(a.rate_scales) > 0.3


def loss(params, batch):
  x, y = batch
  return jnp.mean((x @ params["kernel"] + params["bias"][None] - y) ** 2)


def data_step(tx, cast=True):
  """The step of the docstring."""

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh(),
    in_specs=(P(), P(), P("data")),
    out_specs=(P(), P()),
  )
  def step(params, opt_state, batch):
    local = jax.lax.pcast(params, "data", to="varying") if cast else params
    grads = jax.grad(loss)(local, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return step


def regression():
  random = np.random.default_rng(3)
  x = random.normal(size=(32, 4))
  y = x @ np.arange(8.0).reshape(4, 2) + random.normal(size=(32, 2))
  weights = {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}
  return weights, (jnp.float32(x), jnp.float32(y))


def test_the_recipe_takes_the_step_of_the_whole_batch():
  weights, batch = regression()
  tx = scale_by_replica_variance("data", optax.sgd(0.1), power=0.0)
  new, state = data_step(tx)(weights, tx.init(weights), batch)
  whole = jax.grad(loss)(weights, batch)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, weights, whole)
  jax.tree.map(functools.partial(close, atol=1e-6), new, expected)
  assert 0 < noise_scale(state) < 100


def test_on_the_wire_are_the_gradient_and_one_number_a_leaf():
  weights, batch = regression()
  tx = scale_by_replica_variance("data", optax.adam(0.1))
  lowered = data_step(tx).lower(weights, tx.init(weights), batch)
  program = lowered.compile().as_text()
  sent = re.findall(r"= (.*) all-reduce(?:-start)?\(", program)
  shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(sent))
  sizes = [math.prod(int(n) for n in s.split(",") if n) for s in shapes]
  assert sum(sizes) == 8 + 2 + 2
  assert not re.search("all-gather|all-to-all|collective-permute", program)


def test_a_gradient_that_is_summed_already_is_named():
  weights, batch = regression()
  tx = scale_by_replica_variance("data", optax.sgd(0.1))
  message = r"axis_name='data' already at \['bias', 'kernel'\].*pcast"
  with pytest.raises(ValueError, match=message):
    data_step(tx, cast=False)(weights, tx.init(weights), batch)


def test_one_replica_is_too_few():
  message = "size of at least 2, as one gradient has no variance, got 1"
  many, one = scale_by_replica_variance("data"), scale_by_microbatch_variance()
  grads = at(gradients(1, replicas=1), 0)
  with pytest.raises(ValueError, match=f"axis_name must have a {message}"):
    vmapped_step(many)(grads, many.init(params()))
  with pytest.raises(
    ValueError, match=f"axis of updates must have a {message}"
  ):
    one.update(grads, one.init(params()))


@pytest.mark.parametrize(
  "grads",
  [
    {"a": jnp.ones(()), "b": jnp.ones(3)},
    {"a": jnp.ones((2, 3)), "b": jnp.ones(3)},
  ],
)
def test_a_missing_axis_of_microbatches_is_named(grads):
  tx = scale_by_microbatch_variance()
  with pytest.raises(ValueError, match=r"leading axis .* got shapes \[\("):
    tx.update(grads, tx.init(grads))


@functools.cache
def step_on_each_replica(tx):
  """Returns what every replica holds after a step, stacked."""

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh(),
    in_specs=(P("data"), P("data")),
    out_specs=P("data"),
    check_vma=False,
  )
  def step(grads, states):
    grads, state = jax.tree.map(lambda x: x[0], (grads, states))
    new = tx.update(grads, state, params())
    return jax.tree.map(lambda x: x[None], new)

  return step


guarded = scale_by_replica_variance("data", optax.scale_by_adam(), decay=0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_broken_replica_counts_as_zero_and_all_agree(bad):
  grads, mended = gradients(3, replicas=8), gradients(3, replicas=8)
  grads["doubtful"][:, 3, 1], mended["doubtful"][:, 3, 1] = bad, 0.0
  step = step_on_each_replica(guarded)
  stack = lambda x: jnp.stack(8 * [x])
  states = expected = jax.tree.map(stack, guarded.init(params()))
  for i in range(3):
    updates, states = step(at(grads, i), states)
    _, expected = step(at(mended, i), expected)
  assert all_finite((updates, states))
  for leaf in jax.tree.leaves((updates, states)):
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
  jax.tree.map(np.testing.assert_array_equal, states, expected)


def test_squares_that_overflow_only_in_sum_do_not_stay():
  tx = scale_by_microbatch_variance(decay=0.5)
  grads = gradients(2, replicas=4)
  update = jax.jit(tx.update)
  _, before = update(at(grads, 0), tx.init(params()))
  grads["doubtful"][1] = 1.5e19
  _, after = update(at(grads, 1), before)
  assert all_finite(after)
  assert after.levels.noise[1] == before.levels.noise[1]
  assert after.levels.noise[0] != before.levels.noise[0]


@pytest.mark.parametrize("replicas", [2, 4, 16])
def test_the_batch_size_does_not_depend_on_how_the_batch_is_split(replicas):
  random = np.random.default_rng(4)
  # Per example: variance 9 in 50 elements, squared gradient 50: 9 examples.
  examples = 1 + 3 * random.normal(size=(400, replicas, 32 // replicas, 50))
  grads = jnp.float32(examples.mean(axis=2))
  tx = scale_by_microbatch_variance(decay=0.99)
  follow = lambda state, grad: (tx.update(grad, state)[1], None)
  state = tx.init(jnp.zeros(50))
  state, _ = jax.jit(lambda s: jax.lax.scan(follow, s, grads))(state)
  close(suggest_batch_size(state, 32 // replicas), 9.0, rtol=0.1)


def test_the_noise_scale_sums_over_the_parts_of_a_partition():
  grads = gradients(1, replicas=4)
  make = lambda: scale_by_microbatch_variance()
  labels = {"agreed": "a", "doubtful": "b", "noise": "a"}
  parts = optax.partition({"a": make(), "b": make()}, labels)
  scales = []
  for tx in (make(), parts):
    state = tx.init(params())
    assert jnp.isnan(noise_scale(state))
    _, state = jax.jit(tx.update)(at(grads, 0), state)
    scales.append(noise_scale(state))
  close(*scales)


def test_the_noise_scale_is_infinite_without_a_signal():
  tx = scale_by_microbatch_variance()
  _, state = tx.update(jnp.array([1.0, -1.0]), tx.init(jnp.zeros(())))
  assert noise_scale(state) == math.inf


def test_what_cannot_be_read_is_named():
  state = scale_by_microbatch_variance().init(jnp.zeros(2))
  with pytest.raises(ValueError, match=r"\[1, inf\), got replica_batch_size=0"):
    suggest_batch_size(state, 0)
  with pytest.raises(ValueError, match="opt_state must hold a ScaleByReplica"):
    noise_scale(optax.adam(0.1).init(jnp.zeros(2)))


def test_agreement_gets_more_and_noise_less_with_geometric_mean_one():
  inner = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
  tx = scale_by_microbatch_variance(inner)
  signs = jnp.array([1.0, -1.0, 1.0, -1.0])
  grads = {"agreed": 1 + 0 * signs, "doubtful": 1 + signs, "noise": signs}
  weights = jax.tree.map(lambda _: jnp.zeros(()), grads)
  update, state = jax.jit(tx.update), tx.init(weights)
  for _ in range(2):
    _, state = update(grads, state, weights)
  agreed, doubtful, noise = state.rate_scales
  assert agreed > doubtful > noise
  close(agreed * doubtful * noise, 1.0)
  rates = learning_rates(state, weights)
  close([rates[name] for name in sorted(SHAPES)], 0.1 * state.rate_scales)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"power": math.inf}, r"power must be in \[0, inf\)"),
    ({"min_scale": 1.5}, r"min_scale must be in \(0, 1\], got min_scale=1.5"),
    ({"max_scale": math.inf}, "max_scale must"),
    ({"decay": -0.5}, r"decay must be in \[0, 1\), got decay=-0.5"),
  ],
)
def test_arguments_out_of_range_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    scale_by_replica_variance("data", **settings)
  with pytest.raises(ValueError, match=message):
    scale_by_microbatch_variance(**settings)
