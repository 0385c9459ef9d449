"""One rank of a drill: steps with a real collective, and a fault in one rank.

drill_worker.py RANK COUNT PORT FAULT CULPRIT SECONDS
"""

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax import parallel

AT = 7  # The step of the fault.
FETCH = 3  # Steps between two looks at the loss, as a trainer has them.


def tell() -> None:
  """Marks the moment of the fault."""
  print(f"FAULT {time.time()}", flush=True)


def sleep_for_ever() -> None:
  tell()
  while True:
    time.sleep(3600)


def make_step(culprit: bool):
  """Returns a jitted step over all processes, and its argument.

  Every rank calls back to its host before the sum over all ranks; the culprit
  does not come back from there at the step of the fault.
  """
  mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
  rows = PartitionSpec("data")

  def visit(step, x):
    if culprit and step == AT:
      sleep_for_ever()
    return x

  def local(x, step):
    x = jax.pure_callback(visit, jax.typeof(x), step, x)
    return x + 1 - jax.lax.pmean(x, "data")

  step = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(rows, PartitionSpec()),
      out_specs=rows,
      check_vma=False,
    )
  )
  part = np.zeros((jax.local_device_count(), 4), np.float32)
  sharding = NamedSharding(mesh, rows)
  return step, jax.make_array_from_process_local_data(sharding, part)


def main() -> None:
  rank, count, port = map(int, sys.argv[1:4])
  fault, culprit, seconds = sys.argv[4], int(sys.argv[5]), float(sys.argv[6])
  if fault == "absent":
    tell()
  parallel.initialize(
    coordinator=f"127.0.0.1:{port}",
    num_processes=count,
    process_id=rank,
    start_seconds=seconds if fault == "absent" else 120,
  )
  mine = rank == culprit
  with parallel.Watchdog(seconds, start_seconds=120) as watchdog:
    step, x = make_step(mine and fault == "inside")
    for number in range(1, 1000):
      if mine and number == AT:
        if fault == "kill":
          tell()
          os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "raise":
          tell()
          raise RuntimeError("the drill's error")
        elif fault == "outside":
          sleep_for_ever()
      x = step(x, np.int32(number))
      if number % FETCH == 0:
        np.asarray(x.addressable_data(0))
      watchdog.beat(number)
      time.sleep(0.02)


if __name__ == "__main__":
  main()
