"""`fit`: from a model, a transform and a data set to a result on disk."""

import contextlib
import dataclasses
import difflib
import json
import numbers
import os
from collections.abc import Mapping
from typing import Any

import optax
from flax import nnx
from jax.sharding import Mesh

from deepseek_jax import data as data_lib
from deepseek_jax import parallel
from deepseek_jax.data.schema import Task
from deepseek_jax.train import losses as losses_lib
from deepseek_jax.train import metrics as metrics_lib
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.early_stopping import EarlyStopping
from deepseek_jax.train.exchange import Exchange, as_exchange
from deepseek_jax.train.initial import Build
from deepseek_jax.train.loop import Schedule, total_steps
from deepseek_jax.train.placement import Placement
from deepseek_jax.train.processes import watched
from deepseek_jax.train.result import Result
from deepseek_jax.train.run_directory import RunDirectory
from deepseek_jax.train.session import Session
from deepseek_jax.train.step import StepSpec

# Arguments that do not change a run's numbers, or are compared by themselves.
_NOT_IDENTITY = frozenset(
  [
    "model",
    "tx",
    "data",
    "workdir",
    "loss",
    "config",
    "mesh",
    "rules",
    "exchange",
    "prefetch",
    "progress",
    "tensorboard",
    "checkpoint_seconds",
    "watchdog_seconds",
    "keep",
  ]
)

_INTEGERS = (
  *("steps", "batch_size", "accumulate", "seed", "patience"),
  *("evaluate_every", "log_every", "max_skipped"),
)


