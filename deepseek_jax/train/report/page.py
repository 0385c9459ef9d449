"""One HTML page that tells what a run did."""

import importlib.resources
import math
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from deepseek_jax.train.report import figures, predictions, writing
from deepseek_jax.train.report import html as page
from deepseek_jax.train.report.rates import group_rates
from deepseek_jax.train.report.run import Run, read_run

# Should a text ever escape its escaping, the browser still runs and loads
# nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_ENDINGS = {"early stopping": "good", "epochs": "good", "steps": "good"}
_OPEN_ROWS = 30  # Longer parameter tables are folded.


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes `report.html` into a run directory, from what the run left there.

  The page stands alone: styles, figures and pictures are inside it, and it
  runs and loads nothing. It shows headline numbers, loss and other curves,
  learning rates, confusion matrix and calibration (or predicted against true
  values for regression), the worst mistakes, parameters, configuration and
  environment. The files are read as data; equal files give equal bytes. A run
  that has not ended yet gets the parts that exist. An earlier report is
  replaced only by a whole new one.

  Args:
    workdir: a run directory: `run.json`, and where they exist
      `metrics.jsonl`, `result.json` and `predictions.npz`.

  Returns:
    The path of the report.

  Raises:
    ValueError: `workdir` is not a run directory, or a file in it is damaged or
      of a newer format; the message names the file and the line.

  >>> import json, tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = pathlib.Path(folder, "run.json")
  ...   _ = path.write_text(json.dumps({"format": 1}))
  ...   write_report(folder).name
  'report.html'
  """
  content = _page(read_run(workdir))
  target = pathlib.Path(workdir) / "report.html"
  handle, name = tempfile.mkstemp(".tmp", ".report-", target.parent)
  try:
    with open(handle, "w", encoding="utf-8", newline="\n") as file:
      file.write(content)
    os.chmod(name, 0o644)  # mkstemp lets nobody else read.
    os.replace(name, target)
  except BaseException:
    pathlib.Path(name).unlink(missing_ok=True)
    raise
  return target


def _page(run: Run) -> str:
  style = importlib.resources.files("deepseek_jax.train.report").joinpath(
    "style.css"
  )
  body = "\n".join(
    (
      _header(run),
      _training(run),
      predictions.sections(run),
      writing.sections(run),
      _parameters(run.description.get("parameters") or []),
      _settings(run),
    )
  )
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{page.text(run.name)}</title>"
    f"<style>\n{style.read_text('utf-8')}</style></head>\n"
    f"<body><main>{body}</main></body></html>\n"
  )


def _header(run: Run) -> str:
  schema = run.description.get("schema") or {}
  data = run.description.get("data") or schema.get("name") or "unnamed data"
  subject = page.text(data)
  subject = f'<p class="muted">A training run on {subject}.</p>'
  if run.result is None:
    status, kind = "unfinished", "warn"
    note = '<p class="warn">No result.json yet: this run has not ended.</p>'
  else:
    status = str(run.result.get("ended_by", "ended"))
    kind, note = _ENDINGS.get(status, "warn"), ""
    kind = "bad" if status.startswith("non-finite") else kind
    if run.result.get("complete") is False:
      note = '<p class="warn">Cut before its end: start it again to go on.</p>'
  tiles = "".join(
    f"<div><dt>{page.text(name)}</dt><dd>{value}</dd></div>"
    for name, value in _headlines(run)
  )
  return (
    f"<header><h1>{page.text(run.name)} "
    f'<span class="status {kind}">{page.text(status)}</span></h1>'
    f'{subject}{note}<dl class="tiles">{tiles}</dl></header>'
  )


def _headlines(run: Run) -> list[tuple[str, str]]:
  """Names and values of the tiles: quality first, then what it took."""
  result = run.result or {}
  rows = _final_metrics(run)
  steps = page.number(result.get("steps", _last_step(run)))
  if result.get("best_step") is not None:
    best = f"{page.number(result['best_step'])}<small> of {steps}</small>"
    rows.append(("best step", best))
  else:
    rows.append(("steps", steps))
  if result.get("wall_seconds") is not None:
    rows.append(("wall time", page.duration(result["wall_seconds"])))
  if result.get("peak_memory_bytes"):
    rows.append(("peak memory", page.size(result["peak_memory_bytes"])))
  parameters = run.description.get("parameters") or []
  if parameters:
    rows.append(("parameters", f"{sum(map(_count, parameters)):,}"))
  return rows


def _final_metrics(run: Run) -> list[tuple[str, str]]:
  """The result's metrics or, before there is one, those logged last."""
  if run.result is not None:
    metrics, prefix = run.result.get("metrics") or {}, ""
  else:
    logged = {key: s.values for key, s in run.metrics.items() if "/" in key}
    metrics = {key: float(values[-1]) for key, values in logged.items()}
    prefix = "last "
  rows = []
  for key in sorted(metrics, key=_metric_order):
    title = prefix + key.replace("/", " ").replace("_", " ")
    rows.append((title, _metric(key, metrics[key])))
  return rows


