"""Stop one rank of a job in every way it may stop, and time its end.

Each trial starts real processes that step together under the watchdog, lets one
of them fail at a step, and takes the time from the fault until every process is
gone, the exit codes, and whether every survivor named the culprit. The culprit
is another rank in each repeat, rank 0 too.

  python experiments/benchmarks/drills.py --processes 2 4 --repeats 5
"""

import argparse
import datetime
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import harness_machine as machine

FOLDER = pathlib.Path(__file__).parent
RESULTS = FOLDER.parent / "results"
ALLOWED = 10.0  # Seconds beyond the watchdog's.
LIMIT = 180.0  # Seconds after which a trial counts as one that never ends.

FAULTS = {
  "kill": "killed by SIGKILL",
  "raise": "raises",
  "outside": "sleeps for ever outside a collective",
  "inside": "sleeps for ever in a host callback of its step",
  "absent": "never started",
}


def trial(count: int, fault: str, culprit: int, seconds: float) -> dict:
  """Runs one job; returns what became of it."""
  with tempfile.TemporaryDirectory() as folder:
    logs = pathlib.Path(folder)
    ended = run(count, fault, culprit, seconds, logs)
    texts = {rank: (logs / f"{rank}.err").read_text() for rank in ended}
    marks = [
      float(line.split()[1])
      for rank in ended
      for line in (logs / f"{rank}.out").read_text().splitlines()
      if line.startswith("FAULT")
    ]
  if not marks:
    raise RuntimeError(f"no fault came about: {texts}")
  # One that never starts is missed from when all the others have come.
  began = max(marks)
  survivors = [rank for rank in ended if rank != culprit]
  gone = max(end for _, end in ended.values())
  return {
    "culprit": culprit,
    "seconds": round(gone - began, 2),
    "codes": [code for code, _ in ended.values()],
    "named": all(names(texts[rank], culprit, fault) for rank in survivors),
  }


def run(
  count: int, fault: str, culprit: int, seconds: float, logs: pathlib.Path
) -> dict[int, tuple[int, float]]:
  """Runs the processes; returns the exit code and the end of each, by rank."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "PYTHONPATH": str(FOLDER.parents[1]),
  }
  processes = {}
  for rank in range(count):
    if fault == "absent" and rank == culprit:
      continue
    words = map(str, (rank, count, port, fault, culprit, seconds))
    with (
      (logs / f"{rank}.out").open("wb") as out,
      (logs / f"{rank}.err").open("wb") as err,
    ):
      processes[rank] = subprocess.Popen(
        [sys.executable, str(FOLDER / "drill_worker.py"), *words],
        stdout=out,
        stderr=err,
        env=environment,
      )
  ended: dict[int, tuple[int, float]] = {}
  try:
    wait(processes, ended)
  finally:
    for process in processes.values():
      process.kill()
      process.wait()
  return dict(sorted(ended.items()))


def wait(
  processes: dict[int, subprocess.Popen], ended: dict[int, tuple[int, float]]
) -> None:
  limit = time.monotonic() + LIMIT
  while len(ended) < len(processes) and time.monotonic() < limit:
    for rank, process in processes.items():
      if rank not in ended and process.poll() is not None:
        ended[rank] = (process.returncode, time.time())
    time.sleep(0.02)
  if len(ended) < len(processes):
    raise RuntimeError(f"after {LIMIT:g} s only {sorted(ended)} had ended")


def names(text: str, culprit: int, fault: str) -> bool:
  """Says whether a log tells whose fault it was."""
  if fault != "absent":
    return f"rank {culprit} is the culprit" in text
  said = "was not reached" if culprit == 0 else "never came"
  return f"rank {culprit} {said}" in text


def summary(count: int, fault: str, seconds: float, trials: list[dict]) -> dict:
  times = [trial["seconds"] for trial in trials]
  good = [
    trial["seconds"] <= seconds + ALLOWED
    and all(trial["codes"])
    and trial["named"]
    for trial in trials
  ]
  return {
    "processes": count,
    "fault": fault,
    "median_seconds": statistics.median(times),
    "worst_seconds": max(times),
    "good": sum(good),
    "trials": trials,
  }


def show(row: dict[str, Any]) -> None:
  codes = sorted({code for trial in row["trials"] for code in trial["codes"]})
  print(
    f"{row['processes']:9} {FAULTS[row['fault']]:47} "
    f"{row['median_seconds']:8.1f} {row['worst_seconds']:8.1f} "
    f"{row['good']:3} of {len(row['trials'])}  "
    f"{' '.join(map(str, codes))}",
    flush=True,
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=8.0)
  parser.add_argument("--faults", nargs="+", default=list(FAULTS))
  parser.add_argument("--out", default=str(RESULTS / "drills.json"))
  args = parser.parse_args()
  print(
    f"watchdog: {args.seconds:g} s; every process must be gone within "
    f"{args.seconds + ALLOWED:g} s\n"
    f"processes one rank {'':38} median s  worst s  good  exit codes"
  )
  rows = []
  for count in args.processes:
    for fault in args.faults:
      trials = [
        trial(count, fault, repeat % count, args.seconds)
        for repeat in range(args.repeats)
      ]
      rows.append(summary(count, fault, args.seconds, trials))
      show(rows[-1])
  found = {
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    "watchdog_seconds": args.seconds,
    "allowed_seconds": args.seconds + ALLOWED,
    "rows": rows,
    "hardware": machine.hardware(),
    "versions": machine.versions(),
    "load_after": round(os.getloadavg()[0], 2),
  }
  pathlib.Path(args.out).write_text(json.dumps(found, indent=2) + "\n")
  good = all(row["good"] == len(row["trials"]) for row in rows)
  return 0 if good else 1


if __name__ == "__main__":
  raise SystemExit(main())
