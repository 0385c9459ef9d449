"""Reads a prepared TFDS data set: its splits and their columns."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deepseek_jax.data.dataset import ArrayReader, Columns, Dataset, Split
from deepseek_jax.data.features import schema_of
from deepseek_jax.data.prepared import damaged
from deepseek_jax.data.quality import check_columns
from deepseek_jax.data.schema import Schema

_CHUNK = 1024  # Examples decoded at a time: bounds the memory beside columns.


def read(
  name: str,
  builder: tfds.core.DatasetBuilder,
  *,
  inputs: Sequence[str] | None,
  target: str | None,
  splits: Mapping[str, str] | None,
  memory_limit: int,
) -> Dataset:
  """Returns the data set a builder has prepared.

  Args:
    name: The name the data set shall have.
    builder: A builder whose data is in place.
    inputs: The features to read; `None` takes the builder's supervised keys.
    target: The feature to predict; `None` takes the builder's.
    splits: A TFDS split for each of "train", "validation" and "test"; `None`
      applies `default_splits`.
    memory_limit: The most bytes a split's columns may take to be held.

  Returns:
    The data set, checked as far as it was read.

  Raises:
    ValueError: If the features do not suit, or the files cannot be read.
  """
  sources = open_splits(builder, splits)
  schema = schema_of(
    builder.info, _example(sources, builder), inputs=inputs, target=target
  )
  return Dataset(
    name=name,
    schema=schema,
    **{
      split: Split(
        split,
        schema,
        _reader(RecordReader(split, source, schema), schema, memory_limit),
      )
      for split, source in sources.items()
    },
  )


def default_splits(available: Collection[str]) -> dict[str, str]:
  """Returns the TFDS split for each of ours, cutting what is missing off train.

  TFDS stores examples in the order of a hash of their keys, so the end of the
  training split is a fixed random sample of it.

  Args:
    available: The names of the data set's own splits.

  Returns:
    The data set's own splits where it has them; otherwise the last 10 % of
    "train" validate, and if that is missing too, the 10 % before them test.

  Raises:
    ValueError: If there is no "train".

  >>> default_splits(["train", "test"])["validation"]
  'train[90%:]'
  >>> default_splits(["train"])["test"]
  'train[80%:90%]'
  """
  if "train" not in available:
    raise ValueError(
      "splits must be given for a data set without a 'train' split, it has "
      f"{sorted(available)}."
    )
  names = {"train": "train", "validation": "validation", "test": "test"}
  missing = [name for name in ("validation", "test") if name not in available]
  tails = ["train[90%:]", "train[80%:90%]"]
  names.update(zip(missing, tails, strict=False))
  if missing:
    names["train"] = f"train[:{100 - 10 * len(missing)}%]"
  return names


class RecordReader:
  """Reads and decodes examples from the files whenever they are asked for."""

  def __init__(self, split: str, source: Any, schema: Schema):
    """Reads the features of `schema` from a TFDS data source.

    Args:
      split: The split's name, for messages.
      source: What `as_data_source` returned.
      schema: Which features to keep, and what they should be.
    """
    self._split = split
    self._source = source
    self._schema = schema

  def __len__(self) -> int:
    """Returns how many examples there are."""
    return len(self._source)

  def take(self, indices: np.ndarray) -> Columns:
    """Decodes and checks the examples at `indices`."""
    rows = np.atleast_1d(indices)
    try:
      examples = self._source.__getitems__([int(row) for row in rows])
    except Exception as error:
      path = self._source.dataset_info.data_dir
      raise ValueError(damaged(path, error)) from error
    columns = {
      name: self._column(name, examples, rows) for name in self._schema.features
    }
    check_columns(columns, self._schema, split=self._split, indices=rows)
    if np.ndim(indices) == 0:
      return {name: column[0] for name, column in columns.items()}
    return columns

  def _column(
    self, name: str, examples: Sequence[Mapping[str, Any]], rows: np.ndarray
  ) -> np.ndarray:
    feature = self._schema.features[name]
    column = np.empty((len(rows), *feature.shape), feature.dtype)
    for place, example in enumerate(examples):
      value = np.asarray(example[name])
      if value.shape != feature.shape:
        raise ValueError(
          f"{self._split}: {name!r} must have one shape in all examples, got "
          f"{value.shape} at example {rows[place]} and {feature.shape} before; "
          "resize when preparing."
        )
      column[place] = value
    return column


def open_splits(
  builder: tfds.core.DatasetBuilder, splits: Mapping[str, str] | None
) -> dict[str, Any]:
  """Returns a TFDS data source for each of our three splits.

  Args:
    builder: A builder whose data is in place.
    splits: As `read`.

  Raises:
    ValueError: If a split is unknown or empty, or cannot be read.
  """
  path, available = builder.data_path, builder.info.splits
  if not available:
    raise ValueError(damaged(path, ValueError("no splits are recorded")))
  names = splits or default_splits(available)
  sources = {}
  for split in ("train", "validation", "test"):
    try:
      num_examples = available[names[split]].num_examples
    except Exception as error:  # TFDS raises several types.
      raise ValueError(
        "splits must give 'train', 'validation' and 'test' a part of "
        f"{sorted(available)} such as 'train[:80%]', got {names}."
      ) from error
    if not num_examples:
      raise ValueError(
        f"{split}: a split must hold at least one example, "
        f"{names[split]!r} of {builder.info.full_name} holds 0."
      )
    try:
      sources[split] = builder.as_data_source(names[split])
    except NotImplementedError as error:
      raise ValueError(
        f"the data set in {path} is stored as {builder.info.file_format}, "
        "which cannot be read at any index; prepare it with "
        "`tfds build --file_format=array_record` into another directory."
      ) from error
    except Exception as error:
      raise ValueError(damaged(path, error)) from error
  return sources


def _example(
  sources: Mapping[str, Any], builder: tfds.core.DatasetBuilder
) -> Mapping[str, Any]:
  try:
    return sources["train"][0]
  except Exception as error:
    raise ValueError(damaged(builder.data_path, error)) from error


def _reader(
  records: RecordReader, schema: Schema, memory_limit: int
) -> RecordReader | ArrayReader:
  """Returns the columns in memory if they fit, or else the records."""
  size = len(records) * sum(
    math.prod(feature.shape) * np.dtype(feature.dtype).itemsize
    for feature in schema.features.values()
  )
  if size > memory_limit:
    return records
  columns = {
    name: np.empty((len(records), *feature.shape), feature.dtype)
    for name, feature in schema.features.items()
  }
  for start in range(0, len(records), _CHUNK):
    chunk = np.arange(start, min(start + _CHUNK, len(records)))
    for name, column in records.take(chunk).items():
      columns[name][chunk] = column
  return ArrayReader(columns)
