"""The watchdog's thread: it listens, judges and ends the process."""

import atexit
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping

from deepseek_jax.parallel import last_words
from deepseek_jax.parallel.exchange import Exchange
from deepseek_jax.parallel.launchers import Processes
from deepseek_jax.parallel.progress import AwakeClock, Progress
from deepseek_jax.parallel.store import Store, leave_at_exit
from deepseek_jax.parallel.verdict import (
  ENDING,
  RAISED,
  Bounds,
  Report,
  Verdict,
  judge,
)

WATCHDOG_EXIT = 70
"""Exit code of a process that its watchdog ended."""

_GONE = "it died, or its host is stopped or cut off"
_GRACE = 2.0  # Seconds for an error of one's own, when a peer has raised.
_GOODBYE = 3.0  # Seconds that rank 0 waits until all have read the verdict.
_LAST = 10.0  # Seconds in which a rank has to end, once the verdict is there.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Seconds that a step, the first one, and a pause may take."""

  seconds: int | float
  start_seconds: int | float
  pause_seconds: int | float


class Watcher:
  """One rank's part of the watchdog.

  Rank 0 judges, and the others hear its verdict; they judge rank 0.

  Args:
    processes: Which rank this is.
    store: Where the ranks meet; None where there is but one.
    limits: How long things may take.

  Attributes:
    progress: What the working thread tells.
  """

  def __init__(self, processes: Processes, store: Store | None, limits: Limits):
    self._rank, self._address = processes.index, processes.coordinator
    self._tick = min(1.0, limits.seconds / 20)
    self._bounds, self._seconds = self._bounds_of(limits), limits.seconds
    self._clock = AwakeClock(5 * self._tick)
    self.progress = Progress(self._clock, **dataclasses.asdict(limits))
    self._excused_at = 0.0
    self._verdict: Verdict | None = None
    self._announced = threading.Lock()
    self._stopped, self._settled = threading.Event(), threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="watchdog", daemon=True
    )
    self._exchange: Exchange | None = None
    if store is not None:
      self._exchange = Exchange(
        store,
        self._rank,
        processes.count,
        self._clock,
        self._report,
        self._tick,
      )

  def set_limits(self, limits: Limits) -> None:
    """Changes how long things may take."""
    self._bounds, self._seconds = self._bounds_of(limits), limits.seconds
    self.progress.set_limits(**dataclasses.asdict(limits))

  def _bounds_of(self, limits: Limits) -> Bounds:
    # A process that swaps, or keeps the GIL for a while, is not dead. Of one
    # that is, JAX itself knows after `heartbeat_seconds`.
    return Bounds(
      silent=min(limits.seconds, 120.0),
      quick=max(3.0, 6 * self._tick),
      never=limits.start_seconds,
    )

  def start(self) -> None:
    """Begins to watch."""
    exchange = self._exchange
    if exchange is not None:
      exchange.start()
      self._abort = last_words.OnAbort(lambda: self._on_abort(exchange))
    self._thread.start()

  def wait_for_others(self) -> None:
    """Returns when all ranks are done, and watches no longer."""
    exchange = self._exchange
    # Whether they ever are is the watching thread's business.
    while exchange is not None and not exchange.over:
      time.sleep(self._tick / 4)
    self._stop()
    if exchange is not None:
      exchange.stop()
      self._abort.restore()

  def tell_error(self) -> None:
    """Returns when all ranks know of this one's error.

    Does not return if the error was another rank's fault.
    """
    if self._exchange is None:
      self._stop()
      return
    self._exchange.tell()
    own = self.progress.state == RAISED
    self._settled.wait(_LAST if own else None)
    # A thread inside JAX's client while the interpreter ends would crash it.
    self._exchange.stop()
    leave_at_exit()
    # Nor can Python be called from there when there is no interpreter.
    atexit.register(self._abort.restore)
    last_words.end_later(_LAST)

  def _stop(self) -> None:
    self._stopped.set()
    self._thread.join()
    last_words.end_never()

  def _watch(self) -> None:
    armed = -self._seconds
    while not self._stopped.wait(self._tick):
      now = time.monotonic()
      self._clock.tick(now)
      if now - armed > self._seconds / 4:
        armed = now
        # While a thread keeps the GIL for itself, nothing here would run.
        last_words.end_later(1.25 * self._seconds + 1)
      verdict = self._judge(self._bounds)
      if verdict is not None:
        self._carry_out(verdict)
        return

  def _judge(self, bounds: Bounds) -> Verdict | None:
    exchange = self._exchange
    if exchange is None:
      return self._judge_all({0: self.progress.report()}, {0: 0.0}, bounds)
    if exchange.over:
      return None
    if self._rank != 0:
      return exchange.verdict or _judge_head(exchange, bounds)
    silence, reports = exchange.silence(), exchange.reports
    exchange.silent = tuple(r for r in reports if silence[r] > bounds.quick)
    return self._judge_all(reports, silence, bounds)

  def _judge_all(
    self,
    reports: Mapping[int, Report],
    silence: Mapping[int, float],
    bounds: Bounds,
  ) -> Verdict | None:
    if any(report.excused for report in reports.values()):
      self._excused_at = self._clock.now
    since = self._clock.now - self._excused_at
    return judge(reports, silence, bounds, since)

  def _carry_out(self, verdict: Verdict) -> None:
    """Lets all ranks know, and ends this one unless its own error does."""
    last_words.end_later(_LAST)
    self._verdict = verdict
    if self._exchange is not None:
      self._inform(self._exchange, verdict)
    if verdict.raised and self._rank not in verdict.ranks:
      # All ranks may be about to raise the same, each its own error.
      _wait(self._has_raised, _GRACE)
    if self._has_raised():
      self._announce(verdict)
      if self._rank == 0:
        # The others lose their coordinator with it: let them end before.
        time.sleep(_GRACE + 1)
      self._settled.set()
      return
    self._end(verdict)

  def _inform(self, exchange: Exchange, verdict: Verdict) -> None:
    exchange.verdict = verdict
    ticket = exchange.tell()
    _wait(lambda: exchange.was_told(ticket), _GOODBYE)
    if self._rank == 0:
      # The coordinator ends with this process: all would blame rank 0 then.
      _wait(lambda: not exchange.unaware(self._bounds.quick), _GOODBYE)

  def _end(self, verdict: Verdict) -> None:
    last_words.dump_stacks()
    self._announce(verdict)
    last_words.end_process(WATCHDOG_EXIT)

  def _announce(self, verdict: Verdict) -> None:
    if self._announced.acquire(blocking=False):
      last_words.say(f"deepseek-jax watchdog on rank {self._rank}: {verdict}")

  def _report(self) -> Report:
    report = self.progress.report()
    if self._verdict is not None and self._rank != 0:
      return dataclasses.replace(report, state=ENDING)
    return report

  def _has_raised(self) -> bool:
    return self.progress.state == RAISED

  def _on_abort(self, exchange: Exchange) -> None:
    """Says why JAX, or a failed check in native code, ends this process."""
    if self._has_raised():
      last_words.end_process(1)  # It has been told; JAX's service went first.
    self._end(self._verdict or self._reason_to_abort(exchange))

  def _reason_to_abort(self, exchange: Exchange) -> Verdict:
    if exchange.verdict is not None:
      return exchange.verdict
    stopped = self._clock.lag(time.monotonic())
    if stopped > self._bounds.quick:
      return Verdict((self._rank,), f"was stopped for {stopped:.0f} s")
    if exchange.silent:
      return Verdict(exchange.silent, f"was not heard of: {_GONE}")
    if self._rank != 0 and not last_words.answers(self._address or ""):
      return Verdict((0,), f"is gone from {self._address}: {_GONE}")
    guess = self._judge(self._bounds.suspicious)
    if guess is not None:
      return guess
    why = "aborted in native code; a message above says why"
    self.progress.end(RAISED, why)
    exchange.tell()
    time.sleep(2 * self._tick)
    return Verdict((self._rank,), why)


def _judge_head(exchange: Exchange, bounds: Bounds) -> Verdict | None:
  """Blames rank 0, which is to judge all others, if it does not."""
  mute, silent = exchange.muteness(), exchange.head_silence()
  known = exchange.head_was_heard
  if mute > bounds.silent:
    return Verdict((0,), f"has not answered for {mute:.0f} s: {_GONE}")
  if known and silent > bounds.silent:
    return Verdict((0,), f"was not heard of for {silent:.0f} s: {_GONE}")
  if not known and silent > bounds.never:
    return Verdict((0,), "never came to its first heartbeat")
  return None


def _wait(holds: Callable[[], bool], seconds: int | float) -> None:
  end = time.monotonic() + seconds
  while not holds() and time.monotonic() < end:
    time.sleep(0.02)
