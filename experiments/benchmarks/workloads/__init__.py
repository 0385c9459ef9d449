"""Workloads of the optimizer benchmark: what is trained, all but the optimizer.

Every file of this folder that has no underscore in front is one workload: it
defines `WORKLOAD`. Adding a workload is adding a file.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent
Params = Any
Batch = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """A model, its data and its loss; the seed decides start and batch order.

  Attributes:
    name: the name of the file.
    steps: T, the budget of every optimizer.
    init: seed to parameters, nested dicts of arrays.
    batch: (seed, step) to a batch of NumPy arrays.
    loss: (params, batch) to a scalar, differentiable.
    validation_loss: params to a scalar over a split that no batch has seen.
  """

  name: str
  steps: int
  init: Callable[[int], Params]
  batch: Callable[[int, int], Batch]
  loss: Callable[[Params, Batch], Any]
  validation_loss: Callable[[Params], Any]


def names(folder: pathlib.Path = FOLDER) -> list[str]:
  """The workloads of a folder, in the order of the alphabet."""
  return sorted(
    path.stem
    for path in pathlib.Path(folder).glob("*.py")
    if not path.stem.startswith("_")
  )


def load(name: str, folder: pathlib.Path = FOLDER) -> Workload:
  """Imports one workload from its file.

  Raises:
    ValueError: there is no such file.
  """
  if name not in names(folder):
    raise ValueError(
      f"workload must be one of {', '.join(names(folder))}, got {name=}."
    )
  path = pathlib.Path(folder) / f"{name}.py"
  return imported(path).WORKLOAD


def imported(path: pathlib.Path) -> Any:
  """The module in a file, wherever that is.

  Raises:
    ValueError: there is no such Python file.
  """
  spec = importlib.util.spec_from_file_location(f"of_{path.stem}", path)
  if spec is None or spec.loader is None or not path.exists():
    raise ValueError(f"path must be that of a Python file, got {path=}.")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def rows(seed: int, step: int, total: int, size: int) -> np.ndarray:
  """Rows of the batch of a step: each row once an epoch, in shuffled order.

  Rows that do not fill the last batch of an epoch wait for the next one.
  """
  epoch, place = divmod(step, total // size)
  order = np.random.default_rng((seed, epoch)).permutation(total)
  return order[place * size : (place + 1) * size]
