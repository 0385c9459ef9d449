"""The run directory: what a run writes beside its checkpoints, as plain data.

    RUN/run.json         what was asked for; written once, before the first step
    RUN/metrics.jsonl    one line a log point or evaluation
    RUN/checkpoints/     see train/checkpoint.py
    RUN/predictions.npz  the best weights' answers on the test split
    RUN/result.json      how the run ended; `complete` is false when it was cut
    RUN/report.html      see train/report

Nothing here is code, and nothing read from here is executed. Of several
processes, the first alone writes; where it fails, all do.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import sys
from collections.abc import Mapping
from typing import Any

import filelock
import jax
import numpy as np

from deepseek_jax.train.processes import is_first, of_first

FORMAT = 1
_PACKAGES = (
  "deepseek-jax",
  "jax",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
)


class RunDirectory:
  """A directory that belongs to one run.

  Args:
    path: Missing, empty, or an earlier start of the same run.
    identity: What makes two runs the same: arguments, schema, parameters and
      configuration, as plain JSON.

  Raises:
    ValueError: If the directory holds something else, a run that was asked for
      something else, or one that another process is working on. Nothing but an
      empty lock file is written then.
  """

  def __init__(self, path: str | os.PathLike, identity: Mapping[str, Any]):
    self.path = pathlib.Path(path)
    identity = json.loads(_dumps(identity))
    self._asked = {name: identity[name] for name in ("arguments", "config")}
    self._lock = filelock.FileLock(self.path / ".lock")
    of_first(lambda: self._open(identity))

  def _open(self, identity: Mapping[str, Any]) -> None:
    """Makes the directory, or finds an earlier start of the same run."""
    if self.path.exists() and not self.path.is_dir():
      raise ValueError(
        f"workdir must be a directory, got the file {self.path}."
      )
    try:
      names = os.listdir(self.path) if self.path.exists() else []
    except OSError as error:
      raise ValueError(
        f"workdir must be readable, got {self.path}: {error.strerror}."
      ) from error
    foreign = set(names) - {"run.json", "run.json.partial", ".lock"}
    if "run.json" not in names and foreign:
      raise ValueError(
        f"workdir must be missing, empty or a run of this library, got "
        f"{self.path}, which holds {sorted(foreign)[0]!r} and no run.json."
      )
    self.path.mkdir(parents=True, exist_ok=True)
    try:
      self._lock.acquire(timeout=0)
    except filelock.Timeout as error:
      raise ValueError(
        f"workdir {self.path} is in use by another process; wait for it, or "
        "give another workdir."
      ) from error
    try:
      if "run.json" in names:
        _check_same(self.path, identity)
      else:
        record = {"format": FORMAT, **identity, "environment": environment()}
        write_json(self.path / "run.json", record)
    except BaseException:
      self.close()
      raise

  def close(self) -> None:
    """Lets other processes have the directory."""
    self._lock.release()

  @property
  def checkpoints(self) -> pathlib.Path:
    """Where checkpoints go."""
    return self.path / "checkpoints"

  def result(self) -> dict[str, Any] | None:
    """Returns what an earlier start wrote at its end, or None.

    Raises:
      ValueError: If it is damaged.
    """
    return of_first(self._result)

  def _result(self) -> dict[str, Any] | None:
    path = self.path / "result.json"
    if not path.exists():
      return None
    result = read_json(path)
    if not isinstance(result, dict) or "complete" not in result:
      raise ValueError(
        f"{path} is damaged; remove it, and the run goes on from its latest "
        "checkpoint."
      )
    return result

  def write_result(self, result: Mapping[str, Any]) -> None:
    """Writes result.json, with settings and versions, whole or not at all."""
    if not is_first():
      return
    record = {**result, **self._asked, "versions": versions()}
    write_json(self.path / "result.json", record)

  def append(self, record: Mapping[str, Any]) -> None:
    """Adds a line to metrics.jsonl."""
    if not is_first():
      return
    path = self.path / "metrics.jsonl"
    with _named(path), path.open("a") as file:
      file.write(_dumps(record) + "\n")

  def history(self, up_to: int | None = None) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl.

    Args:
      up_to: Drops records of later steps from the file too: a run that goes on
        from a checkpoint writes them again.
    """
    return of_first(lambda: self._history(up_to))

  def _history(self, up_to: int | None) -> list[dict[str, Any]]:
    path = self.path / "metrics.jsonl"
    if not path.exists():
      return []
    records = []
    lines = path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
      record = _record(line)
      if record is not None:
        records.append(record)
      elif number < len(lines):
        raise ValueError(
          f"{path} is damaged in line {number}; remove the line."
        )
      # Else the line at which the process was killed.
    if up_to is not None:
      records = [r for r in records if r["step"] <= up_to]
      text = "".join(_dumps(record) + "\n" for record in records)
      _replace(path, text)
    return records


