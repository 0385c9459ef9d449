"""A child that does not outlive its parent, however the parent ends."""

import os
import signal
import threading

VARIABLE = "DEEPSEEK_JAX_TETHER"
"""Environment variable with the number of a pipe's end that the parent holds
open at the other side and never writes to."""


def tie() -> None:
  """Ends this process and its process group when the parent is gone.

  Does nothing unless `launch` started this process. A pipe tells it: the kernel
  closes the parent's end whatever ended it, SIGKILL too.
  """
  # Children of this process inherit the variable, but not what it means.
  end = os.environ.pop(VARIABLE, None)
  if end is None:
    return
  threading.Thread(
    target=_wait, args=(int(end),), name="tether", daemon=True
  ).start()


def _wait(end: int) -> None:
  os.read(end, 1)  # Returns when the other side is closed, and not before.
  # Children of this process are in its group, unless they chose otherwise.
  os.killpg(os.getpgrp(), signal.SIGKILL)
