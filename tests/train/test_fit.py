"""Laws of a run: what it gives, how it resumes."""

import gc
import itertools
import json
import os
import pathlib
import shutil
import signal
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import deepseek_jax as dj
from deepseek_jax.train.loop import take_steps
from deepseek_jax.train.signals import StopSignal
from deepseek_jax.train.step import RecompileWarning


def weights(result):
  return jax.tree.map(
    np.asarray, nnx.to_pure_dict(nnx.state(result.model, nnx.Param))
  )


def assert_same(first, second):
  """Bitwise: weights, metrics, stopping step, and the log but for its clock."""
  jax.tree.map(np.testing.assert_array_equal, weights(first), weights(second))
  for name in ("metrics", "best_step", "steps", "ended_by", "complete"):
    assert getattr(first, name) == getattr(second, name)

  def timeless(record):
    clock = ("seconds", "steps_per_second")
    return {k: v for k, v in record.items() if k not in clock}

  assert [*map(timeless, first.history)] == [*map(timeless, second.history)]


def adam():
  """Compiles in a moment; the recipe has tests of its own."""
  rate = dj.optim.warmup(2e-2, steps=3)
  return optax.chain(optax.scale_by_adam(), dj.optim.scale_by_rate(rate))


def stop_at(step, name=signal.SIGTERM):
  """A transform that sends this process a signal as its `step`-th update."""

  def send(count):
    if count == step:
      os.kill(os.getpid(), name)

  def update(updates, count, params=None, **extra):
    jax.debug.callback(send, count)
    return updates, count + 1

  return optax.GradientTransformationExtraArgs(
    lambda params: np.zeros((), np.int32), update
  )


def test_a_run_learns_and_writes_what_it_says(run, tmp_path):
  result = run(epochs=12)
  assert result.metrics["test/accuracy"] > 0.6
  assert result.complete
  assert result.ended_by == "epochs"
  assert result.steps == 60
  written = json.loads((tmp_path / "run" / "result.json").read_text())
  assert written["metrics"] == result.metrics
  assert written["versions"]["jax"] == jax.__version__
  assert written["peak_memory_bytes"] > 0
  assert written["arguments"]["epochs"] == 12
  asked = json.loads((tmp_path / "run" / "run.json").read_text())
  assert asked["arguments"]["epochs"] == 12
  assert {p["path"] for p in asked["parameters"]} >= {"head/kernel"}
  with np.load(tmp_path / "run" / "predictions.npz") as found:
    accuracy = np.mean(found["logits"].argmax(axis=1) == found["labels"])
  np.testing.assert_allclose(accuracy, result.metrics["test/accuracy"])


def test_two_runs_are_equal_and_another_seed_is_not(run):
  first, second, other = run("a"), run("b"), run("c", seed=1)
  assert_same(first, second)
  assert other.metrics != first.metrics


def test_calling_again_after_the_end_returns_the_same_result(run, tmp_path):
  first = run()
  log = tmp_path / "run" / "metrics.jsonl"
  written = log.stat().st_mtime_ns
  assert_same(first, run())
  assert log.stat().st_mtime_ns == written


@pytest.mark.parametrize(
  ("prefetch", "step"),
  [
    (0, 7),
    (2, 13),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [(0, 0), (0, 13), (2, 0), (2, 7)]
    ),
  ],
)
def test_a_signalled_run_goes_on_to_the_same_bits(run, step, prefetch):
  tx = dj.optim.deepseek() if (step, prefetch) == (7, 2) else adam()
  whole = run("whole", tx=optax.chain(tx, stop_at(-1)))
  stopping = {"tx": optax.chain(tx, stop_at(step)), "prefetch": prefetch}
  cut = run("cut", **stopping)
  assert (cut.ended_by, cut.complete) == ("SIGTERM", False)
  assert step < cut.steps < 20
  assert_same(whole, run("cut", **stopping))


def test_sigint_stops_and_handlers_come_back(run):
  before = signal.getsignal(signal.SIGINT)
  tx = optax.chain(optax.sgd(0.1), stop_at(2, signal.SIGINT))
  assert run(tx=tx).ended_by == "SIGINT"
  assert signal.getsignal(signal.SIGINT) is before


