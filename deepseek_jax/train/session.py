"""One start of a run: the jitted steps, the state, and the way to a result."""

import contextlib
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
import optax
from flax import nnx

from deepseek_jax import data as data_lib
from deepseek_jax import optim, parallel
from deepseek_jax.core import tree
from deepseek_jax.data.dataset import ArrayReader
from deepseek_jax.train import metrics as metrics_lib
from deepseek_jax.train import run_directory
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.blas import one_blas_thread
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.early_stopping import EarlyStopping
from deepseek_jax.train.evaluation import Evaluator, batch_rows, predictions
from deepseek_jax.train.initial import Build, initial_state, without_values
from deepseek_jax.train.loop import Loop, Schedule, pause
from deepseek_jax.train.monitor import Monitor
from deepseek_jax.train.placement import Placement
from deepseek_jax.train.processes import is_first
from deepseek_jax.train.result import Result
from deepseek_jax.train.run_directory import RunDirectory
from deepseek_jax.train.step import (
  StepSpec,
  jit_once,
  make_eval_step,
  make_train_step,
  on_mesh,
)


class Session:
  """Binds a model, a transform and data to compiled steps on a mesh.

  Making one writes nothing and checks that the model fits the data.

  Args:
    model: The model to train, which gets the final weights, or what builds it.
    tx: The transform.
    data: Splits and schema.
    spec: What a step does.
    placement: Where things live.
    batch_size: Rows a step.

  Raises:
    ValueError: If the model does not fit the data.
  """

  def __init__(
    self,
    model: nnx.Module | Build,
    tx: optax.GradientTransformation,
    data: data_lib.Dataset,
    spec: StepSpec,
    placement: Placement,
    batch_size: int,
  ):
    self._model = without_values(model)
    training, evaluation = state_lib.structures(self._model)
    self._replicas = replicas = placement.replicas(self._model)
    if replicas is not None:
      tx = replicas.transform(tx)
    self._data = data
    self._spec = spec
    self._placement = placement
    self._batch_size = batch_size
    self.state = initial_state(model, tx, spec.task, placement)
    self._check_model(evaluation)
    self.train_step = jit_once(
      make_train_step(training, tx, spec, replicas),
      "training step",
      mesh=placement.mesh,
      donate_argnums=0,
      out_shardings=jax.tree.map(lambda x: x.sharding, self.state),
    )
    self.evaluator = Evaluator(
      evaluation,
      spec,
      batch_size=batch_rows(placement, self._model, data.validation, data.test),
      placement=placement,
    )

  def stream(self, seed: int, prefetch: int | None) -> grain.DatasetIterator:
    """Returns the endless stream of training batches.

    Args:
      seed: Seed of the order of examples.
      prefetch: Batches prepared ahead by a thread; None chooses.
    """
    reading = self._placement.reading(self._batch_size)
    if prefetch is None:
      in_memory = isinstance(self._data.train.reader, ArrayReader)
      prefetch = 0 if in_memory and reading["transfer"] is None else 2
    return iter(
      data_lib.batches(
        self._data.train,
        self._batch_size,
        seed=seed,
        prefetch=prefetch,
        **reading,
      )
    )

  def parameters(self) -> list[dict[str, Any]]:
    """Returns path, shape and type of every parameter, as plain JSON."""
    leaves = jax.tree.leaves(self.state.params)
    return [
      {"path": path, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
      for path, leaf in zip(
        tree.leaf_paths(self.state.params), leaves, strict=True
      )
    ]

  def train(
    self,
    schedule: Schedule,
    stopping: EarlyStopping,
    stream: grain.DatasetIterator,
    run: RunDirectory,
    checkpoints: Checkpoints,
    *,
    progress: bool,
    tensorboard: bool,
    watchdog: parallel.Watchdog | None = None,
  ) -> Result:
    """Trains from the latest checkpoint, if there is one, to a result."""
    seconds = self._resume(stopping, stream, run, checkpoints)
    monitor = Monitor(
      run.path,
      total=schedule.total,
      done=int(self.state.step),
      progress=progress,
      tensorboard=tensorboard,
    )
    with contextlib.closing(monitor), one_blas_thread():
      if seconds:
        monitor.say(f"going on from step {int(self.state.step)} in {run.path}")
      loop = Loop(
        schedule,
        state=self.state,
        train_step=self.train_step,
        stream=stream,
        evaluate=self._validate,
        learning_rates=self._learning_rates(),
        report=None if self._replicas is None else self._replicas.report,
        stopping=stopping,
        run=run,
        checkpoints=checkpoints,
        monitor=monitor,
        seconds=seconds,
        watchdog=watchdog,
      )
      ended_by = loop.run()
    self.state = loop.state
    complete = ended_by not in ("SIGTERM", "SIGINT")
    with pause(watchdog, "evaluating the best weights"):
      metrics = self._final(stopping, run, checkpoints, complete=complete)
    result = Result(
      metrics=metrics,
      best_step=stopping.best_step,
      steps=int(self.state.step),
      ended_by=ended_by,
      complete=complete,
      wall_seconds=loop.seconds,
      peak_memory_bytes=run_directory.peak_memory_bytes(),
      workdir=run.path,
      history=run.history(),
      model=self._model,
    )
    run.write_result(result.to_json())
    return result

  def finished(
    self,
    earlier: dict[str, Any],
    run: RunDirectory,
    checkpoints: Checkpoints,
  ) -> Result:
    """Returns the result of a run that an earlier call brought to its end."""
    self._load_best(earlier["best_step"], earlier["steps"], checkpoints)
    return Result.from_json(
      earlier, workdir=run.path, history=run.history(), model=self._model
    )

  def _resume(
    self,
    stopping: EarlyStopping,
    stream: grain.DatasetIterator,
    run: RunDirectory,
    checkpoints: Checkpoints,
  ) -> float:
    """Moves everything to the latest checkpoint; returns the seconds spent."""
    step = checkpoints.latest()
    if step is None:
      run.history(up_to=0)
      return 0.0
    self.state, progress = checkpoints.restore(step, self.state, stream)
    run.history(up_to=step)
    stopping.load(progress["stopping"])
    return progress["seconds"]

  def _final(
    self,
    stopping: EarlyStopping,
    run: RunDirectory,
    checkpoints: Checkpoints,
    *,
    complete: bool,
  ) -> dict[str, float]:
    """Gives the model its best weights; returns what they reach."""
    best = stopping.best_step
    params, rest = self._load_best(best, int(self.state.step), checkpoints)
    if not complete:  # Whoever sent the signal may not wait for long.
      value = stopping.best
      return {} if value is None else {stopping.monitor: value}
    data, spec = self._data, self._spec
    if spec.task != "language":  # Logits of all tokens would fill the disk.
      self._write_predictions(params, rest, run)
    return {
      **self.evaluator.metrics(params, rest, data.validation),
      **self.evaluator.metrics(params, rest, data.test),
    }

  def _write_predictions(self, params: Any, rest: Any, run: RunDirectory):
    test = self._data.test
    outputs, targets = self.evaluator.predict(params, rest, test)
    found = predictions(
      outputs,
      targets,
      test,
      classification=self._spec.task == "classification",
    )
    if not is_first():
      return
    partial = run.path / "predictions.partial.npz"
    np.savez(partial, **found)  # pyrefly: ignore[bad-argument-type]
    os.replace(partial, run.path / "predictions.npz")

  def _load_best(
    self, best: int | None, last: int, checkpoints: Checkpoints
  ) -> tuple[Any, Any]:
    """Puts the best weights, or else the last, into the model."""
    step = last if best is None else best
    params, rest = checkpoints.restore_model(
      step, self.state.params, self.state.rest
    )
    nnx.update(self._model, params, rest)
    return params, rest

  def _validate(self, state: state_lib.TrainState) -> dict[str, float]:
    params = state_lib.evaluated(state)
    return self.evaluator.metrics(params, state.rest, self._data.validation)

  def _learning_rates(self) -> Callable[[Any, Any], dict[str, Any]] | None:
    """Returns the jitted read-back of rates, None if all are hidden."""
    if state_lib.has_workers(self.state.opt_state):
      return None  # Each has its own.
    read = functools.partial(optim.learning_rates, strict=False)
    found = jax.eval_shape(read, self.state.opt_state, self.state.params)
    return jax.jit(read) if found else None

  def _check_model(self, structure: nnx.GraphDef) -> None:
    """Raises when the model cannot take, or answer, the data's batches."""
    stream = data_lib.batches(
      self._data.train, self._batch_size, shuffle=False, epochs=1, prefetch=0
    )
    batch = next(iter(stream))
    weights = self.state.params, self.state.rest
    with on_mesh(self._placement.mesh):
      outputs = jax.eval_shape(
        lambda *weights, inputs: nnx.merge(structure, *weights)(*inputs),
        *weights,
        inputs=[batch[name] for name in self._spec.inputs],
      )
      self._check_outputs(outputs.shape, batch[self._spec.target].shape)
      jax.eval_shape(
        make_eval_step(structure, self._spec),
        *weights,
        metrics_lib.empty(self._spec.task),
        batch,
      )

  def _check_outputs(
    self, found: tuple[int, ...], targets: tuple[int, ...]
  ) -> None:
    """Raises when outputs do not have a place for every target."""
    schema, what = self._data.schema, "logits"
    if schema.task == "language":
      fits = found == (wanted := (*targets, schema.vocab_size))
    elif schema.task == "classification":
      wanted = (targets[0], schema.num_classes)
      fits = math.prod(found[1:]) == wanted[1]
    else:
      what, wanted = "numbers", targets
      fits = math.prod(found[1:]) == math.prod(wanted[1:])
    if not fits:
      raise ValueError(
        f"model must return {what} {['batch', *wanted[1:]]} for "
        f"{self._data.name!r}, got an output of shape {list(found)}."
      )
