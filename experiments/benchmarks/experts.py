r"""Experts with and without balance: how even their loads, how good the model.

The same byte language model, from the same weights on the same batches, with
experts that nothing balances, a bias outside the optimizer at several rates, an
auxiliary loss at several weights, and none (a feed-forward of the active size).
Every run goes into the result when it is done and is found there by the next
call.

  uv run experiments/benchmarks/experts.py
  uv run experiments/benchmarks/experts.py --only bias --seeds 5
"""

import argparse
import datetime
import json
import pathlib
from typing import Any

import experts_figure as figure
import experts_runs as runs
import harness_machine as machine
import numpy as np
from harness_figure import Spread

RESULTS = pathlib.Path(__file__).parents[1] / "results"
METHODS: dict[str, dict[str, Any] | None] = {
  "dense": None,
  "nothing": {"balance": "none"},
  **{
    f"auxiliary {weight:g}": {
      "balance": "auxiliary",
      "auxiliary_weight": weight,
    }
    for weight in (0.01, 0.1)
  },
  **{f"bias {rate:g}": {"bias_rate": rate} for rate in (0.001, 0.005, 0.02)},
  "both": {"bias_rate": 0.005, "auxiliary_weight": 0.01},
}


def summary(known: dict[str, Any]) -> dict[str, Any]:
  """Returns medians and quartiles over seeds, of the last fifth of the steps.

  The busiest expert's load, in units of the mean: of the worst layer and
  window ("lasting"), and of the mean layer, step by step ("a_step").
  """
  found = {}
  for name, rows in known.items():
    columns: dict[str, list[float]] = {
      "bits_per_byte": [row["bits_per_byte"] for row in rows.values()]
    }
    for key, kept, reduce in (
      ("lasting", "lasting", np.max),
      ("a_step", "busiest", np.mean),
    ):
      curves = [row[kept] for row in rows.values()]
      if curves[0]:
        last = [curve[-max(1, len(curve) // 5) :] for curve in curves]
        columns[key] = [float(reduce(one)) for one in last]
    found[name] = {
      key: [round(x, 4) for x in vars(Spread.of(values)).values()]
      for key, values in columns.items()
    } | {"seeds": len(rows)}
  return found


def show(told: dict[str, Any]) -> None:
  """Prints medians, and quartiles of the bits."""
  print(f"\n{'':16} bits per byte  quartiles           lasting  a step")
  for name, row in told.items():
    middle, low, high = row["bits_per_byte"]
    loads = [f"{row[x][0]:8.3f}" if x in row else "" for x in figure.LOADS]
    print(f"{name:16} {middle:13.4f}  {low:.4f} .. {high:.4f}", *loads)


def main() -> None:
  """Makes the runs that are missing; writes the result and the figure."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--steps", type=int, default=500, help="(500)")
  parser.add_argument("--seeds", type=int, default=3, help="(3)")
  parser.add_argument("--window", type=int, default=20, help="steps (20)")
  parser.add_argument(
    "--held-out", type=int, default=480, help="rows that are scored (480)"
  )
  parser.add_argument("--only", nargs="+", help="methods with these words")
  parser.add_argument(
    "--fresh", action="store_true", help="forget runs made before"
  )
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
  flags = parser.parse_args()
  asked = {x: getattr(flags, x) for x in ("steps", "window", "held_out")}
  path = flags.results / "experts.json"
  before = json.loads(path.read_text()) if path.exists() else {}
  same = before.get("settings") == asked and not flags.fresh
  known = before["runs"] if same else {}
  result: dict[str, Any] = {
    "name": "experts",
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    "hardware": machine.hardware(),
    "versions": machine.versions(),
    "settings": asked,
    "runs": known,
  }
  flags.results.mkdir(parents=True, exist_ok=True)
  for seed in range(flags.seeds):
    for name, options in METHODS.items():
      if flags.only and not any(word in name for word in flags.only):
        continue
      rows = known.setdefault(name, {})
      if str(seed) not in rows:
        rows[str(seed)] = runs.train(options, seed, **asked)
        found = rows[str(seed)]["bits_per_byte"]
        print(f"{name}, seed {seed}: {found:.4f} bits per byte", flush=True)
      result["summary"] = summary(known)
      path.write_text(json.dumps(result) + "\n")
  show(result["summary"])
  figure.draw(result, flags.results / "experts.svg")


if __name__ == "__main__":
  main()
