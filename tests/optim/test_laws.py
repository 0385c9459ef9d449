"""What every transform obeys: one table of transforms times laws."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import optim
from deepseek_jax.core import all_finite

RULES = ((".*/kernel", 1.0), ("head/.*", 0.5), (".*", 0.25))
SHAPES = {
  "head": {"bias": (8,), "kernel": (8, 2)},
  "trunk": [{"kernel": (2, 8), "scale": (8,)}],
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A factory, its arguments, and what stands before it in a descent."""

  make: Callable[..., optax.GradientTransformation]
  arguments: Mapping[str, Any]
  descent: Callable[[Any], Any] = lambda tx: tx

  def tx(self):
    return self.make(**self.arguments)


def guarded(base):
  """An optimizer of Optax between our guard and our scales."""

  def make(learning_rate):
    return optax.chain(
      optim.zero_non_finite(),
      base(learning_rate),
      optim.scale_by_loss_ratio(0.5, decay=0.5),
      optim.scale_by_layer(RULES),
    )

  return Case(make, {"learning_rate": 0.05})


after_sgd = lambda tx: optax.chain(optax.sgd(0.2), tx)
CASES = {
  "guard": Case(optim.zero_non_finite, {}, after_sgd),
  "rate": Case(optim.scale_by_rate, {"learning_rate": 0.1}),
  "schedule": Case(
    optim.scale_by_rate, {"learning_rate": optim.warmup(0.1, steps=3)}
  ),
  "layer": Case(optim.scale_by_layer, {"rules": RULES}, after_sgd),
  "loss_initial": Case(
    optim.scale_by_loss_ratio, {"power": 0.5, "decay": 0.5}, after_sgd
  ),
  "loss_best": Case(
    optim.scale_by_loss_ratio,
    {"power": -1.0, "decay": 0.5, "reference": "best"},
    after_sgd,
  ),
  "deepseek": Case(optim.deepseek, {"learning_rate": 0.05}),
  "deepseek_all_parts": Case(
    optim.deepseek,
    {
      "learning_rate": 0.05,
      "weight_decay": 1e-4,
      "warmup_steps": 5,
      "layer_rules": RULES,
      "loss_power": 0.5,
    },
  ),
  "guarded_sgd": guarded(functools.partial(optax.sgd, momentum=0.5)),
  "guarded_adamw": guarded(optax.adamw),
  "guarded_lion": guarded(optax.lion),
}
each_case = pytest.mark.parametrize("name", CASES)


def tree(seed, dtype=jnp.float32):
  """A tree of the table's shapes with normal entries."""
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(random.normal(size=shape), dtype),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


@functools.cache
def stepper(name):
  """One jitted step, and a list that grows with every trace of it."""
  tx, traces = CASES[name].tx(), []

  @jax.jit
  def step(params, state, grads, value):
    traces.append(name)
    updates, state = tx.update(grads, state, params, value=value, other=0)
    return updates, state

  return tx, step, traces


def types(state):
  """Shape, dtype, weak type and sharding of every leaf."""
  return jax.tree.map(jax.typeof, state)


def assert_close(a, b, **tolerance):
  tolerance = {"rtol": 1e-5, "atol": 1e-7} | tolerance
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@each_case
def test_takes_unknown_extra_arguments_and_compiles_once(name):
  tx, step, traces = stepper(name)
  params, grads = tree(0), tree(1)
  state = tx.init(params)
  for value in (2.0, 1.0, 3.0):
    before = types(state)
    updates, state = step(params, state, grads, jnp.float32(value))
    assert types(state) == before
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert len(traces) == 1


@each_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_keeps_the_dtype_of_updates_and_state(name, dtype):
  tx = CASES[name].tx()

  def update(params, state):
    return tx.update(params, state, params, value=jnp.float32(1.0))

  params = jax.eval_shape(lambda: tree(0, dtype))
  state = jax.eval_shape(tx.init, params)
  updates, new_state = jax.eval_shape(update, params, state)
  assert types(updates) == types(params)
  assert types(new_state) == types(state)


@each_case
def test_initialises_abstractly(name):
  tx = CASES[name].tx()
  params = tree(0)
  concrete = types(tx.init(params))
  abstract = jax.eval_shape(lambda: params)
  assert types(jax.eval_shape(tx.init, params)) == concrete
  assert types(tx.init(abstract)) == concrete


@each_case
def test_optax_can_map_over_its_params(name):
  tx = CASES[name].tx()
  state = tx.init(tree(0))
  assert_close(optax.tree.map_params(tx, lambda x: x, state), state)


@each_case
def test_hyperparameters_can_be_injected(name):
  case = CASES[name]
  plain, injected = (
    case.tx(),
    optax.inject_hyperparams(case.make)(**case.arguments),
  )
  params = tree(0)
  a, b = plain.init(params), injected.init(params)
  injected_update = jax.jit(injected.update)
  for seed, value in ((1, 2.0), (2, 1.5)):
    grads = tree(seed)
    _, step, _ = stepper(name)
    expected, a = step(params, a, grads, jnp.float32(value))
    updates, b = injected_update(grads, b, params, value=jnp.float32(value))
    assert_close(updates, expected, rtol=1e-4)


def wrap_in_mask(tx, mask):
  return optax.masked(tx, mask)


def wrap_in_partition(tx, mask):
  labels = jax.tree.map(lambda inside: "in" if inside else "out", mask)
  return optax.partition({"in": tx, "out": optax.identity()}, labels)


