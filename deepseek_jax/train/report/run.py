"""What a run directory says, read as data and checked before it is drawn."""

import dataclasses
import json
import math
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

FORMAT = 1
# Lines of learning rates kept: they change slowly, and there is one for each
# parameter on every line of a long run.
_RATE_POINTS = 240
# Damage shows in many ways: a torn archive, a pickled array, a missing member.
_DAMAGE = (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile)


@dataclasses.dataclass(frozen=True)
class Series:
  """Values over steps; a value that was not finite is NaN."""

  steps: np.ndarray
  values: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
  """The model's answers on the test split.

  Let N be examples, K classes (of a regression: outputs), M pictures.

  Attributes:
    labels: int [N], class indices; for regression float [N, K], true values.
    logits: float32 [N, K], finite.
    index: [N], each example's place in its split.
    worst: [M], positions into the three above.
    images: float [M, H, W, C] in 0..1, or None for data without pictures.
    non_finite: how many examples had a logit that was not finite.
  """

  labels: np.ndarray
  logits: np.ndarray
  index: np.ndarray
  worst: np.ndarray
  images: np.ndarray | None
  non_finite: int

  @property
  def is_regression(self) -> bool:
    """Whether a prediction is a number rather than a class."""
    return self.labels.ndim == 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One run directory.

  Attributes:
    name: the directory's own name.
    description: what `run.json` holds.
    metrics: one series a logged key, such as "train/loss".
    rates: one series of learning rates a parameter path; may be empty.
    result: what `result.json` holds; None while the run is unfinished.
    predictions: None when the run wrote none.
    writing: what `text.json` holds; None where there is no language model.
  """

  name: str
  description: dict[str, Any]
  metrics: dict[str, Series]
  rates: dict[str, Series]
  result: dict[str, Any] | None
  predictions: Predictions | None
  writing: dict[str, Any] | None = None

  @property
  def class_names(self) -> list[str]:
    """Names of the target's classes; empty when the schema has none."""
    schema = _table(self.description, "schema")
    target = _table(_table(schema, "features"), str(schema.get("target")))
    names = target.get("class_names") or target.get("names")
    return [str(name) for name in names] if isinstance(names, list) else []


def read_run(workdir: str | os.PathLike) -> Run:
  """Reads a run directory; executes nothing and unpickles nothing.

  Args:
    workdir: a directory with `run.json`; the other files may be absent.

  Returns:
    What was found there.

  Raises:
    ValueError: not a run directory, a file of a newer format, or a damaged
      file; the message names the file and, for `metrics.jsonl`, the line.
  """
  folder = pathlib.Path(workdir).resolve()
  if not (folder / "run.json").is_file():
    raise ValueError(
      f"workdir must be a run directory (one with a run.json), got {workdir=}."
    )
  description = _read_json(folder / "run.json")
  version = description.get("format")
  if version != FORMAT:
    is_newer = isinstance(version, int) and version > FORMAT
    remedy = " This run needs a newer deepseek_jax." if is_newer else ""
    raise ValueError(
      f"run.json must have format {FORMAT}, got format={version!r}.{remedy}"
    )
  _check_parameters(description.get("parameters", []))
  rows = _read_metrics(folder / "metrics.jsonl")
  result = folder / "result.json"
  predictions = folder / "predictions.npz"
  writing = folder / "text.json"
  return Run(
    name=folder.name,
    description=description,
    metrics=_metric_series(rows),
    rates=_rate_series(rows),
    result=_read_json(result) if result.exists() else None,
    predictions=_read_predictions(predictions)
    if predictions.exists()
    else None,
    writing=_read_writing(writing) if writing.exists() else None,
  )


def _table(parent: dict[str, Any], key: str) -> dict[str, Any]:
  """The dictionary under `key`, or an empty one."""
  child = parent.get(key)
  return child if isinstance(child, dict) else {}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_bytes())
  except (ValueError, OSError, RecursionError) as error:
    raise ValueError(f"{path.name} must be readable JSON: {error}.") from error
  if not isinstance(content, dict):
    raise ValueError(
      f"{path.name} must hold one JSON object, got {type(content).__name__}."
    )
  return content


def _read_writing(path: pathlib.Path) -> dict[str, Any]:
  found = _read_json(path)
  bits, samples = found.get("compressors"), found.get("samples")
  fits = isinstance(bits, dict) and isinstance(samples, list)
  if not fits or not (
    all(isinstance(value, int | float) for value in bits.values())
    and all(
      isinstance(sample, dict) and {"prompt", "text"} <= sample.keys()
      for sample in samples
    )
  ):
    raise ValueError(
      f"{path.name} must hold compressors' bits per byte and samples, each a "
      f"prompt and a text, got {str(found)[:80]}."
    )
  return found