def _metric(key: str, value: Any) -> str:
  """An accuracy in percent, any other metric as a short number."""
  is_finite = isinstance(value, int | float) and math.isfinite(value)
  is_share = key.endswith("accuracy") and is_finite
  return page.percent(value) if is_share else page.number(value)


def _metric_order(key: str) -> tuple[int, int, str]:
  """Test before validation before training, accuracy first and loss next."""
  split, _, name = key.rpartition("/")
  splits, names = ("test", "validation", "train"), ("accuracy", "loss")
  return (
    splits.index(split) if split in splits else len(splits),
    names.index(name) if name in names else len(names),
    name,
  )


def _last_step(run: Run) -> int:
  ends = [series.steps[-1] for series in run.metrics.values()]
  return int(max(ends, default=0))


def _training(run: Run) -> str:
  """Curves of every logged quantity, of the learning rates and the speed."""
  if not run.metrics:
    return '<h2>Training</h2><p class="muted">Nothing was logged yet.</p>'
  best = (run.result or {}).get("best_step")
  names = {
    key.partition("/")[2]
    for key, line in run.metrics.items()
    if "/" in key and line.values.any()  # No picture of steps never skipped.
  }
  first = ("loss", "accuracy")
  ordered = [n for n in first if n in names] + sorted(names.difference(first))
  cards = [_curve_card(run, name, best) for name in ordered]
  if run.rates:
    groups = group_rates(run.rates)
    note = f"<small>{len(groups)} distinct</small>" if len(groups) > 1 else ""
    cards.append(
      page.figure("Learning rate", figures.learning_rates(groups), [note])
    )
  speed = run.metrics.get("steps_per_second")
  if speed is not None:
    typical = f"<span>median {page.number(_median(speed.values))}</span>"
    svg = figures.curves("Steps per second", {"": speed})
    cards.append(page.figure("Steps per second", svg, [typical]))
  return f"<h2>Training</h2>{page.grid(cards)}"


def _curve_card(run: Run, name: str, best: int | float | None) -> str:
  """Train and validation of one quantity, with their values in the title."""
  splits = sorted(
    (
      key.partition("/")[0]
      for key in run.metrics
      if key.partition("/")[2] == name
    ),
    key=lambda split: (split != "train", split),
  )
  series = {split: run.metrics[f"{split}/{name}"] for split in splits}
  notes, missing = [], 0
  for i, (split, line) in enumerate(series.items()):
    missing += int(np.isnan(line.values).sum())
    at_best = line.values[line.steps == best] if split != "train" else []
    value, where = (
      (at_best[0], " at best") if len(at_best) else (line.values[-1], "")
    )
    notes.append(
      f'<span style="color:var(--hue-{i})">{page.text(split)} '
      f"{_metric(name, float(value))}{where}</span>"
    )
  if missing:
    notes.append(f'<span class="bad">{missing} not finite</span>')
  title = page.printable(name).replace("_", " ").capitalize()
  return page.figure(title, figures.curves(title, series, best), notes)


def _median(values: np.ndarray) -> float:
  finite = values[np.isfinite(values)]
  return float(np.median(finite)) if len(finite) else math.nan


def _count(parameter: dict[str, Any]) -> int:
  return math.prod(parameter["shape"])


def _parameters(rows: list[dict[str, Any]]) -> str:
  if not rows:
    return ""
  total = max(sum(map(_count, rows)), 1)
  largest = max(max(map(_count, rows)), 1)
  cells = [
    (
      f"<code>{page.text(row['path'])}</code>",
      page.bar(_count(row) / largest),
      " \u00d7 ".join(map(str, row["shape"])) or "scalar",
      page.text(row["dtype"]),
      f"{_count(row):,}",
      page.percent(_count(row) / total),
    )
    for row in rows
  ]
  head = ("parameter", "", "shape", "type", "count", "share")
  content = page.table(head, cells, numeric=4)
  if len(rows) > _OPEN_ROWS:
    content = page.folded(f"{len(rows)} parameters", content)
  return f'<h2>Parameters</h2><div class="card">{content}</div>'


def _settings(run: Run) -> str:
  """How to have this run again."""
  titles = ("config", "arguments", "environment", "versions", "schema")
  names = ("Configuration", "Arguments", "Environment", "Versions", "Data")
  written = {**(run.result or {}), **run.description}
  cards = [
    page.settings(name, written.get(title))
    for name, title in zip(names, titles, strict=True)
  ]
  return f"<h2>Settings</h2>{page.grid(filter(None, cards))}"
