"""What a thread is doing: computing, waiting for devices, or something else.

A collective waits inside compiled code, where Python sees no more than the line
that called it. So the kernel is asked, too, what the thread sleeps in: XLA
waits on a futex, while a program that sleeps, reads or loops does not.
"""

import os
import pathlib
import platform
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

import jax

CALLBACK = "callback"
"""Some thread is inside a host callback of a compiled function."""
COMPILING = "compiling"
"""The thread is inside the compiler."""
WAITING = "waiting"
"""The thread waits for devices, and so perhaps for other processes."""
PYTHON = "python"
"""The thread does anything else: it waits for no collective."""

_JAX = os.path.dirname(jax.__file__)
_STANDARD = os.path.dirname(threading.__file__)
_CALLBACKS = (os.path.join("jax", "_src", "callback.py"), "_wrapped_callback")
_COMPILER = os.path.join("jax", "_src", "compiler.py")
_FUTEX = {"x86_64": "202", "aarch64": "98"}  # Numbers of the system call.


def activity(ident: int, native_id: int) -> tuple[str, str]:
  """Returns one of the places above, and the line of code.

  >>> thread = threading.current_thread()
  >>> activity(thread.ident, thread.native_id)[0]
  'python'

  Args:
    ident: Python's number of the thread.
    native_id: The kernel's number of it.
  """
  stacks = {
    thread: list(_walk(frame))
    for thread, frame in sys._current_frames().items()
  }
  for stack in stacks.values():
    if any(_is(frame, *_CALLBACKS) for frame in stack):
      return CALLBACK, describe(stack)
  stack = stacks.get(ident)
  if not stack:
    return PYTHON, "a thread that has ended"
  if any(_is(frame, _COMPILER) for frame in stack):
    return COMPILING, describe(stack)
  return place(stack[0].f_code.co_filename, _in_futex(native_id)), describe(
    stack
  )


def place(file: str, in_futex: bool) -> str:
  """Returns whether code of this file, blocked in this way, waits for devices.

  Args:
    file: Of the innermost Python code.
    in_futex: Whether the kernel says that the thread waits on a futex.
  """
  if file.startswith(_JAX):
    return WAITING
  # Locks and queues of Python's own library wait on futexes as well.
  return WAITING if in_futex and not _is_standard(file) else PYTHON


def describe(stack: Sequence[FrameType]) -> str:
  """Returns "FILE:LINE in FUNCTION" of the innermost code that is a user's."""
  for frame in stack:
    file = frame.f_code.co_filename
    if not file.startswith(_JAX) and not _is_standard(file):
      break
  else:
    frame = stack[0]
  code = frame.f_code
  file = os.path.basename(code.co_filename)
  return f"{file}:{frame.f_lineno} in {code.co_name}"


def _is_standard(file: str) -> bool:
  """Says whether a file belongs to Python itself."""
  inside = file.startswith(_STANDARD) and "site-packages" not in file
  return inside or file.startswith("<frozen")


def _walk(frame: FrameType) -> Iterator[FrameType]:
  """Yields the frames of a stack, the innermost first."""
  for inner, _ in traceback.walk_stack(frame):
    yield inner


def _is(frame: FrameType, file: str, function: str | None = None) -> bool:
  code = frame.f_code
  named = function is None or code.co_name == function
  return named and code.co_filename.endswith(file)


def _in_futex(native_id: int) -> bool:
  number = _FUTEX.get(platform.machine())
  try:
    told = pathlib.Path(f"/proc/self/task/{native_id}/syscall").read_text()
  except OSError:
    return False  # Another system, or one that does not tell.
  return number is not None and told.split()[0] == number
