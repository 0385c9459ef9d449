"""What both kinds of whitening do to the leaves of a tree."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from deepseek_jax.optim import soap
from deepseek_jax.optim.compact import bytes_per_parameter
from deepseek_jax.optim.whitening import KINDS, scale_by_whitening

each_kind = pytest.mark.parametrize("kind", KINDS[:2])

SHAPES = {
  "conv": (2, 2, 2, 8),
  "layers": (3, 6, 5),
  "out": (2, 4, 8),
  "query": (8, 2, 4),
}
STACKED = [("layers", 1)]


def tree(seed, shapes=SHAPES):
  random = np.random.default_rng(seed)
  return {
    name: jnp.asarray(random.normal(size=shape), jnp.float32)
    for name, shape in shapes.items()
  }


def gradients(shapes=SHAPES):
  return [tree(seed, shapes) for seed in range(3)]


@functools.cache
def runner(tx):
  """The update after the last of many gradients, as one program."""

  def step(state, grad):
    updates, state = tx.update(grad, state)
    return state, updates

  def run(grads):
    start = jax.tree.map(lambda leaf: leaf[0], grads)
    _, updates = jax.lax.scan(step, tx.init(start), grads)
    return jax.tree.map(lambda leaf: leaf[-1], updates)

  return jax.jit(run)


def last_update(tx, grads):
  stack = lambda *leaves: jnp.stack(leaves)
  return runner(tx)(jax.tree.map(stack, *grads))


def assert_close(a, b, **tolerance):
  tolerance = {"rtol": 0.0, "atol": 1e-5} | tolerance
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def folded_by_hand(tree):
  matrices = {
    name: tree[name].reshape(8, 8) for name in ("conv", "out", "query")
  }
  layers = {f"layer{i}": layer for i, layer in enumerate(tree["layers"])}
  return matrices | layers


@each_kind
def test_kernels_are_whitened_as_the_matrices_they_fold_into(kind):
  grads = gradients()
  found = last_update(scale_by_whitening(kind, stacked=STACKED), grads)
  matrices = [folded_by_hand(grad) for grad in grads]
  by_hand = last_update(scale_by_whitening(kind), matrices)
  assert_close(folded_by_hand(found), by_hand)
  for matrix in by_hand.values():
    rms = np.sqrt(np.mean(np.square(matrix, dtype=np.float64)))
    np.testing.assert_allclose(rms, 0.2, rtol=1e-6)


@each_kind
def test_the_unit_of_the_gradient_does_not_matter(kind):
  grads = gradients({"dense": (6, 5)})
  tx = scale_by_whitening(kind)
  expected = last_update(tx, grads)
  for unit in (2.0**-40, 2.0**40):
    scaled = [{"dense": unit * grad["dense"]} for grad in grads]
    assert_close(last_update(tx, scaled), expected)


@each_kind
def test_what_is_no_matrix_gets_adam(kind):
  shapes = {"bias": (5,), "column": (4, 1), "row": (1, 1, 4), "scalar": ()}
  extra = {"complex": (1 + 2j) * jnp.eye(2)}
  grads = [grad | extra for grad in gradients(shapes)]
  tx = scale_by_whitening(kind, b1=0.8, b2=0.9, update_rms=0.3)
  adam = optax.chain(optax.scale_by_adam(b1=0.8, b2=0.9), optax.scale(0.3))
  assert_close(last_update(tx, grads), last_update(adam, grads))


@each_kind
def test_a_gradient_of_zeros_moves_nothing(kind):
  zeros = {"bias": jnp.zeros(3), "dense": jnp.zeros((6, 5))}
  found = last_update(scale_by_whitening(kind), [zeros])
  assert_close(found, zeros, atol=0.0)


LABELS = {"query": "adam", "out": "soap", "conv": "newton_schulz"}


@pytest.mark.parametrize(
  "labels",
  [
    [("query", "adam"), ("out", "soap"), (".*", "newton_schulz")],
    LABELS,
    lambda params: {name: LABELS[name] for name in params},
  ],
  ids=["rules", "tree", "function"],
)
def test_labels_choose_the_kind(labels):
  params = tree(0, {name: SHAPES[name] for name in LABELS})
  tx = scale_by_whitening(labels=labels)
  _, state = jax.eval_shape(tx.init, params)
  for name, kind in LABELS.items():
    for other, part in state.inner_states.items():
      mu = optax.tree.get(part, "mu")
      assert isinstance(mu[name], optax.MaskedNode) == (kind != other)


@each_kind
def test_hyperparameters_can_be_arrays(kind):
  shapes = {"bias": (3,), "dense": (6, 5)}
  inject = lambda **static: optax.inject_hyperparams(
    scale_by_whitening, **static
  )(kind)
  tx = inject(static_args=("steps", "max_side"))
  expected = last_update(scale_by_whitening(kind), gradients(shapes))
  assert_close(last_update(tx, gradients(shapes)), expected)
  with pytest.raises((ValueError, TypeError), match="steps"):
    inject().init(tree(0))


def test_orthogonalization_holds_half_of_the_state():
  params = jax.eval_shape(lambda: jnp.zeros((64, 64)))
  held = lambda tx: bytes_per_parameter(jax.eval_shape(tx.init, params), params)
  assert 4.0 <= held(scale_by_whitening()) < 4.1
  assert 2.0 <= held(scale_by_whitening(mu_dtype=jnp.bfloat16)) < 2.1
  assert 24.0 <= held(scale_by_whitening("soap")) < 24.1
  assert 8.0 <= held(scale_by_whitening("soap", max_side=2)) < 8.1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"kind": "muon"}, "kind must be one of .* got kind='muon'"),
    ({"kind": "adam"}, "kind must"),
    (
      {"variance": "rows"},
      "variance must be one of .*'full', None",
    ),
    ({"b1": 1.0}, r"b1 must be in \[0, 1\), got b1=1.0"),
    ({"b1": -0.1}, "b1 must"),
    ({"b2": 1.0}, "b2 must"),
    ({"eps": -1e-9}, r"eps must be in \[0, inf\), got eps=-1e-09"),
    ({"eps": float("inf")}, "eps must"),
    ({"update_rms": 0.0}, r"update_rms must be in \(0, inf\)"),
    ({"update_rms": float("nan")}, "update_rms must"),
    ({"steps": 0}, "steps must be an integer, at least 1, got steps=0"),
    ({"every": 0}, "every must be a whole number, at least 1, got every=0"),
    ({"every": 1.5}, "every must"),
    ({"max_side": 1}, "max_side must be an integer, at least 2"),
  ],
)
def test_arguments_out_of_range_are_named(arguments, message):
  # The annotations refuse some of these first, where they are checked.
  unchecked = getattr(scale_by_whitening, "__wrapped__", scale_by_whitening)
  with pytest.raises(ValueError, match=message):
    unchecked(**arguments)


PARAMS = {"head": {"bias": jnp.ones(3), "kernel": jnp.ones((3, 2))}}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      {"labels": [(".*", "muon")]},
      "labels must be among .* got 'muon' for 'head/bias'",
    ),
    ({"labels": [(".*/kernel", "soap")]}, "cover every leaf.*'head/bias'"),
    (
      {"labels": [(".*", "soap")]},
      r"only real matrices .* got 'soap' for 'head/bias' of shape \(3,\)",
    ),
    (
      {"labels": {"head": {"bias": "newton_schulz", "kernel": "soap"}}},
      "got 'newton_schulz' for 'head/bias'",
    ),
    (
      {"labels": [(".*", "soap")], "stacked": [(".*", 1)]},
      "got 'soap' for 'head/bias'",
    ),
    (
      {"stacked": [(".*", 2)]},
      r"number of axes .* got 2 for 'head/bias' of shape \(3,\)",
    ),
    ({"stacked": [(".*", -1)]}, "got -1 for 'head/bias'"),
  ],
)
def test_labels_and_stacks_that_do_not_fit_are_named_at_init(
  arguments, message
):
  unchecked = getattr(scale_by_whitening, "__wrapped__", scale_by_whitening)
  with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
    unchecked(**arguments).init(PARAMS)


@pytest.mark.parametrize(
  "leaf", [jnp.ones(()), jnp.ones((4, 1)), 1j * jnp.eye(2)]
)
@each_kind
def test_no_label_makes_a_matrix_of_what_is_none(kind, leaf):
  tx = scale_by_whitening(labels={"leaf": kind})
  with pytest.raises(ValueError, match=f"got '{kind}' for 'leaf'"):
    tx.init({"leaf": leaf})


MESH = ((8,), ("x",))
COLLECTIVES = re.compile(
  r"= (.*?) (?:all-gather|all-reduce|all-to-all|reduce-scatter"
  r"|collective-permute)(?:-start)?\("
)


def compile_sharded(tx, params, spec):
  """Compiles an update whose leaves and state are placed as users place them.

  What is of the shape of a parameter, or as long a stack, is split as that
  is; the rest of the state is on every device. XLA's scheduler for CPUs is
  set to care for memory, as those of accelerators do; by default it runs all
  leaves at once.
  """
  mesh = jax.make_mesh(*MESH, axis_types=(AxisType.Auto,))
  shape = next(iter(params.values())).shape
  split = jax.NamedSharding(mesh, spec)
  whole = jax.NamedSharding(mesh, jax.P())
  stacked = len(shape) == 3

  def place(leaf):
    like = leaf.shape == shape or (stacked and leaf.ndim == 3)
    return jax.device_put(leaf, split if like else whole)

  grads, state = jax.tree.map(place, (params, tx.init(params)))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, (grads, state))
  step = lambda grads, state: tx.update(grads, state)
  compiled = (
    jax.jit(step, out_shardings=shardings)
    .lower(grads, state)
    .compile({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"})
  )
  return compiled, (grads, state)


def largest_collective(compiled):
  """Elements of the largest array that devices exchange at once."""
  results = COLLECTIVES.findall(compiled.as_text())
  sizes = re.findall(r"\w+\[([\d,]*)\]", " ".join(results))
  count = lambda dims: int(np.prod([int(d) for d in dims.split(",") if d]))
  return max(map(count, sizes), default=0)


def temporary_bytes(compiled):
  return compiled.memory_analysis().temp_size_in_bytes


@each_kind
def test_sharded_matrices_are_gathered_one_at_a_time_at_most(kind):
  # Newton-Schulz on rows exchanges the Gram matrices of the shorter side and
  # no matrix. The eigenbases gather one matrix, or the square of one of its
  # sides, and work on it on every device.
  tx = scale_by_whitening(kind)
  shape, spec = (64, 32), jax.P("x", None)
  many = tree(0, {f"kernel{i}": shape for i in range(8)})
  one = {"kernel0": many["kernel0"]}
  alone, _ = compile_sharded(tx, one, spec)
  compiled, arguments = compile_sharded(tx, many, spec)
  side = 32 if kind == "newton_schulz" else 64
  assert 0 < largest_collective(compiled) <= side * side
  gathered = sum(leaf.nbytes for leaf in many.values())
  assert temporary_bytes(compiled) < 1.5 * temporary_bytes(alone)
  assert temporary_bytes(compiled) < gathered / 2
  updates, _ = compiled(*arguments)
  assert updates["kernel0"].sharding.spec == spec
  # On eight devices sums are taken in another order.
  assert_close(updates, last_update(tx, [many]), atol=1e-4)


@each_kind
def test_a_stack_split_between_its_matrices_needs_no_exchange(kind):
  tx = scale_by_whitening(kind, stacked=[("layers", 1)])
  params = tree(0, {"layers": (8, 16, 12)})
  compiled, arguments = compile_sharded(tx, params, jax.P("x"))
  # Where XLA for CPUs would hang, matrices are factored one by one, gathered.
  gathered = kind == "soap" and soap._STACKS_HANG
  assert largest_collective(compiled) == (8 * 16 * 16 if gathered else 0)
  updates, _ = compiled(*arguments)
  assert_close(updates, last_update(tx, [params]))
