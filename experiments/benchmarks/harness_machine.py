"""The machine a benchmark ran on: what it is, how fast, and how busy."""

import importlib.metadata
import os
import pathlib
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "deepseek-jax")
_ORDER = 768  # Of the matrix product: some ten milliseconds.


def matmul_speed(repeats: int = 9) -> float:
  """Returns GFLOP/s of a float32 matrix product on all cores, the median."""
  matrix = np.random.default_rng(0).random((_ORDER, _ORDER), np.float32)
  matrix @ matrix  # The first call starts the threads.
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    matrix @ matrix
    seconds.append(time.perf_counter() - start)
  return float(2 * _ORDER**3 / np.median(seconds) / 1e9)


def doubt(load: float, number: int, *, limit: float = 1.0) -> str | None:
  """Says why timings under this load are not to be judged, or None.

  >>> doubt(3.1, 2)
  'not judged: load 3.1 on 2 cores'
  >>> doubt(1.9, 2) is None
  True
  """
  if load <= limit * number:
    return None
  return f"not judged: load {load:.1f} on {number} cores"


def hardware() -> dict[str, Any]:
  """Describes the machine without its name or any path."""
  found: dict[str, Any] = {
    "system": platform.system(),
    "machine": platform.machine(),
    "cores": cores(),
  }
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    lines = info.read_text().splitlines()
    models = [line for line in lines if line.startswith("model name")]
    found["processor"] = models[0].partition(":")[2].strip() if models else ""
  if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["memory_gib"] = round(size / 2**30, 1)
  if "jax" in sys.modules:
    devices = sys.modules["jax"].devices()
    found["devices"] = [device.device_kind for device in devices]
  return found


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
  """Versions of Python and of those `packages` that are installed."""
  found = {"python": platform.python_version()}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def command() -> str:
  """The command line, of its paths only the last part."""
  return " ".join(["python", *(pathlib.Path(a).name for a in sys.argv)])
