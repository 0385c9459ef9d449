"""Tables and files of the optimizer benchmark."""

import datetime
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import harness_machine as machine
import numpy as np
import optimizer_scores as scores
from rich.console import Console
from rich.table import Table


def print_comparison(
  rows: Mapping[str, Mapping[str, list[list[Any]]]],
  targets: scores.Targets,
  runs: scores.Runs,
  names: Sequence[str],
  seeds: Sequence[int],
) -> None:
  """Prints steps to the targets and their ratios to the baseline's.

  Args:
    rows: label to workload to the records of its settings, of which the best
      counts for each number.
    targets: frozen.
    runs: all, for the baseline's.
    names: of the workloads.
    seeds: those of the records.
  """
  print(
    f"median of seeds {list(seeds)}: steps to the target, x of "
    f"{scores.BASELINE} tuned for each, and the best validation loss"
  )
  width = max(map(len, rows), default=0) + 1
  print(" " * width + "".join(f"{name:>28}" for name in names) + "  geo. means")
  heads = f"{'middle':>10}{'tight':>10}{'best':>8}" * len(names)
  print(" " * width + heads + "  middle   tight")
  bases = {
    (name, kind): baseline_steps(runs, name, target, seeds)
    for name in names
    for kind, target in targets.get(name, {}).items()
  }
  for label, found in rows.items():
    line = f"{label:{width}}"
    ratios: dict[str, list[float]] = {kind: [] for kind in scores.SHARES}
    for name in names:
      settings = [records for records in found.get(name, []) if records]
      for kind in scores.SHARES:
        if (name, kind) not in bases or not settings:
          line += f"{'-':>10}"
          continue
        loss = targets[name][kind].loss
        steps = min(scores.median_steps(s, loss) for s in settings)
        ratios[kind].append(steps / bases[name, kind])
        line += f"{_steps(steps, ratios[kind][-1]):>10}"
      best = [np.median([scores.best_loss(r) for r in s]) for s in settings]
      line += f"{min(best, default=math.nan):8.4f}"
    means = [scores.geometric_mean(ratios[kind]) for kind in scores.SHARES]
    print(line + "".join(f"{mean:8.3f}" for mean in means))


def _steps(steps: float, ratio: float) -> str:
  return "missed" if math.isinf(steps) else f"{steps:.0f} x{ratio:.2f}"


def baseline_steps(
  runs: scores.Runs, workload: str, target: scores.Target, seeds: Sequence[int]
) -> float:
  """Median steps of the setting that set a target; all, if it misses."""
  records = scores.records_of(
    runs, workload, scores.BASELINE, target.setting, seeds
  )
  steps = scores.median_steps(records, target.loss) if records else math.inf
  return min(steps, target.steps)


def write(
  summary: dict[str, Any], folder: pathlib.Path, **details: Any
) -> dict[str, Any]:
  """Prints the tables; writes optimizers.json and optimizers.svg.

  Returns:
    What the JSON file holds.
  """
  import optimizer_figure
  import optimizer_times

  result = {
    "name": "optimizers",
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    **details,
    **summary,
    "wall": optimizer_times.wall(details["times"], summary["candidates"]),
    "hardware": machine.hardware(),
    "versions": machine.versions(),
  }
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result, indent=1)
  # A list of numbers on one line: the file is read by people too.
  text = re.sub(
    r"\[(?:\s*(?:null|[-\d.e+]+),?)+\s*\]", lambda m: _joined(m[0]), text
  )
  (folder / "optimizers.json").write_text(text + "\n")
  optimizer_figure.draw(result, folder / "optimizers.svg")
  _print(result)
  return result


def _joined(text: str) -> str:
  return " ".join(text.split()).replace("[ ", "[").replace(" ]", "]")


def _print(result: dict[str, Any]) -> None:
  console = Console()
  if not console.is_terminal:
    console.width = 120
  for kind in scores.SHARES:
    console.print(_ratios(result, kind))
  console.print(_rates(result))
  for workload in result["wall"]:
    console.print(_wall(result, workload))
  tried = [f"{name} {n}" for name, n in result["settings_tried"].items()]
  console.print("settings tried: " + ", ".join(tried), markup=False)


def _ratios(result: dict[str, Any], kind: str) -> Table:
  keys = [key for key in result["targets"] if key.endswith(f"/{kind}")]
  heads = [key.partition("/")[0] for key in keys]
  table = _table(
    f"steps to the {kind} target / {scores.BASELINE}, tuned for each",
    [*heads, "geo. mean", "worst", "missed", "profile"],
  )
  for name, found in result["candidates"].items():
    cells, totals = found["cells"], found[kind]
    table.add_row(
      name,
      *(_ratio(cells[key]["ratio"]) if key in cells else "" for key in keys),
      _ratio(totals["geometric_mean"]),
      _ratio(totals["worst"]),
      str(totals["missed"]),
      f"{result['profile']['scores'].get(name, math.nan):.3f}",
    )
  return table


def _rates(result: dict[str, Any]) -> Table:
  names = sorted({w for found in result["rates"].values() for w in found})
  table = _table(
    "decades of rate within twice the steps of the best (middle target)", names
  )
  for name, found in result["rates"].items():
    if found:
      shown = [
        f"{found[w]['decades']:.2f}" if w in found else "" for w in names
      ]
      table.add_row(name, *shown)
  return table


def _wall(result: dict[str, Any], workload: str) -> Table:
  table = _table(
    f"{workload}: time / {scores.BASELINE} "
    f"({result['times'][workload]['verdict']})",
    ["a step", "to middle", "to tight", "pays from x batch"],
  )
  for name, row in result["wall"][workload].items():
    pays = row.get("pays_from")
    shown = [_ratio(row["middle"]), _ratio(row["tight"])]
    table.add_row(
      name, _ratio(row["step"]), *shown, f"{pays:.3g}" if pays else "not seen"
    )
  return table


def _table(title: str, heads: Iterable[str]) -> Table:
  table = Table(title=title)
  table.add_column("")
  for head in heads:
    table.add_column(head, justify="right")
  return table


def _ratio(value: float | None) -> str:
  return "missed" if value is None else f"{value:.2f}"
