"""Bits per byte with dynamic attention beside full attention.

The same weights to start from, batches, steps and optimizer (`optim.deepseek`,
of which the average is scored) for each way to attend, several seeds; scored on
files that were held out. Every run goes into the result when it is done, and
is found there by the next call, so that seeds may be run one by one.
"""

import argparse
import datetime
import json
import math
import pathlib
import time
from typing import Any

import harness_machine as machine
import jax
import jax.numpy as jnp
import language_model_parts as parts
import numpy as np
import plain_language_model as plain
from flax import nnx
from harness_figure import Spread

from deepseek_jax import optim
from deepseek_jax.train.blas import one_blas_thread
from deepseek_jax.train.state import split

FULL = "full"
_SETTINGS = (
  "features", "layers", "heads", "block_size", "window", "remote", "length",
  "rows", "steps", "rate", "held_out",
)  # fmt: skip
_SCORED = 4  # Rows that are scored together.


def add_flags(parser: argparse.ArgumentParser) -> None:
  parts.add_model_flags(parser, features=96, layers=3)
  parser.add_argument("--length", type=int, default=2048, help="T (2048)")
  parser.add_argument("--rows", type=int, default=4, help="in a step (4)")
  parser.add_argument("--steps", type=int, default=400, help="(400)")
  parser.add_argument("--rate", type=float, default=1e-2, help="(0.01)")
  parser.add_argument(
    "--held-out", type=int, default=96, help="rows to score (96)"
  )
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument(
    "--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS)
  )


def _annealed(flags: argparse.Namespace) -> dict[str, Any]:
  return {"schedule": ((0, None), (flags.steps // 2, flags.remote))}


WAYS = {
  FULL: lambda _: None,
  "dynamic": lambda _: {},
  "dynamic, full at first": _annealed,
  "window alone": lambda _: {"num_remote": 0},
}


def run(flags: argparse.Namespace) -> None:
  """Makes the runs that are missing and writes the result."""
  path = flags.results / "language_model_quality.json"
  settings = {name: getattr(flags, name) for name in _SETTINGS}
  runs = _known(path, settings)
  for seed in flags.seeds:
    for way in flags.ways:
      key = f"{way}, seed {seed}"
      if key not in runs:
        runs[key] = {"way": way, "seed": seed} | train(flags, way, seed)
        _write(path, settings, runs)
      print(f"{key}: {_short(runs[key])}", flush=True)
  _write(path, settings, runs)
  for way, told in summary(runs).items():
    print(f"{way} / {FULL}: {told}")


def train(flags: argparse.Namespace, way: str, seed: int) -> dict[str, Any]:
  """Trains one model and scores it."""
  options = WAYS[way](flags)
  kind = "full" if options is None else "dynamic"
  model = parts.model(flags, kind, seed=seed, **(options or {}))
  training = parts.our_training(model, optim.deepseek(flags.rate))
  batches = parts.batches(flags.length, flags.rows, seed=seed)
  state, losses = training.state, []
  start = time.perf_counter()
  with one_blas_thread():
    for _ in range(flags.steps):
      state, loss = training.step(state, *next(batches))
      losses.append(loss)
    losses = np.asarray(jax.device_get(losses)) / math.log(2)
  params, rest, opt_state = state
  seconds = time.perf_counter() - start
  averaged = optim.averaged_params(opt_state, params)
  every = max(1, flags.steps // 20)
  return score(model, averaged, rest, flags) | {
    "curve": [round(float(x), 4) for x in losses[every - 1 :: every]],
    "seconds": round(seconds, 1),
  }


def score(
  model: nnx.Module, params: Any, rest: Any, flags: argparse.Namespace
) -> dict[str, float]:
  """Returns bits per byte of held-out rows, and of their second halves."""
  model.eval()
  structure = split(model)[0]

  @jax.jit
  def bits(params, rest, tokens, targets):
    logits = nnx.merge(structure, params, rest)(tokens)
    found = plain.cross_entropies(logits, targets) / math.log(2)
    return found.mean(0)

  rows = min(_SCORED, flags.held_out)
  batches = parts.batches(flags.length, rows, part="validation")
  found = jnp.stack([
    bits(params, rest, *next(batches)) for _ in range(flags.held_out // rows)
  ])  # fmt: skip
  late = found[:, flags.length // 2 :]
  return {
    "bits_per_byte": round(float(found.mean()), 5),
    "bits_per_byte_late": round(float(late.mean()), 5),
  }


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Returns the ratios of every way to full attention of the same seed."""
  table: dict[str, dict[int, dict[str, Any]]] = {}
  for told in runs.values():
    table.setdefault(told["way"], {})[told["seed"]] = told
  full = table.pop(FULL, {})
  found: dict[str, dict[str, Any]] = {}
  for way, by_seed in table.items():
    seeds = sorted(by_seed.keys() & full.keys())
    if not seeds:
      continue
    found[way] = {"seeds": seeds}
    for name in ("bits_per_byte", "bits_per_byte_late"):
      ratios = [by_seed[s][name] / full[s][name] for s in seeds]
      found[way][name] = {
        "ratios": [round(r, 5) for r in ratios],
        "median": round(Spread.of(ratios).median, 5),
      }
  return found


def _short(told: dict[str, Any]) -> dict[str, Any]:
  return {k: told[k] for k in ("bits_per_byte", "bits_per_byte_late")}


def _known(
  path: pathlib.Path, settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
  """Returns the runs of these settings that a file holds."""
  if not path.exists():
    return {}
  held = json.loads(path.read_text())
  if held["settings"] != settings:
    print(f"made anew: {path.name} holds runs of other settings")
    return {}
  return held["runs"]


def _write(
  path: pathlib.Path,
  settings: dict[str, Any],
  runs: dict[str, dict[str, Any]],
) -> None:
  result = {
    "name": "language_model_quality",
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    "settings": settings,
    "against_full": summary(runs),
    "runs": runs,
    "hardware": machine.hardware(),
    "versions": machine.versions(),
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=1) + "\n")