def _record(line: str) -> dict[str, Any] | None:
  """Returns what a line of metrics.jsonl says, or None if it is damaged."""
  try:
    record = json.loads(line)
  except ValueError:
    return None
  return record if isinstance(record, dict) and "step" in record else None


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON to a file that is either the old or the new one, never half."""
  _replace(path, _dumps(value, indent=2) + "\n")


def read_json(path: pathlib.Path) -> Any:
  """Reads JSON.

  Raises:
    ValueError: If the file is missing, unreadable or not JSON; names it.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}.") from error


def versions() -> dict[str, str]:
  """Returns the versions that decide a run's numbers."""
  found = {"python": platform.python_version()}
  for package in _PACKAGES:
    found[package] = importlib.metadata.version(package)
  return found


def environment() -> dict[str, Any]:
  """Returns where a run runs, without names of hosts or users."""
  return {
    "platform": platform.platform(),
    "cpu_count": os.cpu_count(),
    "devices": [device.device_kind for device in jax.devices()],
    "processes": jax.process_count(),
  }


def peak_memory_bytes() -> int:
  """Returns the peak of the process' memory, or of the device's if it tells."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return int(stats["peak_bytes_in_use"])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def _check_same(path: pathlib.Path, identity: Mapping[str, Any]) -> None:
  """Raises when the run in `path` was asked for something else."""
  found = read_json(path / "run.json")
  if not isinstance(found, dict) or found.get("format") != FORMAT:
    raise ValueError(
      f"{path / 'run.json'} must have format {FORMAT}, got "
      f"{found.get('format') if isinstance(found, dict) else type(found)}: it "
      "is not a run of this version."
    )
  try:
    lines = _differences(_by_path(found), _by_path(identity), "")
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path / 'run.json'} is damaged; give another workdir."
    ) from error
  if lines:
    shown = "".join(f"\n  {line}" for line in lines[:20])
    more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
    raise ValueError(
      f"workdir {path} holds another run:{shown}{more}\nGive another workdir, "
      "or the same settings to go on with it."
    )


def _by_path(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what makes a run the same, parameters keyed by their path."""
  parameters = {
    p["path"]: f"{p['dtype']}{p['shape']}" for p in record["parameters"]
  }
  ignored = ("format", "environment", "parameters")
  rest = {key: record[key] for key in record.keys() - set(ignored)}
  return {**rest, "parameters": parameters}


def _differences(old: Any, new: Any, name: str) -> list[str]:
  """Lists what differs between two JSON values, by dotted name."""
  if isinstance(old, dict) and isinstance(new, dict):
    return [
      line
      for key in sorted(old.keys() | new.keys())
      for line in _differences(
        old.get(key), new.get(key), f"{name}.{key}".lstrip(".")
      )
    ]
  return [] if old == new else [f"{name} was {old!r}, now {new!r}"]


def _dumps(value: Any, indent: int | None = None) -> str:
  return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
  """Returns JSON's types, with null for numbers that JSON does not have."""
  if isinstance(value, Mapping):
    return {str(key): _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


@contextlib.contextmanager
def _named(path: pathlib.Path):
  """Puts the file's name into the error of a failed write."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error


def _replace(path: pathlib.Path, text: str) -> None:
  partial = path.with_name(path.name + ".partial")
  with _named(path), partial.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  partial.replace(path)
