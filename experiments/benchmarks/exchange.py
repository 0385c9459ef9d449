r"""Gradient exchanges: bytes on the wire, loss after equal steps, wall clock.

* bytes: what a device sends, from the program and from the state; how long a
  step takes to compile, and that it compiles for TPUs if libtpu is there;
* loss: small trainings that differ in the exchange alone (`exchange_runs.py`);
* link: two processes over a throttled link, and the quantizer against a pass
  over the gradient (`exchange_link.py`; needs Linux, root, ip and tc).

  uv run experiments/benchmarks/exchange.py
  uv run experiments/benchmarks/exchange.py --cases loss --tasks mlp --seeds 5

Runs of the loss are kept in the result, and found there by the next call.
"""

import argparse
import datetime
import functools
import importlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

RESULTS = pathlib.Path(__file__).parents[1] / "results"
CASES = ("bytes", "loss", "link")
# Of the loss above that of float32, in percent.
TARGETS = {
  "int8": 0.5,
  "int4": 1.0,
  "1 bit": 2.0,
  "1 bit 256": 2.0,
  "top-k 1 %": 3.0,
  "PowerSGD 4": 2.0,
  "DiLoCo 10": 1.0,
  "DiLoCo 50": 3.0,
  "DiLoCo 50 calm": 3.0,
  "DiLoCo 10 int8": 1.5,
}


def loss(flags: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
  """Trains what is missing; yields what is known after each run."""
  import exchange_methods as methods
  import exchange_runs as runs

  names = ["float32", runs.NUDGED, *methods.NAMES[1:]]
  names = [x for x in names if flags.only is None or x in flags.only]
  rows = known.setdefault("runs", {})
  for task in flags.tasks:
    steps = flags.steps or runs.STEPS[task]
    for optimizer in flags.optimizers:
      kept = {}
      for seed in range(flags.seeds):
        for name in names:
          key = f"{task}, {optimizer}, {steps} steps"
          done = rows.setdefault(key, {}).setdefault(name, {})
          if str(seed) in done and not flags.fresh:
            continue
          if name not in kept:
            kept[name] = runs.Runner(task, optimizer, name, steps)
          done[str(seed)] = kept[name](seed)
          print(f"{key}, {name}, seed {seed}: {done[str(seed)]}", flush=True)
          write(flags, "loss", known | {"summary": summary(rows)})
  return known | {"summary": summary(rows)}


def summary(rows: Mapping[str, Any]) -> dict[str, Any]:
  """Returns by how many percent losses are above float32's of the same seed."""
  found: dict[str, Any] = {}
  for key, group in rows.items():
    base = group["float32"]
    found[key] = {}
    for name, runs in group.items():
      if name == "float32" or not runs.keys() & base.keys():
        continue
      found[key][name] = {
        kind: above(runs, base, kind) for kind in ("loss", "held_out")
      }
  return found


def above(
  runs: Mapping[str, Any], base: Mapping[str, Any], kind: str
) -> list[float]:
  """Returns median, least and most, over seeds, of the percent above `base`."""
  found = [
    100 * (run[kind] / base[seed][kind] - 1)
    for seed, run in runs.items()
    if seed in base
  ]
  return [round(float(f(found)), 2) for f in (np.median, min, max)]


def show_loss(found: Mapping[str, Any]) -> None:
  """Prints medians, and the least and the most."""
  for key, group in found["summary"].items():
    print(f"\n{key}: loss above float32's, in %: median, least, most;")
    print(f"{'':18} of the loss that is minimized; held out; asked")
    for name, kinds in group.items():
      columns = [
        f"{kinds[kind][0]:+7.2f} ({kinds[kind][1]:+.2f} {kinds[kind][2]:+.2f})"
        for kind in ("loss", "held_out")
      ]
      print(f"  {name:16}", *columns, f" {TARGETS.get(name, '')}")


def write(
  flags: argparse.Namespace, name: str, found: Mapping[str, Any]
) -> dict[str, Any]:
  """Writes a case beside those that are there; returns all."""
  import harness_machine as machine

  flags.results.mkdir(parents=True, exist_ok=True)
  path = flags.results / "exchange.json"
  result = json.loads(path.read_text()) if path.exists() else {"cases": {}}
  result["name"] = "exchange"
  result["cases"][name] = {
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    "hardware": machine.hardware(),
    "versions": machine.versions(),
    "load": [round(x, 1) for x in os.getloadavg()],
    **found,
  }
  path.write_text(json.dumps(result, indent=1) + "\n")
  return result


def parse() -> argparse.Namespace:
  """Returns the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--cases", nargs="+", choices=CASES, default=CASES, help="(all)"
  )
  parser.add_argument("--tasks", nargs="+", default=["mlp", "bytes"])
  parser.add_argument("--optimizers", nargs="+", default=["adam", "deepseek"])
  parser.add_argument("--seeds", type=int, default=3, help="(3)")
  parser.add_argument("--steps", type=int, help="of the loss")
  parser.add_argument("--only", nargs="+", help="methods, by name")
  parser.add_argument("--rounds", type=int, default=5, help="of the link (5)")
  parser.add_argument(
    "--rates", nargs="+", type=float, default=[100, 1000], help="Mbit/s"
  )
  parser.add_argument("--tiny", action="store_true", help="a small MLP")
  parser.add_argument("--fresh", action="store_true", help="forget old runs")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
  return parser.parse_args()


def main() -> None:
  """Makes the cases; writes the result and the figure."""
  flags = parse()
  path = flags.results / "exchange.json"
  for name in flags.cases:
    kept = json.loads(path.read_text())["cases"] if path.exists() else {}
    if name == "loss":
      known = {"runs": kept.get("loss", {}).get("runs", {})}
      found = loss(flags, known)
      show_loss(found)
    else:
      keep = functools.partial(write, flags, name)
      found = importlib.import_module(f"exchange_{name}").case(flags, keep)
    result = write(flags, name, found)
    importlib.import_module("exchange_figure").draw(
      result["cases"], flags.results / "exchange.svg"
    )


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  main()
