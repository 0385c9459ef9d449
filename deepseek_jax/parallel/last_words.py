"""What to say when this process is about to end, and how to end it surely."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

STDERR = 2
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


def say(line: str) -> None:
  """Writes one line to standard error.

  Not through `sys.stderr`: the thread that hangs may hold its lock.
  """
  os.write(STDERR, f"{line}\n".encode())


def dump_stacks() -> None:
  """Writes the stack of every thread to standard error."""
  faulthandler.dump_traceback(file=STDERR, all_threads=True)


def end_process(code: int) -> None:
  """Ends this process now, whatever its threads are doing."""
  # What was printed is worth half a second, and not a hang. An interpreter
  # that is ending anyway starts no thread.
  with contextlib.suppress(RuntimeError):
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(timeout=0.5)
  os._exit(code)


def end_later(seconds: int | float) -> None:
  """Ends this process after a while, with exit code 1 and all stacks.

  A thread without the GIL does it, so that code which never gives the GIL back
  ends too. A later call takes the place of an earlier one.
  """
  faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)


def end_never() -> None:
  """Takes `end_later` back."""
  faulthandler.cancel_dump_traceback_later()


class OnAbort:
  """Calls a function instead of letting the process abort, until `restore`.

  JAX aborts the process from a thread of its own when rank 0, which hosts its
  coordinator, is gone: handlers of Python's `signal` would never run then.

  Args:
    action: What to call; it should not return.
  """

  def __init__(self, action: Callable[[], None]):
    self._library = ctypes.CDLL(None)
    self._library.signal.restype = ctypes.c_void_p
    self._library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    # As long as it is installed, this object must live.
    self._handler = _HANDLER(lambda number: action())
    pointer = ctypes.cast(self._handler, ctypes.c_void_p)
    self._before = self._library.signal(signal.SIGABRT, pointer)

  def restore(self) -> None:
    """Lets the process abort as before."""
    self._library.signal(signal.SIGABRT, self._before)


def answers(address: str, seconds: int | float = 2.0) -> bool:
  """Says whether something listens at "HOST:PORT"."""
  host, _, port = address.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")
  try:
    with socket.create_connection((host, int(port)), timeout=seconds):
      return True
  except OSError:
    return False
