"""Real processes of one job, on this machine."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from deepseek_jax.core.arguments import require_in, require_static
from deepseek_jax.parallel import tether
from deepseek_jax.parallel.launchers import (
  COORDINATOR,
  NUM_PROCESSES,
  PROCESS_ID,
)
from deepseek_jax.parallel.watcher import WATCHDOG_EXIT

_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_KILL_SECONDS = 5.0  # Between SIGTERM and SIGKILL.


def launch(
  command: Sequence[str],
  num_processes: int,
  *,
  devices_per_process: int | None = None,
  grace_seconds: int | float = 15,
  environment: Mapping[str, str] = os.environ,
) -> int:
  """Runs a command as so many processes that find each other; waits for them.

  Each has its place in the job in the variables that `initialize` reads. Their
  lines come out with the rank before them. SIGTERM and SIGINT go to all of
  them, and a second one ends them at once. When one fails, the others have some
  seconds to find out and say so; then they are ended. None outlives this
  process, nor do their children.

  >>> launch(["true"], 2)
  0

  Args:
    command: Words of the command line.
    num_processes: How many processes, at least 1.
    devices_per_process: How many fake CPU devices each has, or how many of the
      machine's GPUs; what JAX finds if None.
    grace_seconds: How long the others may go on after one has failed.
    environment: Variables of the processes, besides their places.

  Returns:
    0 if all went well; else the exit code of the first process that failed by
    itself, and 128 + N for one that signal N killed. `WATCHDOG_EXIT` only if
    the watchdog ended all of them.

  Raises:
    ValueError: If a number is out of range.
    OSError: If the command cannot be run.
  """
  require_static(1, num_processes=num_processes)
  require_in("[0, inf)", grace_seconds=grace_seconds)
  if devices_per_process is not None:
    require_static(1, devices_per_process=devices_per_process)
  # The children hold one end; nobody ever writes to the other.
  ours, theirs = os.pipe()
  job = _Job(grace_seconds)
  address = f"127.0.0.1:{_free_port()}"
  handlers = _forward_signals(job)
  try:
    for rank in range(num_processes):
      place = {
        COORDINATOR: address,
        NUM_PROCESSES: str(num_processes),
        PROCESS_ID: str(rank),
        tether.VARIABLE: str(ours),
        "PYTHONUNBUFFERED": "1",
      }
      variables = {
        **environment,
        **place,
        **_devices(rank, devices_per_process),
      }
      job.start(command, variables, ours, prefix=num_processes > 1)
    return job.wait()
  finally:
    job.kill()
    for number, handler in handlers.items():
      signal.signal(number, handler)
    os.close(ours)
    os.close(theirs)


@dataclasses.dataclass
class _Child:
  """One process, and the threads that pass on what it prints."""

  process: subprocess.Popen
  printers: list[threading.Thread]

  def signal(self, number: int) -> None:
    if self.process.poll() is None:
      self.process.send_signal(number)

  def kill_group(self) -> None:
    """Ends what is left of the process and its children."""
    try:
      os.killpg(self.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
      return


class _Job:
  """The processes, and the order in which they ended."""

  def __init__(self, grace_seconds: int | float):
    self._grace = grace_seconds
    self._told = False
    self._children: list[_Child] = []
    self._ended: dict[int, int] = {}
    self._lock = threading.Lock()

  def start(
    self,
    command: Sequence[str],
    variables: Mapping[str, str],
    end: int,
    *,
    prefix: bool,
  ) -> None:
    """Starts one more process, in a group of its own."""
    process = subprocess.Popen(
      command,
      env=variables,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      pass_fds=(end,),
      start_new_session=True,
    )
    mark = f"[{len(self._children)}] ".encode() if prefix else b""
    pipes = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    printers = [
      threading.Thread(
        target=self._pass_on, args=(source, sink, mark), daemon=True
      )
      for source, sink in pipes
    ]
    for printer in printers:
      printer.start()
    self._children.append(_Child(process, printers))

  def signal(self, number: int) -> None:
    """Sends a signal to all processes that still run."""
    for child in self._children:
      child.signal(number)

  def pass_on(self, number: int) -> None:
    """Sends what this process was sent; a second time they have to end."""
    self.signal(signal.SIGKILL if self._told else number)
    self._told = True

  def wait(self) -> int:
    """Waits until all have ended; ends them when one has failed."""
    failed_at = None
    asked = False
    while len(self._ended) < len(self._children):
      time.sleep(0.02)
      if self._notice() and failed_at is None:
        failed_at = time.monotonic()
      if failed_at is None:
        continue
      late = time.monotonic() - failed_at - self._grace
      if late > 0 and not asked:
        asked = True
        self.signal(signal.SIGTERM)
      if late > _KILL_SECONDS:
        self.signal(signal.SIGKILL)
    return self._code()

  def kill(self) -> None:
    """Leaves no process behind."""
    for child in self._children:
      child.kill_group()
      child.process.wait()
    for child in self._children:
      for printer in child.printers:
        printer.join(timeout=2.0)

  def _notice(self) -> bool:
    """Takes note of those that have ended; says whether one has failed."""
    for rank, child in enumerate(self._children):
      code = child.process.poll()
      if code is None or rank in self._ended:
        continue
      if code != 0 and not any(self._ended.values()):
        self._say(f"rank {rank} {_describe(code)}")
      self._ended[rank] = code
      child.kill_group()
    return any(self._ended.values())

  def _code(self) -> int:
    failed = [code for code in self._ended.values() if code != 0]
    # Those that the watchdog ended are victims, where there is another.
    culprits = [code for code in failed if code != WATCHDOG_EXIT] or failed
    first = culprits[0] if culprits else 0
    return first if first >= 0 else 128 - first

  def _say(self, text: str) -> None:
    with self._lock:
      print(f"deepseek-jax launch: {text}", file=sys.stderr, flush=True)

  def _pass_on(self, source: IO[bytes], sink: Any, mark: bytes) -> None:
    with source:
      for line in source:
        with self._lock:
          sink.write((mark + line).decode(errors="replace"))
          sink.flush()


def _devices(rank: int, number: int | None) -> dict[str, str]:
  """Returns the variables that give each process its share of the devices."""
  if number is None:
    return {}
  share = range(rank * number, (rank + 1) * number)
  return {
    "JAX_NUM_CPU_DEVICES": str(number),
    "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, share)),
  }


def _forward_signals(job: _Job) -> dict[int, Any]:
  """Passes signals on to the job; returns the handlers there were."""
  if threading.current_thread() is not threading.main_thread():
    return {}  # Python allows no handlers there.
  return {
    number: signal.signal(number, lambda number, frame: job.pass_on(number))
    for number in _FORWARDED
  }


def _describe(code: int) -> str:
  if code >= 0:
    return f"ended with exit code {code}"
  return f"was killed by {signal.Signals(-code).name}"


def _free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]
