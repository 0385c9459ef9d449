"""Accuracy and wall time of the default experiment over seeds.

Each seed is one run of the command of the README in a process of its own, in a
fresh directory: imports, compilation, evaluation, checkpoints and report count.

  uv run experiments/benchmarks/digits_seeds.py --seeds 5
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import harness_machine as machine

ROOT = pathlib.Path(__file__).parents[2]


def run(seed: int, workdir: pathlib.Path) -> dict:
  """Returns what one run of the experiment reached."""
  words = ["train", str(ROOT / "experiments" / "digits.py")]
  words += ["--seed", str(seed), "--workdir", str(workdir)]
  started = time.perf_counter()
  subprocess.run(
    [sys.executable, "-m", "deepseek_jax.cli", *words],
    check=True,
    capture_output=True,
  )
  seconds = time.perf_counter() - started
  result = json.loads((workdir / "result.json").read_text())
  return {
    "seed": seed,
    "test/accuracy": result["metrics"]["test/accuracy"],
    "test/loss": result["metrics"]["test/loss"],
    "best_step": result["best_step"],
    "steps": result["steps"],
    "ended_by": result["ended_by"],
    "wall_seconds": round(seconds, 1),
    "peak_memory_mib": round(result["peak_memory_bytes"] / 2**20),
  }


def main() -> None:
  """Runs the seeds and writes the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument(
    "--results", type=pathlib.Path, default=ROOT / "experiments" / "results"
  )
  args = parser.parse_args()
  rows = []
  with tempfile.TemporaryDirectory() as root:
    for seed in range(args.seeds):
      rows.append(run(seed, pathlib.Path(root, str(seed))))
      print(json.dumps(rows[-1]), flush=True)
  found = {
    "command": f"digits_seeds.py --seeds {args.seeds}",
    "median_test_accuracy": statistics.median(r["test/accuracy"] for r in rows),
    "median_wall_seconds": statistics.median(r["wall_seconds"] for r in rows),
    "rows": rows,
    "hardware": machine.hardware(),
    "versions": machine.versions(),
  }
  text = json.dumps(found, indent=2) + "\n"
  (args.results / "digits_seeds.json").write_text(text)
  print(f"median test accuracy {found['median_test_accuracy']:.4f}, ", end="")
  print(f"median wall {found['median_wall_seconds']:.0f} s")


if __name__ == "__main__":
  main()
