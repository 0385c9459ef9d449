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


def crossover(
  found: Mapping[str, Mapping[str, Mapping[str, float]]],
  name: str,
  steps_ratio: float,
) -> float | None:
  """The scale from which on fewer steps outweigh slower ones.

  Taking the ratio of steps to be that of the workload's own batch. The
  smallest scale measured where it wins there already; None where it never
  does.
  """
  scales = [float(scale) for scale in found]
  ratios = [steps_ratio * rows[name]["ratio"] for rows in found.values()]
  if ratios[0] <= 1:
    return scales[0]
  return harness.crossover(scales, ratios)
