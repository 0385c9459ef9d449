"""One of the two processes of `exchange_link.py`: times steps of the MLP.

exchange_rank.py RANK OUT [--tiny] [--rounds N] [--only NAME ...] --rates ...
"""

import argparse
import json
import os
import pathlib
import subprocess
import time
from typing import Any

import exchange_link as link
import exchange_methods as methods
import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import comm, parallel

ROWS = 32  # Of the batch of a process.
STEPS = 2  # Of one turn, where every step exchanges.
NAMES = (
  "float32", "bf16", "int8", "int4", "1 bit", "top-k 1 %", "PowerSGD 4",
  "PowerSGD 2", "DiLoCo 10", "DiLoCo 10 int8",
)  # fmt: skip


def total(sent: dict[str, dict[str, float]]) -> float:
  """Returns the bytes of all collectives."""
  return sum(sum(places.values()) for places in sent.values())


class Turn:
  """A method that takes its turns.

  Attributes:
    period: Steps of a turn: whole periods.
    wire: Bytes a step that a process sends, by the program.
  """

  def __init__(self, name: str, mesh: Any, sizes: Any):
    params = methods.mlp(0, sizes)
    tx = methods.build(name, optax.adam(1e-4))
    step, self._carry = methods.stepper(
      methods.mlp_loss, tx, mesh, params, alone=name in methods.ALONE, count=2
    )
    rows = NamedSharding(mesh, PartitionSpec(methods.AXIS))
    rng = np.random.default_rng(jax.process_index())
    place = lambda x: jax.make_array_from_process_local_data(rows, x)
    self._batch = (
      place(rng.normal(size=(ROWS, sizes[0])).astype(np.float32)),
      place(rng.integers(sizes[-1], size=ROWS).astype(np.int32)),
    )
    self.steps = methods.PERIODS.get(name, STEPS)
    self._step = step.lower(*self._carry, *self._batch).compile()
    wire = total(comm.wire_bytes(self._step)) / methods.PERIODS.get(name, 1)
    # The program of 1 bit is one that looks where zeros are, every 64 steps.
    self.wire = None if name == "1 bit" else wire

  def take(self, counter: pathlib.Path) -> tuple[float, float]:
    """Takes some steps; returns the seconds, and the bytes sent, of one."""
    sent, start = int(counter.read_text()), time.perf_counter()
    for _ in range(self.steps):
      *self._carry, loss = self._step(*self._carry, *self._batch)
      jax.block_until_ready((self._carry, loss))
    seconds = time.perf_counter() - start
    sent = int(counter.read_text()) - sent
    if self.wire is None:
      (found,) = comm.state.find(self._carry[1], comm.ExchangeState)
      self.wire = float(found.sent_bytes)
    return seconds / self.steps, sent / self.steps


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("rank", type=int)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--rates", nargs="+", type=float, required=True)
  parser.add_argument("--only", nargs="+", default=NAMES)
  args = parser.parse_args()
  parallel.initialize(
    coordinator="10.77.0.1:9877", num_processes=2, process_id=args.rank
  )
  mesh = methods.make_mesh(jax.devices())
  sizes = (64, 96, 20) if args.tiny else methods.SIZES
  names = [x for x in NAMES if x in args.only or x == "float32"]
  turns = {name: Turn(name, mesh, sizes) for name in names}
  (device,) = (
    x for x in pathlib.Path("/sys/class/net").iterdir() if x.name != "lo"
  )
  counter = device / "statistics/tx_bytes"
  found = {}
  for rate in args.rates:
    change = link.throttle("change", device.name, rate)
    subprocess.run(change, check=True)
    taken: dict[str, list[Any]] = {name: [] for name in turns}
    for _ in range(args.rounds + 1):
      for name, turn in turns.items():
        taken[name].append(turn.take(counter))
    found[f"{rate:g}"] = {
      "load": os.getloadavg()[0],
      "methods": {
        name: {
          "wire_bytes": turns[name].wire,
          "counted": float(np.median([sent for _, sent in rows[1:]])),
          # The first round meets the throttle's first burst.
          "seconds": [seconds for seconds, _ in rows[1:]],
        }
        for name, rows in taken.items()
      },
    }
  if args.rank == 0:
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
  main()
