"""Jobs of real processes, for the tests of this room."""

import dataclasses
import os
import socket
import subprocess
import sys
import textwrap
import time

_PREAMBLE = """
import sys, time, os
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from deepseek_jax import parallel
RANK, COUNT, PORT = map(int, sys.argv[1:4])
ADDRESS = f"127.0.0.1:{PORT}"


def join(**more):
  told = dict(coordinator=ADDRESS, num_processes=COUNT, process_id=RANK)
  return parallel.initialize(**(told | more))


def make_step():
  mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, P("data"))
  local = np.full((jax.local_device_count(),), RANK + 1.0, np.float32)
  x = jax.make_array_from_process_local_data(rows, local)
  step = jax.jit(lambda x: x + 0 * x.sum(), out_shardings=rows)
  return step, x
"""


@dataclasses.dataclass(frozen=True)
class Ended:
  """How one process of a job ended."""

  code: int
  out: str
  err: str
  seconds: float


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
  """The variables of a process of its own: one device, nobody's job."""
  kept = {
    k: v
    for k, v in os.environ.items()
    if not k.startswith(("JAX_NUM_CPU", "DEEPSEEK_JAX_", "SLURM_"))
  }
  return kept | {"JAX_PLATFORMS": "cpu"} | more


def run(
  script: str,
  count: int,
  *words: str,
  ranks: tuple[int, ...] | None = None,
  limit: float = 120,
) -> dict[int, Ended]:
  """Runs a script as so many processes at once; returns how each ended.

  Args:
    script: Its text; RANK, COUNT, ADDRESS, `join` and `make_step` are there.
    count: How many processes each is told of.
    *words: More words of every command line.
    ranks: Which of them start; all if None.
    limit: Seconds after which a process that still runs is an error.
  """
  text = _PREAMBLE + textwrap.dedent(script)
  port = str(free_port())
  started = time.monotonic()
  processes = {
    rank: subprocess.Popen(
      [sys.executable, "-c", text, str(rank), str(count), port, *words],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment(),
    )
    for rank in (range(count) if ranks is None else ranks)
  }
  ended = {}
  try:
    for rank, process in processes.items():
      out, err = process.communicate(timeout=limit)
      seconds = time.monotonic() - started
      ended[rank] = Ended(process.returncode, out, err, seconds)
  finally:
    for process in processes.values():
      process.kill()
      process.wait()
  return ended