def fit(
  model: nnx.Module | Build,
  tx: optax.GradientTransformation,
  data: data_lib.Dataset,
  *,
  workdir: str | os.PathLike,
  epochs: int | float | None = None,
  steps: int | None = None,
  batch_size: int = 64,
  accumulate: int = 1,
  seed: int = 0,
  loss: losses_lib.Loss | None = None,
  l1: float = 0.0,
  l2: float = 0.0,
  clip_norm: float | None = None,
  monitor: str = "validation/loss",
  mode: str | None = None,
  patience: int | None = None,
  min_delta: float = 0.0,
  evaluate_every: int | None = None,
  log_every: int = 50,
  checkpoint_seconds: int | float = 30.0,
  keep: int = 2,
  max_skipped: int = 10,
  mesh: Mesh | parallel.MeshSpec | None = None,
  rules: parallel.Rules = (),
  exchange: Exchange | str | None = None,
  watchdog_seconds: int | float = 600.0,
  prefetch: int | None = None,
  progress: bool = True,
  tensorboard: bool = True,
  config: Mapping[str, Any] | None = None,
) -> Result:
  """Trains a model; goes on where an earlier, killed call left off.

  On one machine and one set of versions the result is a pure function of the
  arguments: the same call gives the same bits whether it ran at once or was
  killed any number of times. It ends with the weights of the best evaluation,
  whatever ended the run; with the last ones if no evaluation was finite. Two
  things it cannot compare when it goes on: the settings inside `tx` (pass them
  as `config`) and the contents of arrays given to `data.from_arrays`.

  Where `tx` averages its iterates (`optim.anytime_average`), the average is
  what is evaluated, compared, saved and returned; training goes on from the
  iterate. Batch norm's running statistics stay those of the iterates.

  SIGTERM and SIGINT (the stop button of a notebook) finish the current step,
  write one checkpoint and return with `complete=False`; calling again goes on.
  Calling again after the end returns the same result without training.

  Args:
    model: Any NNX module; called as `model(*inputs)` with the inputs the data's
      schema names, it returns logits [B, classes] or numbers [B] or [B, 1], for
      text logits [B, T, vocabulary]. It is given the best weights at the end,
      and left in evaluation mode. Or a function of no arguments that returns
      one: its weights are then made in parts, each on its device.
    tx: Any Optax transform; the loss reaches it as `value`.
    data: Splits and schema, from `data.load` or `data.from_arrays`.
    workdir: Run directory: missing, empty or left by the same call.
    epochs: Passes over the training split; positive, may be a fraction.
    steps: Optimizer steps; with both given, whichever comes first ends the run.
    batch_size: Examples a step, over all devices; at most the training split.
    accumulate: Micro-batches a step is cut into, to save memory; must divide
      `batch_size`. The loss stays the mean over the whole batch.
    seed: Seed of the order of examples. The model's own seeds are its `rngs`.
    loss: Loss per example; cross entropy for labels and tokens, mean squared
      error for numbers when None.
    l1: Strength of the L1 penalty on weights, at least 0.
    l2: Strength of the L2 penalty on weights, at least 0.
    clip_norm: Global norm to which gradients are clipped, positive; None: not.
    monitor: Metric that decides which weights are best: "validation/loss", or
      "validation/accuracy" ("validation/rmse" for numbers; also
      "validation/bits_per_byte" for text).
    mode: "min" or "max"; None chooses by the metric.
    patience: Evaluations without improvement that end the run; None: never.
    min_delta: What counts as an improvement, in the metric's unit.
    evaluate_every: Steps between evaluations; None: once an epoch.
    log_every: Steps between log lines.
    checkpoint_seconds: Seconds between checkpoints, looked at when there is a
      log line: a kill costs at most this and `log_every` steps more. A best
      evaluation is always saved, and so is the end.
    keep: Newest checkpoints to keep, besides the best.
    max_skipped: Steps in a row with a non-finite loss or gradient that end the
      run. Such a step changes no parameter.
    mesh: Sizes of the mesh's axes, or a mesh with some of `parallel.AXES`;
      None: all devices along "data". The numbers of a run do not depend on it,
      but for the order of sums: a run may go on on another mesh.
    rules: How to cut parameters over the mesh, pairs of a path pattern and a
      `PartitionSpec` as in `parallel.specs`; they come before the library's own
      for its models, and before one that cuts large arrays over "fsdp".
    exchange: How devices average their gradients over "replica" and "data", as
      `Exchange` or in words, such as "int8", "power_sgd:rank=2" or
      "diloco:period=50,compression=int8": for slow links. None: XLA sums them.
    watchdog_seconds: Seconds without a step after which a run of several
      processes ends, each naming the one that stopped it, see
      `parallel.Watchdog`. A process that is alone is not watched.
    prefetch: Batches a thread prepares ahead; None: 2, or 0 for data in memory
      on a CPU, where a thread would only get in the way.
    progress: Whether to show a bar (on a terminal) or lines.
    tensorboard: Whether to write TensorBoard events into `workdir`.
    config: Anything JSON that must be equal for a run to be the same, such as
      the optimizer's settings, which cannot be read out of `tx`.

  Returns:
    Metrics, history, the model with its best weights, and what ended the run.

  Raises:
    ValueError: If an argument is out of range, the model does not fit the data,
      or `workdir` holds something else. Nothing is written then.
    CheckpointError: If a checkpoint cannot be written, as on a full disk.

  Examples:
    >>> import tempfile, numpy as np, optax
    >>> from flax import nnx
    >>> import deepseek_jax as dj
    >>> x = np.linspace(-1, 1, 96, dtype=np.float32).reshape(32, 3)
    >>> split = {"x": x, "y": x.sum(axis=1)}
    >>> data = dj.data.from_arrays(
    ...     split, split, split, inputs=("x",), target="y")
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> result = fit(model, optax.adam(0.1), data, epochs=25, batch_size=32,
    ...              workdir=tempfile.mkdtemp(), progress=False)
    >>> result.metrics["test/rmse"] < 0.3
    True
  """
  arguments = {
    name: value for name, value in locals().items() if name not in _NOT_IDENTITY
  }
  _check_integers(arguments)
  _check_sizes(len(data.train), batch_size, accumulate, clip_norm, keep)
  spec = StepSpec.of(
    data.schema,
    loss,
    accumulate=accumulate,
    l1=l1,
    l2=l2,
    max_skipped=max_skipped,
  )
  _check_monitor(monitor, spec.task)
  stopping = EarlyStopping(
    monitor=monitor, patience=patience, min_delta=min_delta, mode=mode
  )
  per_epoch = data_lib.steps_per_epoch(len(data.train), batch_size)
  total, limit = total_steps(epochs, steps, per_epoch)
  schedule = Schedule(
    total=total,
    limit=limit,
    steps_per_epoch=per_epoch,
    evaluate_every=per_epoch if evaluate_every is None else evaluate_every,
    log_every=log_every,
    checkpoint_seconds=checkpoint_seconds,
    max_skipped=max_skipped,
  )
  exchange = as_exchange(exchange)
  placement = Placement(mesh, rules, exchange)
  asked = {
    "data": data.name,
    "schema": json.loads(data.schema.to_json()),
    "arguments": arguments | {"loss": _name(spec.loss)},
    "config": config,
  }
  if exchange is not None:
    asked["exchange"] = dataclasses.asdict(exchange)
  # Before anything that processes do together: they would wait for ever.
  parallel.agree({**asked, "mesh": dict(placement.mesh.shape)}, what="run")
  placement.check("batch_size / accumulate", batch_size // accumulate)
  if clip_norm is not None:
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
  with contextlib.ExitStack() as stack:
    watchdog = stack.enter_context(watched(watchdog_seconds))
    session = Session(model, tx, data, spec, placement, batch_size)
    stream = session.stream(seed, prefetch)
    identity = {**asked, "parameters": session.parameters()}
    run = stack.enter_context(
      contextlib.closing(RunDirectory(workdir, identity))
    )
    checkpoints = stack.enter_context(
      contextlib.closing(Checkpoints(run.checkpoints, keep=keep))
    )
    stack.enter_context(contextlib.closing(stream))
    earlier = run.result()
    if earlier is not None and earlier["complete"]:
      return session.finished(earlier, run, checkpoints)
    return session.train(
      schedule,
      stopping,
      stream,
      run,
      checkpoints,
      progress=progress,
      tensorboard=tensorboard,
      watchdog=watchdog,
    )


def _name(loss: losses_lib.Loss) -> str:
  """Returns what tells losses apart, the same in every process."""
  if dataclasses.is_dataclass(loss):
    return repr(loss)
  return f"{type(loss).__module__}.{type(loss).__qualname__}"


def _check_integers(arguments: Mapping[str, Any]) -> None:
  for name in _INTEGERS:
    value = arguments[name]
    if not (value is None or isinstance(value, numbers.Integral)):
      raise ValueError(f"{name} must be an integer, got {value!r}.")


def _check_sizes(
  examples: int,
  batch_size: int,
  accumulate: int,
  clip_norm: float | None,
  keep: int,
) -> None:
  if keep < 1:
    raise ValueError(f"keep must be at least 1 checkpoint, got {keep=}.")
  if not 1 <= batch_size <= examples:
    raise ValueError(
      f"batch_size must be in [1, {examples}], the examples of the training "
      f"split, got {batch_size=}."
    )
  if accumulate < 1 or batch_size % accumulate:
    raise ValueError(
      f"accumulate must be at least 1 and divide {batch_size=}, got "
      f"{accumulate=}."
    )
  if clip_norm is not None and not 0 < clip_norm < float("inf"):
    raise ValueError(f"clip_norm must be positive or None, got {clip_norm=}.")


def _check_monitor(monitor: str, task: Task) -> None:
  known = [f"validation/{name}" for name in ("loss", *metrics_lib.KINDS[task])]
  if monitor not in known:
    near = difflib.get_close_matches(monitor, known, n=1, cutoff=0.0)[0]
    raise ValueError(
      f"monitor must be one of {known}, got {monitor=}; did you mean {near!r}?"
    )
