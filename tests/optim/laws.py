"""What every transform obeys: a class of laws for tables of transforms.

A file of tests derives a class from `Laws` and gives it a table; each law runs
for each entry of the table.
"""

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
from problems import at_start, descend, quadratic, rosenbrock

from deepseek_jax.core import all_finite

RULES = ((".*/kernel", 1.0), ("head/.*", 0.5), (".*", 0.25))
SHAPES = {
  "head": {"bias": (8,), "kernel": (8, 2)},
  "stem": {"kernel": (2, 2, 2, 8)},
  "trunk": [{"kernel": (2, 8), "scale": (8,)}],
}
HIDDEN = ("head", "kernel")  # the leaf that a mask hides
BAD = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf}
AXIS_TYPES = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)


def tree(seed, dtype=jnp.float32):
  """A tree of the table's shapes with normal entries."""
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(random.normal(size=shape), dtype),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A factory, its arguments, and what is particular about it."""

  make: Callable[..., optax.GradientTransformation]
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Arguments that `optax.inject_hyperparams` must leave alone.
  static: tuple[str, ...] = ()
  # Completes it to an optimizer of a quadratic.
  complete: Callable[[Any], Any] = lambda tx: tx
  # Times the rate of that, it is one of Rosenbrock's function.
  on_rosenbrock: float = 0.2
  frozen: str | None = None  # the branch that it does not move
  # How near two ways to compute the same are, where not at float precision.
  tolerance: Mapping[str, float] = dataclasses.field(default_factory=dict)
  # Law, or law[variant], to why it cannot hold: a limit that is not ours.
  limits: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Obeys all laws, but by default only the cheap ones are asked.
  is_variant: bool = False

  @functools.cached_property
  def tx(self):
    return self.make(**self.arguments)

  @functools.cached_property
  def state(self):
    return self.tx.init(tree(0))

  @functools.cached_property
  def traces(self):
    return []

  @functools.cached_property
  def step(self):
    """One jitted update; `traces` grows with every trace of it."""

    @jax.jit
    def step(params, state, grads, value):
      self.traces.append(value)
      return self.tx.update(grads, state, params, value=value, other=0)

    return step

  @functools.cached_property
  def first(self):
    """Updates and state after one update."""
    return self.step(tree(0), self.state, tree(1), jnp.float32(1.0))


def types(state):
  """Shape, dtype, weak type and sharding of every leaf."""
  return jax.tree.map(jax.typeof, state)


def assert_close(a, b, **tolerance):
  tolerance = {"rtol": 1e-5, "atol": 1e-7} | tolerance
  assert jax.tree.structure(a) == jax.tree.structure(b)

  def close(x, y):
    np.testing.assert_allclose(numbers(x), numbers(y), **tolerance)

  jax.tree.map(close, a, b)


def is_key(leaf):
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def numbers(leaf):
  leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
  return np.asarray(leaf, np.float32 if leaf.dtype == jnp.bfloat16 else None)


def without_hidden(tree):
  branch, leaf = HIDDEN
  rest = {key: x for key, x in tree[branch].items() if key != leaf}
  return tree | {branch: rest}


def wrap_in_mask(tx, mask):
  return optax.masked(tx, mask)


def wrap_in_partition(tx, mask):
  labels = jax.tree.map(lambda inside: "in" if inside else "out", mask)
  return optax.partition({"in": tx, "out": optax.identity()}, labels)


def sharding(mesh, leaf):
  spec = ["x" if size == 8 else None for size in leaf.shape]
  return jax.sharding.NamedSharding(mesh, jax.P(*spec))


def packed(leaf):
  """A NumPy array that `np.savez` keeps: it knows neither bfloat16 nor keys."""
  if is_key(leaf):
    return np.asarray(jax.random.key_data(leaf))
  array = np.asarray(leaf)
  return array.view(np.uint16) if leaf.dtype == jnp.bfloat16 else array


def unpacked(array, like):
  if is_key(like):
    return jax.random.wrap_key_data(array)
  return jnp.asarray(array.view(like.dtype))


class Laws:
  """The laws; `cases` is the table."""

  cases: Mapping[str, Case]

  def pytest_generate_tests(self, metafunc):
    law = metafunc.function
    marks = lambda case: (
      [pytest.mark.slow] if case.is_variant and law not in CHEAP else []
    )
    metafunc.parametrize(
      "case",
      [
        pytest.param(case, id=name, marks=marks(case))
        for name, case in self.cases.items()
      ],
    )

  @pytest.fixture(autouse=True)
  def _expect_limits(self, request, case):
    law = request.node.originalname.removeprefix("test_")
    variants = request.node.callspec.id.split("-")
    names = {law, *(f"{law}[{variant}]" for variant in variants)}
    for name in names & case.limits.keys():
      mark = pytest.mark.xfail(reason=case.limits[name], strict=True)
      request.applymarker(mark)

  def test_every_limit_is_that_of_a_law(self, case):
    laws = {law.removeprefix("test_") for law in dir(self)}
    assert {name.partition("[")[0] for name in case.limits} <= laws
    assert all(case.limits.values())

  def test_takes_unknown_extra_arguments_and_compiles_once(self, case):
    params, grads, state = tree(0), tree(1), case.state
    traces = len(case.traces)
    for value in (2.0, 1.0, 3.0):
      before = types(state)
      updates, state = case.step(params, state, grads, jnp.float32(value))
      assert types(state) == before
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert len(case.traces) <= traces + 1

  @pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=jnp.dtype
  )
  def test_keeps_the_dtype_of_updates_and_state(self, case, dtype):
    def update(params, state):
      return case.tx.update(params, state, params, value=jnp.float32(1.0))

    params = jax.eval_shape(lambda: tree(0, dtype))
    state = jax.eval_shape(case.tx.init, params)
    updates, new_state = jax.eval_shape(update, params, state)
    assert types(updates) == types(params)
    assert types(new_state) == types(state)

  def test_initialises_abstractly(self, case):
    concrete = types(case.state)
    abstract = jax.eval_shape(lambda: tree(0))
    assert types(jax.eval_shape(case.tx.init, abstract)) == concrete

  def test_initialises_from_shapes_outside_of_a_trace(self, case):
    abstract = jax.eval_shape(lambda: tree(0))
    assert types(case.tx.init(abstract)) == types(case.state)

  def test_optax_can_map_over_its_params(self, case):
    mapped = optax.tree.map_params(case.tx, lambda x: x, case.state)
    assert_close(mapped, case.state)

  def test_hyperparameters_can_be_injected(self, case):
    make = optax.inject_hyperparams(case.make, static_args=case.static)
    injected = make(**case.arguments)
    params, a = tree(0), case.state
    b, update = injected.init(params), jax.jit(injected.update)
    for seed, value in ((1, 2.0), (2, 1.5)):
      grads, value = tree(seed), jnp.float32(value)
      expected, a = case.step(params, a, grads, value)
      updates, b = update(grads, b, params, value=value)
      assert_close(updates, expected, **({"rtol": 1e-4} | case.tolerance))

  @pytest.mark.parametrize("wrap", [wrap_in_mask, wrap_in_partition])
  def test_a_mask_is_the_update_of_the_covered_tree(self, case, wrap):
    params, grads, value = tree(0), tree(1), jnp.float32(1.0)
    mask = jax.tree.map(lambda _: True, params)
    branch, leaf = HIDDEN
    mask[branch][leaf] = False
    tx = wrap(case.tx, mask)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, value=value)
    hidden = updates[branch].pop(leaf)
    assert_close(hidden, grads[branch][leaf], rtol=0, atol=0)
    params, grads = map(without_hidden, (params, grads))
    expected, _ = case.step(params, case.tx.init(params), grads, value)
    assert_close(updates, expected, **case.tolerance)

  def test_stands_inside_multi_steps(self, case):
    params, grads = tree(0), tree(1)
    every_two = optax.MultiSteps(case.tx, every_k_schedule=2)
    update = jax.jit(every_two.update)
    state = every_two.init(params)
    none, state = update(grads, state, params, value=jnp.float32(1.0))
    updates, state = update(grads, state, params, value=jnp.float32(1.0))
    assert_close(none, jax.tree.map(jnp.zeros_like, params))
    assert_close(updates, case.first[0], **case.tolerance)

  def test_vmap_is_a_loop(self, case):
    rows = [(tree(i), tree(i + 3), jnp.float32(i + 1)) for i in range(3)]
    stack = lambda *leaves: jnp.stack(leaves)
    params, grads, values = jax.tree.map(stack, *rows)

    @jax.jit
    @jax.vmap
    def batched(params, grads, value):
      state = case.tx.init(params)
      return case.tx.update(grads, state, params, value=value)[0]

    init = jax.jit(case.tx.init)
    loop = [case.step(p, init(p), g, v)[0] for p, g, v in rows]
    expected = jax.tree.map(stack, *loop)
    assert_close(batched(params, grads, values), expected, **case.tolerance)

  def test_state_shares_no_buffer_with_the_parameters(self, case):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
      grads = jax.tree.map(jnp.ones_like, params)
      value = jnp.float32(1.0)
      updates, state = case.tx.update(grads, state, params, value=value)
      return optax.apply_updates(params, updates), state

    params = tree(0)
    params, state = step(params, case.tx.init(params))
    params, state = step(params, state)
    assert all_finite((params, state))

  @pytest.mark.parametrize("kind", AXIS_TYPES, ids=lambda kind: kind.name)
  def test_sharded_parameters_change_nothing(self, case, kind):
    params, grads, value = tree(0), tree(1), jnp.float32(1.0)
    expected, expected_state = case.step(params, case.first[1], grads, value)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    place = lambda leaf: jax.device_put(leaf, sharding(mesh, leaf))
    params, grads = jax.tree.map(place, (params, grads))
    with jax.set_mesh(mesh):
      state = jax.jit(case.tx.init)(params)
      _, state = case.step(params, state, grads, value)
      updates, new_state = case.step(params, state, grads, value)
    assert types(new_state) == types(state)
    for before, after in zip(
      jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True
    ):
      assert before.sharding.is_equivalent_to(after.sharding, before.ndim)
    assert_close(updates, expected, **case.tolerance)
    assert_close(new_state, expected_state, **case.tolerance)

  @pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
  def test_no_bad_loss_enters_the_state(self, case, bad):
    params, grads, state = tree(0), tree(1), case.state
    for value in (bad, 1.0, bad, 2.0):
      updates, state = case.step(params, state, grads, jnp.float32(value))
      assert all_finite((updates, state))

  @pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
  def test_no_bad_gradient_enters_the_state(self, case, bad):
    params, good, broken, state = tree(0), tree(1), tree(1), case.state
    for leaf in ("bias", "kernel"):
      broken["head"][leaf] = broken["head"][leaf].at[0].set(bad)
    for grads in (broken, good, broken):
      _, state = case.step(params, state, grads, jnp.float32(1.0))
      assert all_finite(state)

  def test_descends_a_quadratic(self, case):
    # Long enough for the slowest layer: rate 0.05, a quarter of it by rule, a
    # tenth of that by the loss.
    self.descend(case, quadratic, case.complete(case.tx), steps=3_000)

  def test_descends_rosenbrock(self, case):
    tx = optax.chain(case.complete(case.tx), optax.scale(case.on_rosenbrock))
    self.descend(case, rosenbrock, tx, steps=20_000)

  def descend(self, case, loss, tx, steps):
    target = tree(5)
    start = jax.tree.map(lambda t, n: at_start(t) + n / 10, target, tree(0))
    if case.frozen is not None:
      start[case.frozen] = target[case.frozen]
    before = loss(start, target)
    after = loss(descend(tx, lambda p: loss(p, target), start, steps), target)
    assert after < 1e-2 * before

  def test_survives_a_checkpoint(self, case, tmp_path):
    params, grads, value = tree(0), tree(1), jnp.float32(1.0)
    _, state = case.first
    path = tmp_path / "state.npz"
    np.savez(path, *map(packed, jax.tree.leaves(state)))
    empty = jax.eval_shape(case.tx.init, params)
    with np.load(path) as saved:
      leaves = map(unpacked, saved.values(), jax.tree.leaves(empty))
      restored = jax.tree.unflatten(jax.tree.structure(empty), list(leaves))
    assert types(restored) == types(state)
    once, again = (
      case.step(params, s, grads, value) for s in (state, restored)
    )
    assert_close(again, once, rtol=0, atol=0)


# What is asked of every variant of a transform, on every run.
CHEAP = frozenset(
  {
    Laws.test_every_limit_is_that_of_a_law,
    Laws.test_takes_unknown_extra_arguments_and_compiles_once,
    Laws.test_initialises_abstractly,
    Laws.test_vmap_is_a_loop,
    Laws.test_no_bad_loss_enters_the_state,
    Laws.test_no_bad_gradient_enters_the_state,
    Laws.test_descends_a_quadratic,
    Laws.test_survives_a_checkpoint,
  }
)