def test_fit_runs_in_a_thread(run):
  results = []
  thread = threading.Thread(target=lambda: results.append(run(epochs=1)))
  thread.start()
  thread.join()
  assert results[0].complete


@pytest.mark.parametrize("patience", [None, 2])
def test_the_model_ends_with_its_best_weights(run, problem, patience):
  # A rate this high makes the last evaluation worse than the best.
  epochs = 40 if patience else 10
  result = run(tx=optax.adam(0.3), epochs=epochs, patience=patience)
  losses = {r["step"]: r["validation/loss"] for r in result.history}
  assert result.best_step == min(losses, key=losses.get) < max(losses)
  assert result.ended_by == ("early stopping" if patience else "epochs")
  if patience:
    assert result.steps == result.best_step + 2 * 5
  x, y = problem.validation[:]["x"], problem.validation[:]["y"]
  log_p = jax.nn.log_softmax(result.model(x))
  loss = -np.mean(np.asarray(log_p)[np.arange(len(y)), y])
  np.testing.assert_allclose(loss, losses[result.best_step], rtol=1e-5)


def test_training_and_evaluation_are_each_traced_once(run):
  with warnings.catch_warnings():
    warnings.simplefilter("error", RecompileWarning)
    result = run(steps=200, epochs=None, log_every=7, evaluate_every=11)
  assert (result.steps, result.ended_by) == (200, "steps")


def test_the_hot_loop_never_looks_at_the_state():
  class Opaque:
    def __getattribute__(self, name):
      raise AssertionError(f"the loop read {name} between events")

  state, seen = Opaque(), []
  found, step = take_steps(
    state,
    lambda state, batch: state,
    iter(range(10)),
    first=3,
    last=8,
    stop=StopSignal(),
    advance=seen.append,
  )
  assert found is state
  assert (step, seen) == (8, [4, 5, 6, 7, 8])


def test_thousands_of_steps_on_several_devices_come_to_their_end():
  # XLA lets 32 computations a device be under way; it once waited for ever.
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  place = lambda x, *axes: jax.device_put(
    x, NamedSharding(mesh, PartitionSpec(*axes))
  )
  step = jax.jit(
    lambda state, x: state + jnp.mean(x @ x.T),
    donate_argnums=0,
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )
  found, _ = take_steps(
    place(jnp.zeros(())),
    step,
    itertools.repeat(place(jnp.ones((64, 64)), "data")),
    first=0,
    last=2000,
    stop=StopSignal(),
    advance=lambda _: None,
  )
  assert found == 2000 * 64


def test_accumulation_gives_the_same_run(run):
  # Without batch statistics, which see one micro-batch at a time.
  make = lambda: nnx.Linear(6, 3, rngs=nnx.Rngs(0))
  whole = run("whole", model=make())
  parts = run("parts", model=make(), accumulate=4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    weights(whole),
    weights(parts),
  )


def test_eight_devices_give_the_run_of_one(run):
  make = lambda: nnx.Linear(6, 3, rngs=nnx.Rngs(0))
  one = run("one", model=make())
  eight = run("eight", model=make(), mesh=None)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    weights(one),
    weights(eight),
  )
  np.testing.assert_allclose(
    one.metrics["test/loss"], eight.metrics["test/loss"], rtol=1e-5
  )


def bad_loss():
  """Cross entropy that is NaN for every example of class 0."""

  class Bad(dj.train.CrossEntropy):
    def __call__(self, outputs, targets):
      loss = super().__call__(outputs, targets)
      return jax.numpy.where(targets == 0, jax.numpy.nan, loss)

  return Bad()


def test_a_run_of_nothing_but_nan_ends_and_keeps_its_weights(run, make_model):
  result = run(loss=bad_loss(), max_skipped=7, epochs=50)
  assert (result.ended_by, result.steps) == ("non-finite", 7)
  assert result.best_step is None
  want = nnx.to_pure_dict(nnx.state(make_model(), nnx.Param))
  jax.tree.map(np.testing.assert_array_equal, weights(result), want)


