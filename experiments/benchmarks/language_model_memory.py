"""What a training step of a long text takes: dynamic attention, and full.

Compiled: state, and everything that XLA plans to hold beside it. Resident: how
far the memory of a process of its own rises within the second step, from the
first one's end on, and what it holds then; Linux tells it.
"""

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import pathlib
import re
from typing import Any

import harness_machine as machine
import language_model_parts as parts
import language_model_step as steps

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def add_flags(parser: argparse.ArgumentParser) -> None:
  parts.add_model_flags(parser)
  parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
  parser.add_argument("--tokens", type=int, default=16384, help="in a step")
  parser.add_argument(
    "--run-most", type=float, default=18.0,
    help="gigabytes up to which a step is run, and not only compiled (18)",
  )  # fmt: skip


def run(flags: argparse.Namespace) -> None:
  """Measures all variants and writes the result."""
  found = {}
  for length in flags.lengths:
    found[length] = {}
    for variant in steps.VARIANTS:
      found[length][variant] = row = _in_process(flags, variant, length)
      print(f"{length:,} tokens, {variant}: {row}", flush=True)
  shares = {length: _shares(row) for length, row in found.items()}
  print(f"dynamic in units of: {shares}")
  result = {
    "name": "language_model_memory",
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    "model": parts.sizes(flags),
    "tokens_a_step": flags.tokens,
    "megabytes": found,
    "dynamic_in_units_of": shares,
    "hardware": machine.hardware(),
    "versions": machine.versions(),
  }
  flags.results.mkdir(parents=True, exist_ok=True)
  path = flags.results / "language_model_memory.json"
  path.write_text(json.dumps(result, indent=1) + "\n")


def _shares(row: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
  mine = row[parts.DYNAMIC]
  return {
    peer: {
      kind: round(mine[kind] / theirs[kind], 4)
      for kind in ("total_mb", "resident_rise_mb")
      if mine.get(kind) and theirs.get(kind)
    }
    for peer, theirs in row.items()
    if peer != parts.DYNAMIC
  }


def _in_process(
  flags: argparse.Namespace, variant: str, length: int
) -> dict[str, Any]:
  """Returns what `measure` does, from a process that nothing else used."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
    return pool.submit(measure, flags, variant, length).result()


def measure(
  flags: argparse.Namespace, variant: str, length: int
) -> dict[str, Any]:
  """Compiles a step and, if it fits, runs it; returns megabytes."""
  rows = max(1, flags.tokens // length)
  training = steps.training(flags, variant)
  compiled = training.compiled(length, rows)
  found: dict[str, Any] = steps.taken(compiled)
  fits = found and found["total_mb"] < 1e3 * flags.run_most
  if not fits or not _CLEAR.exists():
    return found
  step = parts.Run(training, compiled, [next(parts.batches(length, rows))])
  step()  # The first one also starts threads.
  _CLEAR.write_text("5")  # The peak starts anew.
  before = _resident("VmRSS")
  step()
  peak = _resident("VmHWM")
  return found | {
    "resident_before_mb": before,
    "resident_peak_mb": peak,
    "resident_rise_mb": round(peak - before, 1),
  }


def _resident(name: str) -> float:
  """Returns megabytes that Linux says this process has."""
  found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
  return round(int(found[1]) * 1024 / 1e6, 1) if found else 0.0
