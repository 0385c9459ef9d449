"""Targets, steps to a target, and the best setting by each."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from optimizer_runs import EVERY, Task

SHARES = {"middle": 0.5, "tight": 0.9}  # Of T: when the baseline gets there.
BASELINE = "adamw"
Runs = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Target:
  """A validation loss to reach, and the baseline's setting that set it."""

  loss: float
  setting: dict[str, float]
  steps: int


Targets = dict[str, dict[str, Target]]  # By workload and "middle" or "tight".


def save(targets: Targets, path: pathlib.Path, **details: Any) -> None:
  """Freezes targets."""
  found = {
    workload: {kind: dataclasses.asdict(t) for kind, t in kinds.items()}
    for workload, kinds in sorted(targets.items())
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({"targets": found, **details}, indent=1) + "\n")


def load(path: pathlib.Path) -> Targets:
  """Reads frozen targets; none where there is no file."""
  if not path.exists():
    return {}
  return {
    workload: {kind: Target(**fields) for kind, fields in kinds.items()}
    for workload, kinds in json.loads(path.read_text())["targets"].items()
  }


def best_loss(record: Mapping[str, Any], share: float = 1.0) -> float:
  """The lowest loss of the first `share` of the steps; infinite if none."""
  number = int(share * record["steps"]) // EVERY
  return min(record["losses"][:number], default=math.inf)


def steps_to(record: Mapping[str, Any], loss: float) -> float:
  """Steps until the first evaluation at or below `loss`; infinite if none.

  >>> steps_to({"losses": [2.0, 1.0, 0.5], "steps": 30}, 1.0)
  20
  """
  for i, value in enumerate(record["losses"]):
    if value <= loss:
      return min((i + 1) * EVERY, record["steps"])
  return math.inf


def median_steps(records: Iterable[Mapping[str, Any]], loss: float) -> float:
  """Median over runs; a run that misses counts as infinite."""
  return float(np.median([steps_to(record, loss) for record in records]))


def by_setting(
  runs: Runs, workload: str, candidate: str, seeds: Sequence[int]
) -> list[tuple[dict[str, float], list[Mapping[str, Any]]]]:
  """Settings of which all seeds were run, with their records."""
  found: dict[tuple, dict[int, Any]] = {}
  for record in runs.values():
    if (record["workload"], record["candidate"]) == (workload, candidate):
      key = tuple(sorted(record["setting"].items()))
      found.setdefault(key, {})[record["seed"]] = record
  return [
    (dict(key), [records[seed] for seed in seeds])
    for key, records in found.items()
    if set(seeds) <= set(records)
  ]


def ranked(
  runs: Runs,
  workload: str,
  candidate: str,
  seeds: Sequence[int],
  kind: str,
  target: Target | None = None,
) -> list[tuple[float, dict[str, float]]]:
  """Settings, the best first, with the loss of each by the target's share.

  Without a target, the best has the lowest median loss by that share of the
  steps; with one, the fewest steps to it, and loss decides between equals.
  """
  rows = []
  for setting, records in by_setting(runs, workload, candidate, seeds):
    loss = float(np.median([best_loss(r, SHARES[kind]) for r in records]))
    steps = median_steps(records, target.loss) if target else 0.0
    rows.append((steps, loss, setting))
  rows.sort(key=lambda row: row[:2])
  return [(loss, setting) for _, loss, setting in rows]


def targets_of(
  runs: Runs, workload: str, steps: int, seeds: Sequence[int]
) -> dict[str, Target]:
  """The hardest losses that the baseline's median reaches in time.

  Raises:
    ValueError: no setting of the baseline has runs of all `seeds`.
  """
  found = {}
  for kind in SHARES:
    rows = ranked(runs, workload, BASELINE, seeds, kind)
    if not rows:
      raise ValueError(
        f"targets need runs of {BASELINE} with seeds {list(seeds)}; tune it "
        f"first, got none on {workload=}."
      )
    found[kind] = Target(*rows[0], steps=steps)
  return found


def records_of(
  runs: Runs,
  workload: str,
  candidate: str,
  setting: Mapping[str, float],
  seeds: Sequence[int],
) -> list[Mapping[str, Any]]:
  """Records of one setting, in the order of the seeds; those that exist."""
  keys = [Task.of(workload, candidate, setting, seed).key for seed in seeds]
  return [runs[key] for key in keys if key in runs]


def geometric_mean(values: Sequence[float]) -> float:
  """Infinite if one value is.

  >>> geometric_mean([0.5, 2.0])
  1.0
  """
  return float(np.exp(np.mean(np.log(values)))) if len(values) else math.nan