def test_a_run_that_halts_between_evaluations_ends_once_and_for_all(run):
  # Steps 4 and 5 of the first epoch do nothing: no evaluation may claim them.
  first = run(loss=bad_loss(), max_skipped=3, epochs=2)
  assert (first.ended_by, first.steps) == ("non-finite", 3)
  assert [r["step"] for r in first.history] == [3]
  again = run(loss=bad_loss(), max_skipped=3, epochs=2)
  np.testing.assert_equal(again.metrics, first.metrics)
  assert (again.ended_by, again.steps) == ("non-finite", 3)


def test_tensorboard_events_can_be_read_back(run, tmp_path):
  run(tensorboard=True, epochs=2)
  files = [*(tmp_path / "run").glob("events.out.tfevents.*")]
  assert len(files) == 1
  content = files[0].read_bytes()
  for tag in (b"train/loss", b"validation/accuracy", b"learning_rate/head"):
    assert tag in content


@pytest.mark.slow
def test_regression_and_clipping(run):
  x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
  split = {"x": x, "y": x @ np.arange(6, dtype=np.float32) / 6}
  data = dj.data.from_arrays(split, split, split, inputs=("x",), target="y")
  result = run(
    model=nnx.Linear(6, 1, rngs=nnx.Rngs(0)),
    data=data,
    tx=optax.adam(0.05),
    epochs=40,
    clip_norm=1.0,
    monitor="validation/rmse",
  )
  assert result.metrics["test/rmse"] < 0.1


def test_clipping_bounds_the_first_update(run, make_model):
  moved = []
  for name, clip in (("free", None), ("clipped", 1e-3)):
    result = run(name, steps=1, epochs=None, tx=optax.sgd(1.0), clip_norm=clip)
    before = nnx.to_pure_dict(nnx.state(make_model(), nnx.Param))
    change = jax.tree.map(np.subtract, weights(result), before)
    moved.append(float(optax.tree.norm(change)))
  assert moved[0] > 0.01
  np.testing.assert_allclose(moved[1], 1e-3, rtol=1e-3)


def test_a_checkpoint_of_another_optimizer_is_told_by_path(run, tmp_path):
  run(tx=optax.chain(optax.sgd(0.1), stop_at(3)))
  with pytest.raises(ValueError, match=r"(missing|extra) opt_state/"):
    run(tx=optax.adam(0.1))


# After a failed read Orbax abandons coroutines, which Python then reports.
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:coroutine .* was never awaited:RuntimeWarning",
)
@pytest.mark.parametrize(
  "victim",
  [
    "training",
    *(
      pytest.param(item, marks=pytest.mark.slow)
      for item in ["model/manifest.ocdbt", "progress/metadata", "data"]
    ),
  ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
  run, tmp_path, victim
):
  tx = optax.chain(adam(), stop_at(12))
  cut = run(tx=tx)
  steps = sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
  damaged = tmp_path / "run" / "checkpoints" / str(steps[-1])
  path = damaged / victim
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()
  log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
  (tmp_path / "run" / "result.json").unlink()
  with pytest.raises(ValueError, match=f"checkpoint {steps[-1]} .* damaged"):
    run(tx=tx)
  gc.collect()  # They go here, not in some other test.
  assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
  shutil.rmtree(damaged)
  whole = run("whole", tx=optax.chain(adam(), stop_at(-1)))
  assert not cut.complete
  assert not run(tx=tx).complete  # Back before step 12, whose signal recurs.
  assert_same(whole, run(tx=tx))


def test_a_loss_of_your_own_is_the_same_in_every_process(run):
  class Mine:
    def __call__(self, outputs, targets):
      return -jax.numpy.take_along_axis(
        jax.nn.log_softmax(outputs), targets[:, None], axis=1
      )[:, 0]

    def weights(self, targets):
      return jax.numpy.ones(targets.shape)

  assert_same(run(loss=Mine()), run(loss=Mine()))


@pytest.mark.slow
def test_a_torn_log_line_is_written_again(run, tmp_path):
  tx = adam()
  whole = run("whole", tx=optax.chain(tx, stop_at(-1)))
  cut = run("cut", tx=optax.chain(tx, stop_at(12)))
  with pathlib.Path(cut.workdir, "metrics.jsonl").open("a") as file:
    file.write('{"step": 15, "epo')
  assert_same(whole, run("cut", tx=optax.chain(tx, stop_at(12))))
