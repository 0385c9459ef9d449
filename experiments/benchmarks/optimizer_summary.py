"""What the runs say, as plain data: the JSON file of the benchmark."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optimizer_scores as scores
from optimizer_candidates import Candidate

_TAUS = np.linspace(1.0, 4.0, 61)  # Of the performance profile.
_WITHIN = 2.0  # Times the steps of its best rate: a rate still good.


def summarize(
  runs: scores.Runs,
  targets: scores.Targets,
  known: Mapping[str, Candidate],
  *,
  development: Sequence[int],
  scoring: Sequence[int],
) -> dict[str, Any]:
  """Scores every candidate that ran on a workload with all scoring seeds.

  Args:
    runs: all records.
    targets: frozen.
    known: candidates by name.
    development: seeds by which a tuned candidate's setting is chosen.
    scoring: seeds that are scored.
  """
  cells = {
    name: _cells(runs, targets, name, candidate, development, scoring)
    for name, candidate in known.items()
  }
  cells = {name: found for name, found in cells.items() if found}
  return {
    "candidates": {
      name: {"cells": found, **_totals(found, targets)}
      for name, found in cells.items()
    },
    "profile": profile(cells, targets),
    "rates": {
      name: _robustness(runs, targets, name, development[0]) for name in known
    },
    "settings_tried": settings_tried(runs),
  }


def _cells(
  runs: scores.Runs,
  targets: scores.Targets,
  name: str,
  candidate: Candidate,
  development: Sequence[int],
  scoring: Sequence[int],
) -> dict[str, dict[str, Any]]:
  """Workload and kind, as "cnn/tight", to steps, ratio and losses."""
  found = {}
  for workload, kinds in targets.items():
    for kind, target in kinds.items():
      if name == scores.BASELINE:
        setting = target.setting
      else:
        setting = chosen(
          runs, workload, name, candidate, development, kind, target
        )
      records = scores.records_of(runs, workload, name, setting, scoring)
      base = scores.records_of(
        runs, workload, scores.BASELINE, target.setting, scoring
      )
      if len(records) == len(base) == len(scoring):
        found[f"{workload}/{kind}"] = _cell(records, base, target, setting)
  return found


def chosen(
  runs: scores.Runs,
  workload: str,
  name: str,
  candidate: Candidate,
  development: Sequence[int],
  kind: str,
  target: scores.Target,
) -> Mapping[str, float]:
  """The setting to score: the best on development seeds, or the default."""
  rows = candidate.tuned and scores.ranked(
    runs, workload, name, development, kind, target
  )
  return rows[0][1] if rows else candidate.default


def _cell(records, base, target: scores.Target, setting) -> dict[str, Any]:
  steps = scores.median_steps(records, target.loss)
  baseline = scores.median_steps(base, target.loss)
  return {
    "setting": dict(setting),
    "target": target.loss,
    "steps": [_plain(scores.steps_to(r, target.loss)) for r in records],
    "median_steps": _plain(steps),
    # A baseline that misses its own target on new seeds counts as just there.
    "ratio": _plain(steps / min(baseline, target.steps)),
    "baseline_missed": math.isinf(baseline),
    "best_losses": [_plain(scores.best_loss(r)) for r in records],
  }


def _totals(cells: dict[str, Any], targets: scores.Targets) -> dict[str, Any]:
  found = {}
  for kind in scores.SHARES:
    ratios = [
      _number(cell["ratio"])
      for key, cell in cells.items()
      if key.endswith(f"/{kind}")
    ]
    found[kind] = {
      "geometric_mean": _plain(scores.geometric_mean(ratios)),
      "geometric_mean_of_reached": _plain(
        scores.geometric_mean([r for r in ratios if math.isfinite(r)])
      ),
      "worst": _plain(max(ratios, default=math.inf)),
      "missed": sum(math.isinf(r) for r in ratios),
      "workloads": len(ratios),
      "of": len(targets),
    }
  return found


def profile(
  cells: Mapping[str, Mapping[str, Any]], targets: scores.Targets
) -> dict[str, Any]:
  """Share of targets that each reaches within tau times the fastest's steps.

  Its score is the integral over tau from 1 to 4, divided by 3: 1 for the
  fastest everywhere, 0 for one that reaches no target in 4 times the steps.
  A candidate that did not run on every target has no profile.
  """
  keys = [f"{w}/{kind}" for w, kinds in targets.items() for kind in kinds]
  complete = [name for name, found in cells.items() if set(keys) <= set(found)]
  steps = {
    name: np.array([_number(cells[name][key]["median_steps"]) for key in keys])
    for name in complete
  }
  if not steps or not keys:
    return {"tau": [], "shares": {}, "scores": {}}
  fastest = np.min(list(steps.values()), axis=0)
  # Where none arrives, none is within any factor of the fastest.
  fastest = np.where(np.isfinite(fastest), fastest, 0.0)
  shares = {
    name: (found[None] <= _TAUS[:, None] * fastest[None]).mean(axis=1)
    for name, found in steps.items()
  }
  width = _TAUS[-1] - _TAUS[0]
  return {
    "tau": [round(float(tau), 3) for tau in _TAUS],
    "shares": {n: [round(float(x), 4) for x in s] for n, s in shares.items()},
    "scores": {
      n: round(float(np.trapezoid(s, _TAUS) / width), 4)
      for n, s in shares.items()
    },
  }


def _robustness(
  runs: scores.Runs, targets: scores.Targets, name: str, seed: int
) -> dict[str, Any]:
  """Per workload: what each rate reaches, and over how many decades."""
  found = {}
  for workload, kinds in targets.items():
    curve = rate_curve(runs, workload, name, seed, kinds["middle"])
    if len(curve) > 1:
      found[workload] = {
        "rates": [row[0] for row in curve],
        "steps": [_plain(row[1]) for row in curve],
        "losses": [_plain(row[2]) for row in curve],
        "decades": round(decades(curve), 3),
      }
  return found


def rate_curve(
  runs: scores.Runs,
  workload: str,
  name: str,
  seed: int,
  target: scores.Target,
) -> list[tuple[float, float, float]]:
  """Rows (rate, steps to the target, best loss), by rising rate.

  What else a grid varies is held at its best: the group of settings that, at
  its best rate, gets there first. Of AdamW, those with a cosine to the end.
  """
  groups: dict[tuple, list[tuple[float, float, float]]] = {}
  for setting, (record,) in scores.by_setting(runs, workload, name, [seed]):
    if setting.get("horizon", 1.0) == 1.0 and "rate" in setting:
      rest = tuple((k, v) for k, v in setting.items() if k != "rate")
      steps = scores.steps_to(record, target.loss)
      row = (setting["rate"], steps, scores.best_loss(record))
      groups.setdefault(rest, []).append(row)
  if not groups:
    return []
  return sorted(
    min(groups.values(), key=lambda rows: min(row[1:] for row in rows))
  )


def decades(curve: Sequence[tuple[float, float, float]]) -> float:
  """Decades of rate around the best that need at most twice its steps.

  >>> decades([(0.01, 100, 0.0), (0.1, 50, 0.0), (1.0, 101, 0.0)])
  1.0
  """
  best = min(range(len(curve)), key=lambda i: curve[i][1])
  if math.isinf(curve[best][1]):
    return 0.0
  good = [row[1] <= _WITHIN * curve[best][1] for row in curve]
  above = len(list(itertools.takewhile(bool, good[best:])))
  below = len(list(itertools.takewhile(bool, good[best::-1])))
  ends = curve[best - below + 1][0], curve[best + above - 1][0]
  return math.log10(ends[1] / ends[0])


def settings_tried(runs: scores.Runs) -> dict[str, int]:
  """How many settings of each candidate were run anywhere."""
  found: dict[str, set] = {}
  for record in runs.values():
    setting = tuple(sorted(record["setting"].items()))
    found.setdefault(record["candidate"], set()).add(setting)
  return {name: len(settings) for name, settings in sorted(found.items())}


def _plain(value: float) -> float | None:
  # JSON has no infinity: null is a target missed, or a loss never finite.
  return float(f"{value:.6g}") if math.isfinite(value) else None


def _number(value: float | None) -> float:
  return math.inf if value is None else value
