"""What this rank's thread of work tells its watchdog."""

import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Iterator

from deepseek_jax.parallel.activity import COMPILING, activity
from deepseek_jax.parallel.verdict import PAUSED, RUNNING, Report


class AwakeClock:
  """Seconds that this process was running, as its watchdog saw them.

  A process that was stopped, or whose machine slept, did not hear the others
  meanwhile: that time must not count against them.

  Args:
    longest: Seconds that count of one tick, at most.

  Attributes:
    now: Seconds since the start.
  """

  def __init__(self, longest: int | float):
    self._longest = longest
    self._last: float | None = None
    self.now = 0.0

  def tick(self, time: int | float) -> None:
    """Moves on to a time of `time.monotonic`."""
    if self._last is not None:
      self.now += min(time - self._last, self._longest)
    self._last = time

  def lag(self, time: int | float) -> float:
    """Returns for how long there was no tick, at a time of the same kind."""
    return 0.0 if self._last is None else time - self._last


class Progress:
  """State of the work, written by its thread and read by the watchdog's.

  Args:
    clock: What tells the time.
    seconds: How long a step may take.
    start_seconds: How long the first one may take.
    pause_seconds: How long a pause or a compilation may take.
  """

  def __init__(
    self,
    clock: AwakeClock,
    *,
    seconds: int | float,
    start_seconds: int | float,
    pause_seconds: int | float,
  ):
    self._clock = clock
    self.set_limits(seconds, start_seconds, pause_seconds)
    thread = threading.current_thread()
    self._thread = (thread.ident or 0, thread.native_id or 0)
    self._host = f"{socket.gethostname()}, process {os.getpid()}"
    self._step: int | None = None
    self.state = RUNNING
    self._why = ""
    self.start()

  def set_limits(
    self,
    seconds: int | float,
    start_seconds: int | float,
    pause_seconds: int | float,
  ) -> None:
    """Changes how long things may take, from the next on."""
    self._seconds = seconds
    self._start_seconds = start_seconds
    self._pause_seconds = pause_seconds

  def start(self) -> None:
    """Tells that it will take a while to the next step."""
    self._since = self._clock.now
    self._limit = self._start_seconds
    self._starting = True

  def beat(self, step: int | None) -> None:
    """Tells that the work goes on."""
    self._since = self._clock.now
    self._limit = self._seconds
    self._starting = False
    if step is not None:
      self._step = step

  @contextlib.contextmanager
  def pause(self, why: str, seconds: int | float | None) -> Iterator[None]:
    """Tells that no step will be taken for a while."""
    before = (self.state, self._limit, self._why, self._starting)
    limit = self._pause_seconds if seconds is None else seconds
    self.state, self._limit, self._why = PAUSED, limit, why
    self._since = self._clock.now
    try:
      yield
    finally:
      if self.state == PAUSED:  # Not if it has raised meanwhile.
        self.state, self._limit, self._why, self._starting = before
        self._since = self._clock.now

  def end(self, state: str, why: str = "") -> None:
    """Tells that the work has ended, and how."""
    self._why = why
    self._since = self._clock.now
    self.state = state

  def report(self) -> Report:
    """Returns what to tell the other ranks."""
    place, where = activity(*self._thread)
    age = self._clock.now - self._since
    report = Report(
      state=self.state,
      age=age,
      limit=self._limit,
      step=self._step,
      place=place,
      where=where,
      why=self._why,
      host=self._host,
    )
    if self.state == RUNNING and place == COMPILING:
      limit = max(self._limit, self._pause_seconds)
      report = dataclasses.replace(report, limit=limit)
      return dataclasses.replace(report, excused=age <= limit)
    waited_for = self._starting or self.state == PAUSED
    working = self.state in (RUNNING, PAUSED)
    return dataclasses.replace(
      report, excused=waited_for and working and age <= self._limit
    )
