"""Seconds a step of each optimizer, and from what batch on it pays.

The work of an optimizer does not grow with the batch, that of the gradient
does: what costs twice the time at 512 tokens a step may cost nothing at 8,192.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import harness
import jax
import numpy as np
import workloads
from optimizer_candidates import Candidate
from optimizer_runs import Trainer
from optimizer_scores import SHARES

_STEPS = 5  # In one turn.


def times(
  workload: workloads.Workload,
  candidates: Mapping[str, Candidate],
  *,
  scales: Sequence[int] = (1, 4, 16),
  rounds: int = 7,
) -> dict[str, dict[str, dict[str, float]]]:
  """Times steps in turns, with batches repeated `scales` times.

  Args:
    workload: what is trained.
    candidates: the first is what the others are divided by.
    scales: factors on the workload's batch.
    rounds: turns of each.

  Returns:
    Scale to candidate to seconds a step and its ratio to the first.
  """
  found = {}
  for scale in scales:
    batch = jax.tree.map(
      lambda x, scale=scale: np.concatenate([x] * scale),
      workload.batch(0, 0),
    )
    cases = {
      name: Trainer(workload, candidate).repeat(candidate.default, batch)
      for name, candidate in candidates.items()
    }
    seconds = harness.measure(cases, rounds=rounds, warmup=1, calls=_STEPS)
    found[str(scale)] = _rows(seconds)
  return found


def _rows(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
  comparison = harness.Comparison("", seconds)
  return {
    name: {
      "seconds": float(f"{comparison.spread(name).median:.4g}"),
      "ratio": round(comparison.ratio(name).median, 4),
    }
    for name in seconds
  }


def wall(
  times: Mapping[str, Mapping[str, Any]], scored: Mapping[str, Any]
) -> dict[str, dict[str, dict[str, Any]]]:
  """Time to the targets: slower steps by fewer of them.

  Args:
    times: workload to what `times` found, as "scales".
    scored: candidate to its "cells", as `optimizer_summary` makes them.

  Returns:
    Workload to candidate to the ratio of times a step at the workload's own
    batch, those to each target, and from which multiple of the batch on the
    middle target is reached in less time, fewer steps as measured: the
    smallest multiple where that holds already there, None where it never does.
  """
  found: dict[str, dict[str, dict[str, Any]]] = {}
  for workload, measured in times.items():
    scales = measured["scales"]
    for name in next(iter(scales.values())):
      per_step = {float(scale): rows[name] for scale, rows in scales.items()}
      first = per_step[min(per_step)]["ratio"]
      row = {"step": first}
      for kind in SHARES:
        cell = scored.get(name, {}).get("cells", {}).get(f"{workload}/{kind}")
        steps = cell["ratio"] if cell else None
        row[kind] = None if steps is None else round(first * steps, 4)
        if kind == "middle" and steps is not None:
          row["pays_from"] = _pays_from(per_step, steps)
      found.setdefault(workload, {})[name] = row
  return found


def _pays_from(per_step: Mapping[float, Any], steps: float) -> float | None:
  scales = sorted(per_step)
  ratios = [steps * per_step[scale]["ratio"] for scale in scales]
  if ratios[0] <= 1:
    return scales[0]
  return harness.crossover(scales, ratios)
