r"""Zeros against accuracy and loss: activations in two small trainings.

Each method trains the same models from the same weights on the same batches.
ReLU with an L1 term is drawn as a curve over its strength, our
`TargetSparseReLU` over the sparsity asked for. Every run goes into the result
when it is done and is found there by the next call.

  uv run experiments/benchmarks/activations.py
  uv run experiments/benchmarks/activations.py --tasks digits --fresh
"""

import argparse
import datetime
import json
import pathlib
from typing import Any

import activations_figure as figure
import activations_tasks as tasks
import harness_machine as machine
from activations_tasks import Method, TopK
from harness_figure import Spread

RESULTS = pathlib.Path(__file__).parents[1] / "results"
SCORES = {"digits": "accuracy", "text": "bits_per_byte"}
_WARMUP = 0.2  # Share of the steps in which the target rises.


def methods(task: str, steps: int) -> dict[str, Method]:
  """Returns the methods by name; a curve's names begin alike."""
  strengths = (0.1, 0.3, 1.0, 3.0) if task == "digits" else (0.03, 0.1, 0.3)
  targets = (0.8, 0.9, 0.95) if task == "digits" else (0.85, 0.9, 0.95)
  # Chosen on other seeds of the digits than those that are scored.
  ours = {"warmup": round(_WARMUP * steps), "gradient": "smooth"}
  return {
    "ReLU": Method("sparse_relu"),
    "GELU": Method("gelu"),
    **{
      f"{figure.PEER} {strength:g}": Method(
        "sparse_relu", {"pressure": strength}
      )
      for strength in strengths
    },
    "top-k 0.9": Method(TopK, {"sparsity": 0.9}),
    "published": Method("dynamic_sparse_relu"),
    "published, x - threshold": Method(
      "dynamic_sparse_relu", {"shifted": True}
    ),
    "learned threshold": Method("learned_sparse_relu"),
    **{
      f"{figure.OURS} {target:g}": Method(
        "target_sparse_relu", {"sparsity": target, **ours}
      )
      for target in targets
    },
  }


def summary(runs: dict[str, Any], score: str) -> dict[str, Any]:
  """Returns medians and quartiles of every method."""
  found = {}
  for name, one in runs.items():
    rows = list(one.values())
    spread = lambda key, rows=rows: [
      round(value, 5)
      for value in vars(Spread.of([row[key] for row in rows])).values()
    ]
    found[name] = {key: spread(key) for key in (score, "zeros", "dead")}
    found[name]["seeds"] = len(rows)  # pyrefly: ignore
  return found


def show(task: str, told: dict[str, Any], score: str) -> None:
  """Prints medians, and quartiles of the score."""
  print(f"\n{task:28} {score:>14}  quartiles          zeros   dead")
  for name, row in told.items():
    middle, low, high = row[score]
    print(
      f"{name:28} {middle:14.4f}  {low:.4f} .. {high:.4f}  "
      f"{row['zeros'][0]:6.3f} {row['dead'][0]:6.3f}"
    )


def settings(flags: argparse.Namespace, task: str) -> dict[str, Any]:
  """Returns what runs must have in common to be compared."""
  return {"steps": getattr(flags, f"{task}_steps")}


def run(flags: argparse.Namespace, task: str, result: dict[str, Any]) -> None:
  """Makes the runs of a task that are missing; writes after each method."""
  asked = settings(flags, task)
  seeds = list(range(getattr(flags, f"{task}_seeds")))
  told = result["tasks"].get(task, {})
  if flags.fresh or told.get("settings") != asked:
    told = {"settings": asked, "runs": {}}
  result["tasks"][task] = told
  for name, method in methods(task, **asked).items():
    if flags.only and not any(word in name for word in flags.only):
      continue
    known = told["runs"].setdefault(name, {})
    missing = [seed for seed in seeds if str(seed) not in known]
    # Digits train all seeds at once, text one by one.
    groups = [missing] if task == "digits" else [[seed] for seed in missing]
    for group in groups if missing else []:
      rows = getattr(tasks, task)(method, group, **asked)
      known |= {
        str(seed): {key: round(value, 5) for key, value in row.items()}
        for seed, row in zip(group, rows, strict=True)
      }
      print(f"{task}, {name}, seeds {group}: {rows[-1]}", flush=True)
      write(flags.results, result)
  told["summary"] = summary(told["runs"], SCORES[task])
  show(task, told["summary"], SCORES[task])


def write(folder: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes the JSON file."""
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result, indent=1)
  (folder / "activations.json").write_text(text + "\n")


def main() -> None:
  """Makes all runs and writes the result and the figure."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--tasks", nargs="+", choices=SCORES, default=[*SCORES])
  parser.add_argument("--digits-steps", type=int, default=1000, help="(1000)")
  parser.add_argument("--digits-seeds", type=int, default=10, help="(10)")
  parser.add_argument("--text-steps", type=int, default=400, help="(400)")
  parser.add_argument("--text-seeds", type=int, default=3, help="(3)")
  parser.add_argument("--only", nargs="+", help="methods with these words")
  parser.add_argument(
    "--fresh", action="store_true", help="forget runs made before"
  )
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
  flags = parser.parse_args()
  path = flags.results / "activations.json"
  before = json.loads(path.read_text()) if path.exists() else {}
  result = {
    "name": "activations",
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    "hardware": machine.hardware(),
    "versions": machine.versions(),
    "tasks": before.get("tasks", {}),
  }
  for task in flags.tasks:
    run(flags, task, result)
  write(flags.results, result)
  figure.draw(result, SCORES, flags.results / "activations.svg")


if __name__ == "__main__":
  main()
