"""Data sets from NumPy arrays that are already in memory."""

from collections.abc import Mapping, Sequence

import numpy as np

from deepseek_jax.data.dataset import ArrayReader, Dataset, Split
from deepseek_jax.data.quality import check_columns
from deepseek_jax.data.schema import Feature, Schema, unknown


def from_arrays(
  train: Mapping[str, np.ndarray],
  validation: Mapping[str, np.ndarray],
  test: Mapping[str, np.ndarray],
  *,
  inputs: Sequence[str],
  target: str,
  num_classes: int | None = None,
  class_names: Sequence[str] | None = None,
  ranges: Mapping[str, tuple[int | float, int | float]] | None = None,
  name: str = "arrays",
) -> Dataset:
  """Returns a data set of arrays, checked, without copying contiguous ones.

  An integer target is a label (classification), a float target a number
  (regression). An input of three dimensions beside the examples' is an image.

  Args:
    train: Column by feature name, examples along the first axis.
    validation: The same columns for the validation split.
    test: The same columns for the test split.
    inputs: The features a model reads.
    target: The feature a model predicts.
    num_classes: How many classes an integer target has; `None` is the number
      of `class_names`, or one more than the greatest label in `train`.
    class_names: The classes' names.
    ranges: Least and greatest stored value of integer features, which batches
      map to [0, 1]; unsigned 8-bit images have (0, 255) unless named here.
    name: The data set's name.

  Returns:
    The data set.

  Raises:
    ValueError: If a name is unknown or the data is bad, saying where.

  >>> x = np.linspace(0.0, 1.0, 30, dtype=np.float32).reshape(10, 3)
  >>> rows = {"x": x, "y": x.sum(axis=1)}
  >>> data = from_arrays(rows, rows, rows, inputs=["x"], target="y")
  >>> data.schema.input_shapes, data.schema.num_classes, len(data.test)
  ({'x': (3,)}, None, 10)
  """
  columns = {
    split: {key: np.asarray(column) for key, column in arrays.items()}
    for split, arrays in (
      ("train", train),
      ("validation", validation),
      ("test", test),
    )
  }
  features = {}
  for key in (*inputs, target):
    if key not in columns["train"]:
      raise ValueError(unknown("feature", key, columns["train"]))
    features[key] = _feature(columns["train"][key], (ranges or {}).get(key))
  if np.issubdtype(columns["train"][target].dtype, np.integer):
    features[target] = _label(
      columns["train"][target], num_classes, class_names
    )
  schema = Schema(features=features, inputs=tuple(inputs), target=target)
  splits = {}
  for split, arrays in columns.items():
    check_columns(arrays, schema, split=split)
    reader = ArrayReader({key: arrays[key] for key in features})
    splits[split] = Split(split, schema, reader)
  return Dataset(name=name, schema=schema, **splits)


def _feature(
  column: np.ndarray, limits: tuple[int | float, int | float] | None
) -> Feature:
  image = column.ndim == 4
  if limits is None and image and column.dtype == np.uint8:
    limits = (0, 255)
  low, high = limits or (None, None)
  return Feature(
    kind="image" if image else "number",
    shape=column.shape[1:],
    dtype=column.dtype.name,
    low=low,
    high=high,
  )


def _label(
  column: np.ndarray,
  num_classes: int | None,
  class_names: Sequence[str] | None,
) -> Feature:
  if num_classes is None:
    # At least two, so that an empty or constant column gets its own error.
    num_classes = (
      len(class_names) if class_names else max(2, column.max(initial=0) + 1)
    )
  return Feature(
    kind="label",
    dtype=column.dtype.name,
    num_classes=int(num_classes),
    class_names=tuple(class_names) if class_names else None,
  )
