"""Laws of the hot step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepseek_jax import nn
from deepseek_jax.train import losses
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.step import (
  RecompileWarning,
  StepSpec,
  jit_once,
  make_eval_step,
  make_train_step,
)


def spec(**changes):
  arguments = {
    "loss": losses.CrossEntropy(),
    "inputs": ("x",),
    "target": "y",
    "task": "classification",
  }
  return StepSpec(**arguments | changes)


def linear(seed=0):
  return nnx.Linear(4, 3, rngs=nnx.Rngs(seed))


def batch(n=8, seed=0, masked=0):
  rng = np.random.default_rng(seed)
  mask = np.ones(n, np.float32)
  mask[n - masked :] = 0
  return {
    "x": rng.normal(size=(n, 4)).astype(np.float32),
    "y": rng.integers(0, 3, n).astype(np.int32),
    "mask": mask,
  }


def setup(model=None, tx=None, **changes):
  model = linear() if model is None else model
  tx = optax.sgd(0.5) if tx is None else tx
  structure, _ = state_lib.structures(model)
  step = jax.jit(make_train_step(structure, tx, spec(**changes)))
  return step, state_lib.create(model, tx, task="classification")


def assert_equal(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_step_is_gradient_descent_on_the_masked_mean():
  step, state = setup()
  data = batch(masked=3)

  def mean(params):
    logits = data["x"] @ params["kernel"] + params["bias"][None]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])
    return jnp.mean(loss[:5])

  grads = jax.grad(mean)(state.params)
  new = step(state, data)
  want = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    new.params,
    want,
  )
  np.testing.assert_allclose(
    new.metrics["loss"].compute(), mean(state.params), rtol=1e-6
  )


@pytest.mark.parametrize("masked", [0, 5])
@pytest.mark.parametrize("weights", [None, (0.2, 1.0, 3.0)])
@pytest.mark.parametrize("penalties", [{}, {"l1": 0.01, "l2": 0.1}])
def test_accumulation_equals_the_whole_batch(masked, weights, penalties):
  loss = losses.CrossEntropy(class_weights=weights)
  data = batch(n=12, masked=masked)
  results = []
  for parts in (1, 2, 6):
    step, state = setup(loss=loss, accumulate=parts, **penalties)
    results.append(step(state, data))
  for other in results[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
      (results[0].params, results[0].metrics),
      (other.params, other.metrics),
    )


@pytest.mark.parametrize("where", ["x", "gradient"])
def test_non_finite_step_changes_only_its_counters(where):
  tx = optax.adam(0.1)
  data = batch()
  if where == "x":
    data["x"][3, 2] = np.nan
    step, state = setup(tx=tx)
  else:  # A finite loss whose gradient is not: the square root at 0.

    class Root:
      def __call__(self, outputs, targets):
        return jnp.sqrt(jnp.sum(jnp.square(outputs * 0), axis=1))

      def weights(self, targets):
        return jnp.ones(targets.shape[0])

    step, state = setup(tx=tx, loss=Root())
  new = step(state, data)
  assert_equal(
    (new.params, new.rest, new.opt_state, new.metrics),
    (state.params, state.rest, state.opt_state, state.metrics),
  )
  assert (int(new.step), int(new.skipped), int(new.skipped_in_a_row)) == (
    (1, 1, 1)
  )


def test_a_good_step_ends_the_row_of_skipped_ones():
  step, state = setup()
  bad = batch()
  bad["x"][:] = np.inf
  for data in (bad, bad, batch(), bad):
    state = step(state, data)
  assert (int(state.skipped), int(state.skipped_in_a_row)) == (3, 1)


def test_nothing_moves_after_too_many_skipped_in_a_row():
  step, state = setup(max_skipped=2)
  bad = batch()
  bad["x"][:] = np.nan
  for _ in range(2):
    state = step(state, bad)
  after = step(step(state, batch()), bad)
  assert_equal(after, state)
  assert int(after.step) == 2


def test_model_state_advances_and_dropout_differs_between_steps():
  model = nnx.Sequential(
    nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
    nnx.BatchNorm(3, rngs=nnx.Rngs(0)),
    nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
  )
  step, state = setup(model, optax.sgd(0.0))
  first = step(state, batch())
  second = step(first, batch())
  losses_seen = [float(s.metrics["loss"].compute()) for s in (first, second)]
  assert losses_seen[0] != losses_seen[1]
  means = [
    np.asarray(leaf)
    for s in (state, first, second)
    for path, leaf in jax.tree_util.tree_leaves_with_path(s.rest)
    if "mean" in jax.tree_util.keystr(path)
  ]
  assert not np.array_equal(means[0], means[1])
  assert not np.array_equal(means[1], means[2])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(accumulate):
  step, state = setup(accumulate=accumulate)
  data = batch(n=32, masked=5)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  replicated = NamedSharding(mesh, PartitionSpec())
  sharded = jax.jit(step, out_shardings=replicated)(
    jax.device_put(state, replicated),
    jax.device_put(data, NamedSharding(mesh, PartitionSpec("data"))),
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    step(state, data).params,
    sharded.params,
  )
  assert all(x.sharding == replicated for x in jax.tree.leaves(sharded))


def test_transform_gets_the_objective_as_value():
  def update(updates, state, params=None, *, value, **extra):
    return updates, value

  tx = optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros(()), update
  )
  step, state = setup(tx=tx, l2=1.0)
  new = step(state, batch())
  penalty = losses.penalty(state.params, 0.0, 1.0)
  np.testing.assert_allclose(
    new.opt_state, new.metrics["loss"].compute() + penalty, rtol=1e-6
  )


def test_evaluation_ignores_padding_and_penalties():
  model = linear()
  _, structure = state_lib.structures(model)
  _, state = setup(model)
  evaluate = jax.jit(make_eval_step(structure, spec(l2=1.0)))
  data = batch(masked=3)
  kept = {name: column[:5] for name, column in data.items()}
  metrics, _ = evaluate(state.params, state.rest, state.metrics, data)
  want, _ = evaluate(state.params, state.rest, state.metrics, kept)
  for name in metrics:
    np.testing.assert_allclose(
      metrics[name].compute(), want[name].compute(), rtol=1e-6
    )


def test_jit_once_names_the_shapes_that_changed():
  function = jit_once(lambda s, b: s + b["x"].sum(), "training step")
  function(jnp.zeros(()), {"x": jnp.ones((4, 2)), "y": jnp.ones(3)})
  function(jnp.zeros(()), {"x": jnp.ones((4, 2)), "y": jnp.ones(3)})
  assert len(function.traces) == 1
  with pytest.warns(
    RecompileWarning, match=r"1/x: float32\[4,2\] -> float32\[3,2\]"
  ):
    function(jnp.zeros(()), {"x": jnp.ones((3, 2)), "y": jnp.ones(3)})


def test_a_model_without_parameters_is_refused():
  with pytest.raises(ValueError, match=r"model must have nnx\.Param"):
    state_lib.create(
      nnx.Dropout(0.5, rngs=nnx.Rngs(0)), optax.sgd(1.0), task="classification"
    )


def test_accumulation_presses_activations_as_the_whole_batch_does():
  make = lambda: nnx.Sequential(
    nnx.Linear(4, 8, rngs=nnx.Rngs(0)),
    nn.SparseReLU(threshold=0.1, pressure=0.5),
    nnx.Linear(8, 3, rngs=nnx.Rngs(1)),
  )
  data = batch(n=12)
  results = []
  for parts in (1, 3):
    step, state = setup(make(), accumulate=parts)
    results.append(step(state, data).params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    *results,
  )
