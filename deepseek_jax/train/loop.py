"""The training loop: dispatch steps, look now and then, outlive a kill."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grain
import jax
import jax.numpy as jnp

from deepseek_jax import parallel
from deepseek_jax.train import metrics as metrics_lib
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.early_stopping import EarlyStopping
from deepseek_jax.train.monitor import Monitor
from deepseek_jax.train.processes import agreed
from deepseek_jax.train.run_directory import RunDirectory
from deepseek_jax.train.signals import StopSignal
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import IN_FLIGHT

S = TypeVar("S")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """When a run looks, saves and ends.

  Attributes:
    total: Steps of the whole run.
    limit: What ends it there: "epochs" or "steps".
    steps_per_epoch: Batches in an epoch.
    evaluate_every: Steps between evaluations.
    log_every: Steps between log lines.
    checkpoint_seconds: Seconds between checkpoints, beside those of every best
      evaluation.
    max_skipped: Non-finite steps in a row that end the run.
  """

  total: int
  limit: str
  steps_per_epoch: int
  evaluate_every: int
  log_every: int
  checkpoint_seconds: int | float
  max_skipped: int

  def __post_init__(self):
    """Checks the intervals."""
    for name in ("evaluate_every", "log_every"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be at least 1 step, got {name}={getattr(self, name)}."
        )
    if not self.checkpoint_seconds >= 0:
      raise ValueError(
        "checkpoint_seconds must be at least 0, got "
        f"{self.checkpoint_seconds=}."
      )

  def next_event(self, step: int) -> int:
    """Returns the next step at which there is something to look at."""
    return min(
      self.total,
      step - step % self.log_every + self.log_every,
      step - step % self.evaluate_every + self.evaluate_every,
    )

  def evaluates(self, step: int) -> bool:
    """Whether there is an evaluation after this step."""
    return step % self.evaluate_every == 0 or step == self.total

  def logs(self, step: int) -> bool:
    """Whether there is a log line after this step."""
    return step % self.log_every == 0 or self.evaluates(step)


class Loop:
  """Runs steps until something ends the run.

  Between events the host only dispatches: it never waits for a number. What is
  logged is computed on the device at once and read at the next event, when
  later steps are on their way.

  Args:
    schedule: When to look, save and end.
    state: Where to start, on the devices.
    train_step: The jitted step.
    stream: Iterator over batches, with Grain's `get_state`.
    evaluate: From the state to metrics of the validation split.
    learning_rates: From (opt_state, params) to rate by path, or None.
    report: From opt_state to more numbers for every log line, or None.
    stopping: What watches the evaluations.
    run: Where lines go.
    checkpoints: Where states go.
    monitor: What a person sees.
    seconds: Seconds spent by earlier starts.
    watchdog: What is told that the run goes on, or None.
  """

  def __init__(
    self,
    schedule: Schedule,
    *,
    state: TrainState,
    train_step: Callable[[TrainState, Any], TrainState],
    stream: grain.DatasetIterator,
    evaluate: Callable[[TrainState], dict[str, float]],
    learning_rates: Callable[[Any, Any], dict[str, Any]] | None,
    report: Callable[[Any], dict[str, Any]] | None,
    stopping: EarlyStopping,
    run: RunDirectory,
    checkpoints: Checkpoints,
    monitor: Monitor,
    seconds: float = 0.0,
    watchdog: parallel.Watchdog | None = None,
  ):
    self.state = state
    self.stopping = stopping
    self._schedule = schedule
    self._train_step = train_step
    self._stream = stream
    self._evaluate = evaluate
    self._learning_rates = learning_rates
    self._report = report
    self._run = run
    self._checkpoints = checkpoints
    self._monitor = monitor
    self._watchdog = watchdog
    self._earlier = seconds
    self._started = self._saved = time.perf_counter()
    self._pending: tuple[dict[str, Any], Any] | None = None
    self._timed = (int(state.step), self._started)
    self._halted = int(state.skipped_in_a_row) >= schedule.max_skipped

  @property
  def seconds(self) -> float:
    """Seconds spent so far, over all starts."""
    return self._earlier + time.perf_counter() - self._started

  def run(self) -> str:
    """Runs to the end; returns what ended the run.

    The last state is on disk when it returns.
    """
    with StopSignal() as stop:
      step = int(self.state.step)
      ended_by = self._reason(step, stop)
      while ended_by is None:
        step = self._steps(step, stop)
        if self._schedule.logs(step):
          self._look(step)
        ended_by = self._reason(step, stop)
      with pause(self._watchdog, "saving the last state"):
        self._flush()
        self._save()
        self._checkpoints.wait()
    return "non-finite" if self._halted else ended_by

  def _steps(self, step: int, stop: StopSignal) -> int:
    """Dispatches steps up to the next event or signal; returns where it is."""
    self.state, step = take_steps(
      self.state,
      self._train_step,
      self._stream,
      first=step,
      last=self._schedule.next_event(step),
      stop=stop,
      advance=self._advance,
    )
    return step

  def _advance(self, step: int) -> None:
    self._monitor.advance(step)
    if self._watchdog is not None:
      self._watchdog.beat(step)

  def _look(self, step: int) -> None:
    """Logs; evaluates and saves when it is time."""
    with pause(self._watchdog, "evaluating or saving"):
      self._log_and_save(step)

  def _log_and_save(self, step: int) -> None:
    self._flush()
    self._log()
    best = (
      self._schedule.evaluates(step)
      and not self._has_halted()
      and self._evaluation(step)
    )
    if best or self._due():
      self._flush()
      self._save()

  def _log(self) -> None:
    """Starts the computation of a log line and resets the running metrics."""
    state = self.state
    values = _snapshot(state)
    if self._report is not None:
      values["exchange"] = self._report(state.opt_state)
    self._pending = ({"seconds": self.seconds}, values)
    self.state = state._replace(
      metrics=jax.tree.map(jnp.zeros_like, state.metrics)
    )

  def _has_halted(self) -> bool:
    """Waits for the steps, as an evaluation would, to see if they counted."""
    in_a_row = int(self.state.skipped_in_a_row)
    self._halted = in_a_row >= self._schedule.max_skipped
    return self._halted

  def _evaluation(self, step: int) -> bool:
    """Evaluates, completes the pending record; returns whether it is best."""
    extra: dict[str, Any] = {"steps_per_second": self._speed(step)}
    found = self._evaluate(self.state)
    extra |= found
    if self._learning_rates is not None:
      rates = jax.device_get(
        self._learning_rates(self.state.opt_state, self.state.params)
      )
      extra["learning_rate"] = {
        path: metrics_lib.number(rate) for path, rate in rates.items()
      }
    best = self.stopping.update(found[self.stopping.monitor], step)
    self._flush(extra)
    self._timed = (step, time.perf_counter())
    return best

  def _speed(self, step: int) -> float:
    """Returns steps a second since the last evaluation.

    Waits for the steps to end, as the evaluation would do anyway.
    """
    jax.block_until_ready(self.state.step)
    last_step, since = self._timed
    return (step - last_step) / (time.perf_counter() - since)

  def _flush(self, extra: dict[str, Any] | None = None) -> None:
    """Reads the pending numbers and writes their line."""
    if self._pending is None:
      return
    record, values = self._pending
    self._pending = None
    values = jax.device_get(values)
    self._halted = values["skipped_in_a_row"] >= self._schedule.max_skipped
    step = int(values["step"])  # Less than dispatched once steps do nothing.
    record = {
      "step": step,
      "epoch": step / self._schedule.steps_per_epoch,
      **record,
    }
    record |= metrics_lib.named("train", values["metrics"])
    record["train/skipped"] = int(values["skipped"])
    for name, value in values.get("exchange", {}).items():
      record[name] = metrics_lib.number(value)
    record |= extra or {}
    self._run.append(record)
    self._monitor.record(record)

  def _due(self) -> bool:
    waited = time.perf_counter() - self._saved
    return agreed(waited >= self._schedule.checkpoint_seconds)

  def _save(self) -> None:
    """Starts writing a checkpoint; every line before it is on disk."""
    self._checkpoints.save(
      self.state,
      self._stream,
      {"stopping": self.stopping.progress(), "seconds": self.seconds},
      step=int(self.state.step),
      best_step=self.stopping.best_step,
    )
    self._saved = time.perf_counter()

  def _reason(self, step: int, stop: StopSignal) -> str | None:
    """Returns what ends the run now, if anything does."""
    if self._halted:
      return "non-finite"
    if self.stopping.should_stop:
      return "early stopping"
    if step >= self._schedule.total:
      return self._schedule.limit
    return stop.name


def pause(
  watchdog: parallel.Watchdog | None, why: str
) -> contextlib.AbstractContextManager[None]:
  """Returns a context in which a watchdog, if there is one, expects no step."""
  return contextlib.nullcontext() if watchdog is None else watchdog.pause(why)


def take_steps(
  state: S,
  train_step: Callable[[S, Any], S],
  stream: Iterator[Any],
  *,
  first: int,
  last: int,
  stop: StopSignal,
  advance: Callable[[int], None],
) -> tuple[S, int]:
  """Dispatches steps and seldom waits for one: the hot loop.

  Args:
    state: Where to start; donated.
    train_step: The jitted step.
    stream: Iterator over batches.
    first: Number of steps taken before.
    last: Number of steps to reach.
    stop: Ends the loop after the current step.
    advance: Told the number of steps after each.

  Returns:
    The state, perhaps still being computed, and the number of steps taken.
  """
  step = first
  while step < last and stop.name is None:
    state = train_step(state, next(stream))
    step += 1
    advance(step)
    stop.look(step)
    if (step - first) % IN_FLIGHT == 0:
      jax.block_until_ready(state)
  return state, step


@jax.jit
def _snapshot(state: TrainState) -> dict[str, Any]:
  """Returns what a log line tells, in arrays of its own."""
  return {
    "step": state.step,
    "metrics": metrics_lib.compute(state.metrics),
    "skipped": state.skipped,
    "skipped_in_a_row": state.skipped_in_a_row,
  }


def total_steps(
  epochs: int | float | None, steps: int | None, steps_per_epoch: int
) -> tuple[int, str]:
  """Returns how many steps a run has and which argument says so.

  Raises:
    ValueError: If neither is given or one is not positive.
  """
  if epochs is None and steps is None:
    raise ValueError("epochs or steps must be given, got neither.")
  if epochs is not None and not (math.isfinite(epochs) and epochs > 0):
    raise ValueError(f"epochs must be positive, got {epochs=}.")
  if steps is not None and steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps=}.")
  by_epochs = (
    math.inf if epochs is None else math.ceil(epochs * steps_per_epoch)
  )
  by_steps = math.inf if steps is None else steps
  if by_steps < by_epochs:
    return int(by_steps), "steps"
  return int(by_epochs), "epochs"
