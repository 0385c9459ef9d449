"""Trains one workload with one optimizer, and remembers every run.

A run is a line of a JSON-lines file. What is there is not run again, so a
benchmark of hours can be killed and goes on where it was.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import workloads

Setting = Mapping[str, float]
EVERY = 10  # Steps between two evaluations.
# One thread: a run is on its own core, and a core runs one.
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclasses.dataclass(frozen=True)
class Task:
  """What one run is; hashable, and small enough to send to a process."""

  workload: str
  candidate: str
  setting: tuple[tuple[str, float], ...]
  seed: int

  @classmethod
  def of(cls, workload, candidate, setting, seed) -> "Task":
    """The task of a setting given as a dict."""
    return cls(workload, candidate, tuple(sorted(setting.items())), seed)

  @property
  def key(self) -> str:
    """The name of the run in the file."""
    words = [f"{name}={value:g}" for name, value in self.setting]
    return " ".join([self.workload, self.candidate, *words, f"@{self.seed}"])


@dataclasses.dataclass(frozen=True)
class Places:
  """Where workloads, further candidates and runs are found.

  Attributes:
    runs: the file of runs.
    workloads: the folder of workloads.
    candidates: a file that defines further CANDIDATES, or None.
  """

  runs: pathlib.Path
  workloads: pathlib.Path = workloads.FOLDER
  candidates: pathlib.Path | None = None


class Trainer:
  """One workload and one candidate, compiled once for all settings and seeds.

  Steps are single calls: inside a `lax.scan` XLA's CPU convolutions run 40
  times slower.
  """

  def __init__(self, workload: workloads.Workload, candidate: Any):
    import jax
    import optax

    self.workload = workload

    def transform(setting):
      tx = candidate.make(setting, workload.steps)
      return optax.with_extra_args_support(tx)

    def step(setting, params, opt_state, batch):
      value, grads = jax.value_and_grad(workload.loss)(params, batch)
      updates, opt_state = transform(setting).update(
        grads, opt_state, params, value=value
      )
      return optax.apply_updates(params, updates), opt_state

    self._init = jax.jit(lambda s, params: transform(s).init(params))
    self._step = jax.jit(step, donate_argnums=(1, 2))
    self._validate = jax.jit(
      lambda params, opt_state: workload.validation_loss(
        candidate.evaluate_at(opt_state, params)
      )
    )
    self._compiled = False

  def run(self, setting: Setting, seed: int) -> dict[str, Any]:
    """Returns losses, one every `EVERY` steps, and seconds of training.

    Ends at the first loss that is not finite, from which no optimizer comes
    back, and where the loss stands still to the last bit: the rate is zero.
    """
    import jax

    state, arguments = self._start(setting, seed)
    if not self._compiled:
      state = self._advance(arguments, state, seed, 0, 1)
      self._validate(*state)
      self._compiled = True
      state, arguments = self._start(setting, seed)
    losses, seconds = [], 0.0
    for first in range(0, self.workload.steps, EVERY):
      started = time.perf_counter()
      last = min(first + EVERY, self.workload.steps)
      state = jax.block_until_ready(
        self._advance(arguments, state, seed, first, last)
      )
      seconds += time.perf_counter() - started
      losses.append(float(self._validate(*state)))
      if not math.isfinite(losses[-1]) or losses[-3:-1] == losses[-1:] * 2:
        break
    finite = [float(f"{x:.6g}") for x in losses if math.isfinite(x)]
    return {
      "losses": finite,
      "finite": len(finite) == len(losses),
      "steps": self.workload.steps,
      "seconds_per_step": float(f"{seconds / last:.4g}"),
    }

  def repeat(self, setting: Setting, batch: Any) -> Callable[[], object]:
    """A function that does one more step on a batch and waits for it."""
    import jax

    state, arguments = self._start(setting, 0)

    def once():
      nonlocal state
      state = jax.block_until_ready(self._step(arguments, *state, batch))

    return once

  def _start(self, setting, seed):
    import jax
    import numpy as np

    arguments = {name: np.float32(value) for name, value in setting.items()}
    params = self.workload.init(seed)
    state = (params, self._init(arguments, params))
    # Copies: some states hold the parameters, and steps donate both.
    return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state), (
      arguments
    )

  def _advance(self, arguments, state, seed, first, last):
    for i in range(first, last):
      state = self._step(arguments, *state, self.workload.batch(seed, i))
    return state


@functools.lru_cache(maxsize=8)
def trainer(workload: str, candidate: str, places: Places) -> Trainer:
  """The trainer of two names; compiled on its first run."""
  import optimizer_candidates

  return Trainer(
    workloads.load(workload, places.workloads),
    optimizer_candidates.find(candidate, places.candidates),
  )


def perform(task: Task, places: Places) -> dict[str, Any]:
  """Runs a task; returns its record."""
  found = trainer(task.workload, task.candidate, places).run(
    dict(task.setting), task.seed
  )
  return {
    "key": task.key,
    "workload": task.workload,
    "candidate": task.candidate,
    "setting": dict(task.setting),
    "seed": task.seed,
    **found,
  }


def read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Key to record; the later of two wins.

  A last line that a kill left half-written is passed over.
  """
  found = {}
  text = path.read_text() if path.exists() else ""
  for line in text.splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    found[record["key"]] = record
  return found


def ensure(
  tasks: Sequence[Task],
  places: Places,
  *,
  jobs: int = 1,
  again: bool = False,
  progress: Callable[..., Any] = lambda records, total: records,
) -> dict[str, dict[str, Any]]:
  """Runs the tasks that the file lacks, and returns all its records.

  Args:
    tasks: those wanted, in their order.
    places: of files.
    jobs: worker processes, each on a core of its own; 0 for this process.
    again: run also what is there; the new record counts.
    progress: wraps the iterator over the records to be made, and gets their
      number.
  """
  known = read(places.runs)
  missing = [
    task for task in dict.fromkeys(tasks) if again or task.key not in known
  ]
  if missing:
    places.runs.parent.mkdir(parents=True, exist_ok=True)
    with _whole_lines(places.runs) as file:
      records = _perform_all(missing, places, jobs)
      for record in progress(records, len(missing)):
        known[record["key"]] = record
        file.write(json.dumps(record) + "\n")
        file.flush()
  return known


def _whole_lines(path: pathlib.Path):
  """Opens a file to append lines, after what a kill left of the last one."""
  torn = path.exists() and not path.read_bytes().endswith(b"\n")
  file = path.open("a")
  if torn and path.stat().st_size:
    file.write("\n")
  return file


def _perform_all(
  tasks: Sequence[Task], places: Places, jobs: int
) -> Iterator[dict[str, Any]]:
  if jobs == 0:
    yield from (perform(task, places) for task in tasks)
    return
  context = multiprocessing.get_context("spawn")
  cores = context.Queue()
  for core in _cores()[:jobs]:
    cores.put(core)
  os.environ["XLA_FLAGS"] = XLA_FLAGS
  with concurrent.futures.ProcessPoolExecutor(
    min(jobs, len(_cores())), context, _settle, (cores,)
  ) as pool:
    waiting = [pool.submit(perform, task, places) for task in tasks]
    try:
      for future in concurrent.futures.as_completed(waiting):
        yield future.result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> list[int | None]:
  if hasattr(os, "sched_getaffinity"):
    return list(sorted(os.sched_getaffinity(0)))
  return [None] * (os.cpu_count() or 1)


def _settle(cores) -> None:
  """Takes a core for this process, before JAX starts its threads."""
  core = cores.get()
  if core is not None:
    os.sched_setaffinity(0, {core})
