"""Laws of a run whose optimizer averages: the average is what counts."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import deepseek_jax as dj
from deepseek_jax.optim.averaging import anytime_average
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.checkpoint import Checkpoints

FRACTION = 0.3


@pytest.fixture
def linear():
  # Without batch statistics or dropout: weights alone decide what it says.
  return lambda: nnx.Linear(6, 3, rngs=nnx.Rngs(0))


def recorded(iterates, stop_at=None):
  """SGD that tells every iterate, and at one of them asks the run to stop."""

  def tell(step, iterate):
    iterates[int(step)] = jax.tree.map(np.asarray, iterate)
    if step == stop_at:
      os.kill(os.getpid(), signal.SIGTERM)

  def update(updates, state, params=None, **extra):
    iterate = jax.tree.map(jnp.add, params, updates)
    jax.debug.callback(tell, state, iterate)
    return updates, state + 1

  teller = optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros((), jnp.int32), update
  )
  return optax.chain(optax.sgd(2.0), teller)


def average(iterates):
  """The average by its recurrence, in NumPy and float64."""
  mean = None
  for i in range(len(iterates)):
    iterate = jax.tree.map(np.float64, iterates[i])
    if mean is None:
      mean = iterate
    else:
      rate = 1 / (1 + FRACTION * i)
      mean = jax.tree.map(lambda m, x, c=rate: m + c * (x - m), mean, iterate)
  return mean


def loss_of(weights, split):
  x, y = split[:]["x"], split[:]["y"]
  logits = x @ weights["kernel"] + weights["bias"]
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return -np.mean(log_p[np.arange(len(y)), y])


def weights_of(model):
  return nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))


def assert_same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_average_is_evaluated_compared_and_returned(run, problem, linear):
  iterates = {}
  tx = anytime_average(recorded(iterates), FRACTION)
  result = run(tx=tx, model=linear(), epochs=6, clip_norm=5.0)
  fast, best = [], {}
  for record in result.history:
    step = record["step"]
    weights = average([iterates[i] for i in range(step)])
    best[step] = weights
    expected = loss_of(weights, problem.validation)
    np.testing.assert_allclose(record["validation/loss"], expected, rtol=1e-4)
    fast.append(loss_of(iterates[step - 1], problem.validation) / expected)
  assert max(fast) > 1.01
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    weights_of(result.model),
    best[result.best_step],
  )
  np.testing.assert_allclose(
    result.metrics["test/loss"],
    loss_of(best[result.best_step], problem.test),
    rtol=1e-4,
  )


@pytest.mark.slow
def test_a_stopped_run_goes_on_from_the_iterate_to_the_same_bits(run):
  def averaged(stop_at):
    return {"tx": anytime_average(recorded({}, stop_at), dtype=jnp.bfloat16)}

  whole = run("whole", **averaged(None))
  cut = run("cut", **averaged(7))
  assert not cut.complete
  resumed = run("cut", **averaged(7))
  again = run("cut", **averaged(7))
  for other in (resumed, again):
    assert other.metrics == whole.metrics
    assert other.best_step == whole.best_step
    assert_same(weights_of(other.model), weights_of(whole.model))


@pytest.mark.parametrize("averages", [True, False])
def test_a_checkpoint_holds_what_is_evaluated_and_what_goes_on(
  averages, linear, problem, tmp_path
):
  tx = optax.adam(0.1)
  tx = optax.chain(anytime_average(tx)) if averages else tx
  state = state_lib.create(linear(), tx, task="classification")
  params = state.params
  for seed in range(3):
    grads = jax.tree.map(lambda x, i=seed: jnp.cos(x + i), params)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    state = state._replace(params=params, opt_state=opt_state)
  stream = iter(dj.data.batches(problem.train, 32, prefetch=0))
  checkpoints = Checkpoints(tmp_path)
  progress = {"stopping": {"best_step": 3}}
  checkpoints.save(state, stream, progress, step=3, best_step=3)
  checkpoints.wait()
  empty = state_lib.create(linear(), tx, task="classification")
  resumed, _ = checkpoints.restore(3, empty, stream)
  model, _ = checkpoints.restore_model(3, empty.params, empty.rest)
  checkpoints.close()
  assert_same(resumed, state)
  stored = (tmp_path / "3" / "training" / "_METADATA").read_text()
  assert ("params/kernel" in stored) == averages
  if averages:
    displacement = optax.tree.get(state.opt_state, "displacement")
    assert any(jnp.any(d) for d in jax.tree.leaves(displacement))
    assert_same(model, jax.tree.map(jnp.add, params, displacement))
  else:
    assert_same(model, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  """A model of one layer, on digits."""

  def build(self, schema, rngs):
    return nnx.Sequential(
      lambda x: x.reshape(len(x), 64),
      nnx.Linear(64, schema.num_classes, rngs=rngs),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Averaged:
  """An optimizer that averages."""

  fraction: float = FRACTION

  def build(self, total_steps):
    return anytime_average(optax.sgd(1.0), self.fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(dj.train.Experiment):
  """An experiment of both."""

  model: Linear = Linear()
  optimizer: Averaged = Averaged()


def test_a_reloaded_model_is_the_averaged_one(tmp_path):
  train = dj.train.Train(epochs=2, progress=False, tensorboard=False)
  result = Mine(train=train, workdir=str(tmp_path / "run")).run()
  _, model = dj.train.load_model(result.workdir, kind=Mine)
  assert_same(weights_of(model), weights_of(result.model))
  metrics = dj.train.evaluate(result.workdir, split="validation", kind=Mine)
  logged = {r["step"]: r["validation/loss"] for r in result.history}
  assert metrics["validation/loss"] == logged[result.best_step]
