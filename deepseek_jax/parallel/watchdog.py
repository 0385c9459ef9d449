"""A job of many processes that ends, and says why, when one of them stops."""

import contextlib
import itertools
import re
import types
from typing import ClassVar

from deepseek_jax.core.arguments import require_in
from deepseek_jax.parallel.initialization import initialize
from deepseek_jax.parallel.store import open_store
from deepseek_jax.parallel.verdict import BROKEN, DONE, RAISED
from deepseek_jax.parallel.watcher import WATCHDOG_EXIT, Limits, Watcher

__all__ = ["WATCHDOG_EXIT", "Watchdog"]

_rooms = itertools.count()  # Every process enters them in the same order.
_OF_OTHERS = re.compile(
  r"^(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b"
  r"|gloo|nccl|connection (closed|reset|refused)|socket closed"
  r"|coordination service|heartbeat|barrier timed out",
  re.IGNORECASE,
)


class Watchdog:
  """Context that ends every process of a job when one of them stops.

  A rank that dies, raises, hangs or never comes leaves all others waiting in
  their next collective, for ever. Inside this context every rank tells the
  others over the hosts' network that it goes on; when one does not, each prints
  the stacks of its threads and one line that names the culprit and what it did,
  and ends with `WATCHDOG_EXIT`, within some seconds. Of ranks that hang, those
  outside any collective, or in a host callback of their step, are the culprits;
  those that wait for devices are not. A rank that raises ends with its own
  error.

  Every process must enter it, after `initialize`, from the thread that works.
  A process that is alone is watched for hangs only. All wait for a rank that
  pauses, compiles, or has not told of its first step, as long as it may. When
  the body ends, it waits until the bodies of all ranks have. While it watches,
  `faulthandler.dump_traceback_later` is its own.

  Inside another one it only gives that one its seconds, and tells it that work
  begins anew.

  >>> with Watchdog(seconds=60) as watchdog:
  ...   for step in range(3):
  ...     watchdog.beat(step)
  ...   with watchdog.pause("evaluating", seconds=600):
  ...     pass

  Args:
    seconds: How long a step may take, in (0, inf).
    start_seconds: How long it may take from here to the first `beat`: loading
      and compiling.
    pause_seconds: How long a pause or a compilation may take.

  Raises:
    ValueError: If one of them is not positive.
  """

  _outer: "ClassVar[Watchdog | None]" = None

  def __init__(
    self,
    seconds: int | float = 300,
    *,
    start_seconds: int | float = 1800,
    pause_seconds: int | float = 1800,
  ):
    require_in(
      "(0, inf)",
      seconds=seconds,
      start_seconds=start_seconds,
      pause_seconds=pause_seconds,
    )
    self._limits = Limits(
      seconds=seconds,
      start_seconds=start_seconds,
      pause_seconds=pause_seconds,
    )

  def __enter__(self) -> "Watchdog":
    """Begins to watch."""
    outer = Watchdog._outer
    if outer is not None:
      self._watcher = outer._watcher
      self._watcher.set_limits(self._limits)
      self._watcher.progress.start()
      return self
    processes = initialize()
    store = open_store(f"watchdog/{next(_rooms)}")
    self._watcher = Watcher(processes, store, self._limits)
    self._watcher.start()
    Watchdog._outer = self
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: types.TracebackType | None,
  ) -> None:
    """Waits for the others, or tells them the error."""
    if Watchdog._outer is not self:
      self._watcher.progress.beat(None)
      return
    Watchdog._outer = None
    if error is None or (isinstance(error, SystemExit) and not error.code):
      self._watcher.progress.end(DONE)
      self._watcher.wait_for_others()
    else:
      why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
      self._watcher.progress.end(BROKEN if is_of_others(error) else RAISED, why)
      self._watcher.tell_error()

  def beat(self, step: int | None = None) -> None:
    """Tells that the work goes on; call it once a step.

    Args:
      step: Which one; a verdict names the last.
    """
    self._watcher.progress.beat(step)

  def pause(
    self, why: str, seconds: int | float | None = None
  ) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which no `beat` is expected.

    Args:
      why: What takes long; a verdict says it.
      seconds: How long it may take; `pause_seconds` if None.
    """
    return self._watcher.progress.pause(why, seconds)


def is_of_others(error: BaseException) -> bool:
  """Says whether an error looks like that of a collective with a dead peer.

  >>> is_of_others(ValueError("UNKNOWN: Gloo all-reduce failed: ..."))
  True
  >>> is_of_others(ValueError("labels must be below 10, got 11."))
  False
  """
  text = str(error)
  own = "callback" in text.lower()  # Then the rest is a message of the user's.
  return (
    isinstance(error, Exception) and not own and bool(_OF_OTHERS.search(text))
  )
