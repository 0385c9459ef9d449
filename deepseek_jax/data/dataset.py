"""A data set: three splits that can be read at any index, and their schema."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from deepseek_jax.data.schema import Schema

Columns = dict[str, np.ndarray]
Indices = int | slice | Sequence[int] | np.ndarray


@runtime_checkable
class Reader(Protocol):
  """Something that reads the examples at any indices."""

  def __len__(self) -> int:
    """Returns how many examples there are."""
    ...

  def take(self, indices: np.ndarray) -> Columns:
    """Returns the stored columns at `indices`."""
    ...


class ArrayReader:
  """Columns in memory: the fastest reader, for data that fits."""

  def __init__(self, columns: Mapping[str, np.ndarray]):
    """Holds `columns`, by feature name."""
    # One contiguous block a column, so that a gather runs at memory speed.
    self.columns = {
      name: np.ascontiguousarray(column) for name, column in columns.items()
    }

  def __len__(self) -> int:
    """Returns how many examples there are."""
    return len(next(iter(self.columns.values())))

  def take(self, indices: np.ndarray) -> Columns:
    """Gathers the rows at `indices`, without a Python loop over them."""
    # The method takes a quarter of the time of `column[indices]`.
    return {
      name: column.take(indices, axis=0)
      for name, column in self.columns.items()
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """A random-access view of examples, as they are stored.

  Attributes:
    name: "train", "validation" or "test".
    schema: What the columns mean.
    reader: What reads them.

  >>> import deepseek_jax as dj
  >>> split = dj.data.load("digits").validation
  >>> len(split), split[:2]["image"].shape, split[[5, 7, 5]]["label"].dtype
  (180, (2, 8, 8, 1), dtype('int64'))
  """

  name: str
  schema: Schema
  reader: Reader

  def __len__(self) -> int:
    """Returns how many examples there are."""
    return len(self.reader)

  def take(self, indices: Sequence[int] | np.ndarray) -> Columns:
    """Returns the stored columns at `indices`.

    Args:
      indices: Integers in [0, len(split)), in any order, repeats allowed.

    Returns:
      For each feature an array whose first axis follows `indices`.

    Raises:
      IndexError: If an index is out of range.
    """
    return self.reader.take(np.asarray(indices))

  def __getitem__(self, indices: Indices) -> Columns:
    """Returns the stored columns at an index, a slice or a list of them."""
    return self.take(np.asarray(np.arange(len(self))[indices]))

  def thinned(self, size: int) -> "Split":
    """Returns so many examples of this split, evenly spaced.

    Args:
      size: In [1, len(split)].

    Raises:
      ValueError: If the size is out of its range.
    """
    if not 1 <= size <= len(self):
      raise ValueError(f"size must be in [1, {len(self)}], got {size=}.")
    chosen = np.arange(size) * len(self) // size
    return dataclasses.replace(self, reader=_Part(self.reader, chosen))


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
  """Some of the examples of a reader."""

  reader: Reader
  chosen: np.ndarray

  def __len__(self) -> int:
    return len(self.chosen)

  def take(self, indices: np.ndarray) -> Columns:
    return self.reader.take(self.chosen[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Three disjoint splits of one schema.

  Attributes:
    name: What `load` was asked for.
    schema: What the columns mean.
    train: The examples to learn from.
    validation: The examples that decide when to stop and which weights to keep.
    test: The examples that are looked at once.
  """

  name: str
  schema: Schema
  train: Split
  validation: Split
  test: Split
