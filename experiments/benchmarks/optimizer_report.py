"""Tables and files of the optimizer benchmark."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optimizer_scores as scores


def print_comparison(
  rows: Mapping[str, Mapping[str, list[list[Any]]]],
  targets: scores.Targets,
  runs: scores.Runs,
  names: Sequence[str],
  seeds: Sequence[int],
) -> None:
  """Prints steps to the targets and their ratios to the baseline's.

  Args:
    rows: label to workload to the records of its settings.
    targets: frozen.
    runs: all, for the baseline's.
    names: of the workloads.
    seeds: those of the records.
  """
  print(f"median of seeds {list(seeds)}; steps to target (x of tuned adamw)")
  print(f"{'':30}" + "".join(f"{name:>26}" for name in names), end="")
  print("   geomean middle  tight")
  print(f"{'':30}" + f"{'middle':>9}{'tight':>9}{'best':>8}" * len(names))
  bases = {
    (name, kind): baseline_steps(runs, name, target, seeds)
    for name in names
    for kind, target in targets.get(name, {}).items()
  }
  for label, found in rows.items():
    line, ratios = f"{label:30.30}", {kind: [] for kind in scores.SHARES}
    for name in names:
      settings = found.get(name, [])
      for kind in scores.SHARES:
        target = targets.get(name, {}).get(kind)
        if target is None:
          line += f"{'-':>9}"
          continue
        steps = min(scores.median_steps(s, target.loss) for s in settings)
        ratio = steps / bases[name, kind]
        ratios[kind].append(ratio)
        line += f"{steps:>4.0f}x{ratio:.2f}"
      best = min(np.median([scores.best_loss(r) for r in s]) for s in settings)
      line += f"{best:8.4f}"
    means = [scores.geometric_mean(ratios[kind]) for kind in scores.SHARES]
    print(line + "   " + " ".join(f"{mean:8.3f}" for mean in means))


def baseline_steps(
  runs: scores.Runs, workload: str, target: scores.Target, seeds: Sequence[int]
) -> float:
  """Median steps of the setting that set a target; all, if it misses."""
  records = scores.records_of(
    runs, workload, scores.BASELINE, target.setting, seeds
  )
  steps = scores.median_steps(records, target.loss) if records else math.inf
  return min(steps, target.steps)