@each_case
@pytest.mark.parametrize("wrap", [wrap_in_mask, wrap_in_partition])
def test_acts_on_the_leaves_of_a_mask_alone(name, wrap):
  params, grads = tree(0), tree(1)
  mask = jax.tree.map(lambda _: True, params)
  mask["head"]["kernel"] = False
  tx, step, _ = stepper(name)
  expected, _ = step(params, tx.init(params), grads, jnp.float32(1.0))
  expected["head"]["kernel"] = grads["head"]["kernel"]
  tx = wrap(CASES[name].tx(), mask)
  updates, _ = jax.jit(tx.update)(
    grads, tx.init(params), params, value=jnp.float32(1.0)
  )
  assert_close(updates, expected)


@each_case
def test_stands_inside_multi_steps(name):
  params, grads = tree(0), tree(1)
  tx, step, _ = stepper(name)
  expected, _ = step(params, tx.init(params), grads, jnp.float32(1.0))
  every_two = optax.MultiSteps(tx, every_k_schedule=2)
  update = jax.jit(every_two.update)
  state = every_two.init(params)
  none, state = update(grads, state, params, value=jnp.float32(1.0))
  updates, state = update(grads, state, params, value=jnp.float32(1.0))
  assert_close(none, jax.tree.map(jnp.zeros_like, params))
  assert_close(updates, expected)


@each_case
def test_vmap_is_a_loop(name):
  tx, step, _ = stepper(name)
  rows = [(tree(i), tree(i + 3), jnp.float32(i + 1)) for i in range(3)]
  stack = lambda *leaves: jnp.stack(leaves)
  params, grads, values = jax.tree.map(stack, *rows)

  @jax.jit
  @jax.vmap
  def batched(params, grads, value):
    return tx.update(grads, tx.init(params), params, value=value)[0]

  loop = [step(p, tx.init(p), g, v)[0] for p, g, v in rows]
  assert_close(batched(params, grads, values), jax.tree.map(stack, *loop))


@each_case
def test_state_shares_no_buffer_with_the_parameters(name):
  tx = CASES[name].tx()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state):
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
    return optax.apply_updates(params, updates), state

  params = tree(0)
  params, state = step(params, tx.init(params))
  params, state = step(params, state)
  assert all_finite((params, state))


@each_case
@pytest.mark.parametrize(
  "kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit]
)
def test_sharded_parameters_change_nothing(name, kind):
  tx, step, _ = stepper(name)
  params, grads, value = tree(0), tree(1), jnp.float32(1.0)
  _, state = step(params, tx.init(params), grads, value)
  expected, expected_state = step(params, state, grads, value)
  mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
  place = lambda leaf: jax.device_put(leaf, sharding(mesh, leaf))
  params, grads = jax.tree.map(place, (params, grads))
  with jax.set_mesh(mesh):
    state = jax.jit(tx.init)(params)
    _, state = step(params, state, grads, value)
    updates, new_state = step(params, state, grads, value)
  assert types(new_state) == types(state)
  for before, after in zip(
    jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True
  ):
    assert before.sharding.is_equivalent_to(after.sharding, before.ndim)
  assert_close(updates, expected)
  assert_close(new_state, expected_state)


def sharding(mesh, leaf):
  spec = ["x" if size == 8 else None for size in leaf.shape]
  return jax.sharding.NamedSharding(mesh, jax.P(*spec))


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_bad_loss_enters_the_state(name, bad):
  tx, step, _ = stepper(name)
  params, grads = tree(0), tree(1)
  state = tx.init(params)
  for value in (bad, 1.0, bad, 2.0):
    updates, state = step(params, state, grads, jnp.float32(value))
    assert all_finite((updates, state))


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_bad_gradient_enters_the_state(name, bad):
  tx, step, _ = stepper(name)
  params, good = tree(0), tree(1)
  broken = tree(1)
  broken["head"]["bias"] = broken["head"]["bias"].at[0].set(bad)
  state = tx.init(params)
  for grads in (broken, good, broken):
    _, state = step(params, state, grads, jnp.float32(1.0))
    assert all_finite(state)


@each_case
def test_descends_a_quadratic(name):
  tx = CASES[name].descent(CASES[name].tx())
  target = tree(5)

  def loss(params):
    gaps = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
    return sum(jax.tree.leaves(gaps))

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, value=value)
    return (optax.apply_updates(params, updates), state), value

  start = tree(0)
  # Long enough for the slowest layer: rate 0.05, a quarter of it by rule, a
  # tenth of that by the loss.
  (params, _), _ = jax.jit(
    lambda carry: jax.lax.scan(step, carry, length=3_000)
  )((start, tx.init(start)))
  assert loss(params) < 1e-2 * loss(start)


@each_case
def test_survives_a_checkpoint(name, tmp_path):
  tx, step, _ = stepper(name)
  params, grads, value = tree(0), tree(1), jnp.float32(1.0)
  _, state = step(params, tx.init(params), grads, value)
  path = tmp_path / "state.npz"
  np.savez(path, *jax.tree.leaves(state))
  with np.load(path) as saved:
    leaves = [jnp.asarray(leaf) for leaf in saved.values()]
  empty = jax.eval_shape(tx.init, params)
  restored = jax.tree.unflatten(jax.tree.structure(empty), leaves)
  assert types(restored) == types(state)
  once, again = (step(params, s, grads, value) for s in (state, restored))
  assert_close(again, once, rtol=0, atol=0)
