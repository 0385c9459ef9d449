"""What a person sees of a run: a progress bar, lines, TensorBoard curves."""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import rich.console
import rich.progress


class Monitor:
  """Shows a run; silent on every process but the first.

  A bar on a terminal, one plain line an evaluation elsewhere, and TensorBoard
  events beside the run.

  Args:
    directory: Where TensorBoard events go.
    total: Steps of the whole run.
    done: Steps already taken.
    progress: Whether to show anything.
    tensorboard: Whether to write events.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    total: int,
    done: int,
    progress: bool,
    tensorboard: bool,
  ):
    first = jax.process_index() == 0
    self._console = rich.console.Console(stderr=True, quiet=not first)
    self._show = progress and first
    self._total = total
    self._bar: rich.progress.Progress | None = None
    if self._show and self._console.is_terminal:
      self._bar = rich.progress.Progress(
        "[progress.description]{task.description}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=self._console,
        transient=True,
      )
      self._task = self._bar.add_task("training", total=total, completed=done)
      self._bar.start()
    self._next = 0.0
    self._writer = (
      _event_writer(directory, done) if tensorboard and first else None
    )

  def advance(self, step: int) -> None:
    """Moves the bar, at most ten times a second; costs next to nothing."""
    if self._bar is None:
      return
    now = time.perf_counter()
    if now >= self._next:
      self._next = now + 0.1
      self._bar.update(self._task, completed=step)

  def record(self, record: Mapping[str, Any]) -> None:
    """Writes a record to TensorBoard and, at evaluations, to the screen."""
    step = record["step"]
    if self._writer is not None:
      for name, value in _scalars(record).items():
        self._writer.add_scalar(name, value, step)
    if self._show and any(name.startswith("validation/") for name in record):
      self.say(_line(record, self._total))

  def say(self, text: str) -> None:
    """Prints a line above the bar."""
    if self._show:
      self._console.print(text, highlight=False, soft_wrap=True)

  def close(self) -> None:
    """Removes the bar and finishes the event file."""
    if self._bar is not None:
      self._bar.stop()
    if self._writer is not None:
      self._writer.close()


def _event_writer(directory: pathlib.Path, done: int) -> Any:
  import tensorboardX  # Slow to import, and not every run wants it.

  return tensorboardX.SummaryWriter(str(directory), purge_step=done or None)


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
  rates = record.get("learning_rate", {})
  return {
    **{
      name: value
      for name, value in record.items()
      if name not in ("step", "learning_rate")
    },
    **{f"learning_rate/{path}": rate for path, rate in rates.items()},
  }


def _line(record: Mapping[str, Any], total: int) -> str:
  width = len(str(total))
  text = f"step {record['step']:{width}}/{total}  epoch {record['epoch']:5.1f}"
  for split in ("train", "validation"):
    names = [n for n in record if n.startswith(f"{split}/")]
    values = [
      f"{name.removeprefix(split + '/')} {record[name]:.4f}"
      for name in sorted(names, key=lambda n: not n.endswith("/loss"))
      if name != "train/skipped"
    ]
    text += f"  {split} {' '.join(values)}"
  if record.get("train/skipped"):
    text += f"  skipped {record['train/skipped']}"
  return text