def _check_parameters(rows: Any) -> None:
  for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
    shape = row.get("shape") if isinstance(row, dict) else None
    if not (
      isinstance(shape, list)
      and all(isinstance(size, int) for size in shape)
      and {"path", "dtype"} <= row.keys()
    ):
      raise ValueError(
        f"run.json parameters[{i}] must have path, shape and dtype, got {row}."
      )


def _read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Rows in the order of their steps, one a step, later lines winning.

  A resumed run logs again the steps between its checkpoint and the kill.
  """
  if not path.exists():
    return []
  lines = path.read_bytes().split(b"\n")
  by_step: dict[float, dict[str, Any]] = {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    row = _parse_row(line)
    if row is not None:
      by_step.setdefault(row["step"], {}).update(row)
    elif number < len(lines):  # A torn last line has no newline: not damage.
      raise ValueError(
        f"{path.name} line {number} must be a JSON object with a step, got "
        f"{line[:60]!r}."
      )
  return [by_step[step] for step in sorted(by_step)]


def _parse_row(line: bytes) -> dict[str, Any] | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  step = row.get("step") if isinstance(row, dict) else None
  return row if isinstance(step, int | float) else None


def _number(value: Any) -> float:
  """`value` where it is a finite number, else NaN."""
  is_number = isinstance(value, int | float) and math.isfinite(value)
  return float(value) if is_number else math.nan


def _series(rows: list[dict[str, Any]], key: str) -> Series:
  found = [(row["step"], _number(row[key])) for row in rows if key in row]
  return Series(*np.array(found, np.float64).T)


def _metric_series(rows: list[dict[str, Any]]) -> dict[str, Series]:
  keys = {
    key
    for row in rows
    for key, value in row.items()
    if value is None or isinstance(value, int | float)
  }
  keys -= {"step", "learning_rate"}
  return {key: _series(rows, key) for key in sorted(keys)}


def _rate_series(rows: list[dict[str, Any]]) -> dict[str, Series]:
  rows = [row for row in rows if isinstance(row.get("learning_rate"), dict)]
  if len(rows) > _RATE_POINTS:
    kept = np.linspace(0, len(rows) - 1, _RATE_POINTS).astype(int)
    rows = [rows[i] for i in kept]
  paths = {path: None for row in rows for path in row["learning_rate"]}
  flat = [{**row["learning_rate"], "step": row["step"]} for row in rows]
  return {path: _series(flat, path) for path in paths}


def _read_predictions(path: pathlib.Path) -> Predictions:
  try:
    # NumPy leaves a file of its own open when the archive is torn.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
      arrays = {name: archive[name] for name in archive.files}
    return _check_predictions(arrays)
  except _DAMAGE as error:
    raise ValueError(f"{path.name} must be readable: {error}.") from error


def _check_predictions(arrays: dict[str, np.ndarray]) -> Predictions:
  labels, logits = arrays["labels"], arrays["logits"].astype(np.float32)
  logits = logits.reshape(len(logits), -1)
  index = arrays.get("index", np.arange(len(labels)))
  worst = arrays.get("worst", np.zeros(0, int))
  images = arrays.get("worst_images")
  if logits.shape[1] == 1 or labels.dtype.kind == "f":
    labels = labels.reshape(len(labels), -1).astype(np.float64)
  if not len(labels) == len(logits) == len(index) > 0:
    raise ValueError(
      "labels, logits and index must have one length above zero, got "
      f"{len(labels)}, {len(logits)} and {len(index)}"
    )
  classes = logits.shape[1]
  if labels.ndim == 2 and labels.shape != logits.shape:
    raise ValueError(
      f"float labels must have the shape {logits.shape}, got {labels.shape}"
    )
  if labels.ndim == 1 and not (labels.min() >= 0 and labels.max() < classes):
    raise ValueError(
      f"labels must be in [0, {classes}), got {labels.min()}..{labels.max()}"
    )
  if len(worst) and not (worst.min() >= 0 and worst.max() < len(labels)):
    raise ValueError(f"worst must be positions in [0, {len(labels)})")
  if images is not None and (len(images) != len(worst) or images.ndim < 3):
    raise ValueError(
      f"worst_images must be [{len(worst)}, H, W, C], got {images.shape}"
    )
  finite = np.isfinite(logits).all(axis=1)
  return Predictions(
    labels=labels,
    logits=np.nan_to_num(logits, nan=0.0),
    index=index,
    worst=worst,
    images=images,
    non_finite=int((~finite).sum()),
  )
