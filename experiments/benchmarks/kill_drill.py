"""Kill a run at random moments, start it again, and compare every bit.

Each trial trains the digits experiment in a process of its own, kills it with
SIGKILL at a random moment, runs the same command again and compares weights,
metrics, log and stopping step with those of an unbroken run. Checkpoints are
written at every event, so that many kills fall into a save.

  python experiments/benchmarks/kill_drill.py --trials 20
"""

import argparse
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
CLOCKS = ("seconds", "steps_per_second")


def command(workdir: pathlib.Path, epochs: int) -> list[str]:
  """Returns the command that trains, or goes on, in `workdir`."""
  return [
    *(sys.executable, "-m", "deepseek_jax.cli", "train"),
    *(str(ROOT / "experiments" / "digits.py"), "--workdir", str(workdir)),
    *("--train.epochs", str(epochs), "--train.log-every", "5"),
    *("--train.checkpoint-seconds", "0", "--train.no-progress"),
  ]


def run_until(command: list[str], workdir: pathlib.Path, delay: float) -> dict:
  """Starts a run and kills it `delay` seconds after its directory appears.

  Returns:
    Whether it was killed, at which step, and whether during a save.
  """
  process = subprocess.Popen(
    command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  while not (workdir / "run.json").exists() and process.poll() is None:
    time.sleep(0.005)
  time.sleep(delay)
  if process.poll() is not None:
    return {"killed": False, "step": None, "saving": False}
  process.send_signal(signal.SIGKILL)
  process.wait()
  steps = [p.name for p in (workdir / "checkpoints").glob("*")]
  return {
    "killed": True,
    "step": max((int(s) for s in steps if s.isdigit()), default=None),
    "saving": any(not s.isdigit() for s in steps),
  }


def outcome(workdir: pathlib.Path) -> dict:
  """Returns all that must be equal between two runs."""
  result = json.loads((workdir / "result.json").read_text())
  with np.load(workdir / "predictions.npz") as found:
    logits = found["logits"].tobytes().hex()
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  history = [
    {k: v for k, v in json.loads(line).items() if k not in CLOCKS}
    for line in lines
  ]
  names = ("metrics", "best_step", "steps", "ended_by", "complete")
  return {
    **{name: result[name] for name in names},
    "history": history,
    "logits": logits,
    "weights": weights(workdir, result["steps"]),
  }


def weights(workdir: pathlib.Path, step: int) -> dict[str, str]:
  """Returns every array of the last checkpoint, bit for bit."""
  import jax
  import orbax.checkpoint as ocp

  arrays = {}
  for item in ("model", "training"):
    handler = ocp.StandardCheckpointer()
    path = (workdir / "checkpoints" / str(step) / item).absolute()
    for name, leaf in handler.restore(path).items():
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
      arrays[name] = np.asarray(leaf).tobytes().hex()
    handler.close()
  return arrays


def drill(trials: int, epochs: int, seed: int, root: pathlib.Path) -> dict:
  """Runs the trials; returns what happened in each."""
  whole = root / "whole"
  started = time.perf_counter()
  subprocess.run(
    command(whole, epochs), check=True, capture_output=True, text=True
  )
  seconds = time.perf_counter() - started
  trained = json.loads((whole / "result.json").read_text())["wall_seconds"]
  want = outcome(whole)
  rng = random.Random(seed)
  rows = []
  for trial in range(trials):
    workdir = root / f"trial_{trial}"
    delay = rng.uniform(0, trained)
    row = run_until(command(workdir, epochs), workdir, delay)
    again = subprocess.run(
      command(workdir, epochs), capture_output=True, text=True, check=False
    )
    if again.returncode:
      raise RuntimeError(f"trial {trial} did not go on: {again.stderr}")
    got = outcome(workdir)
    row |= {
      "delay": round(delay, 3),
      "differs": [name for name in want if want[name] != got[name]],
    }
    rows.append(row)
    print(json.dumps(row), flush=True)
  return {
    "equal": sum(not row["differs"] for row in rows),
    "trials": trials,
    "killed": sum(row["killed"] for row in rows),
    "killed_during_a_save": sum(row["saving"] for row in rows),
    "unbroken_seconds": round(seconds, 2),
    "rows": rows,
  }


def main() -> int:
  """Runs the drill and writes its result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--trials", type=int, default=20)
  parser.add_argument("--epochs", type=int, default=8)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", default=str(RESULTS / "kill_drill.json"))
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as root:
    found = drill(args.trials, args.epochs, args.seed, pathlib.Path(root))
  found["command"] = (
    f"kill_drill.py --trials {args.trials} --epochs {args.epochs} "
    f"--seed {args.seed}"
  )
  pathlib.Path(args.out).write_text(json.dumps(found, indent=2) + "\n")
  print(f"bitwise equal: {found['equal']} of {found['trials']}")
  return 0 if found["equal"] == found["trials"] else 1


if __name__ == "__main__":
  raise SystemExit(main())
