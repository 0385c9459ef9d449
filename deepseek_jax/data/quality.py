"""Checks that turn bad data into one clear error before a model sees it."""

from collections.abc import Mapping

import numpy as np

from deepseek_jax.data.schema import Feature, Schema


def check_columns(
  columns: Mapping[str, np.ndarray],
  schema: Schema,
  *,
  split: str,
  indices: np.ndarray | None = None,
) -> None:
  """Raises a `ValueError` for the first thing wrong with stored columns.

  A column must exist for every feature, all must be of one length above zero,
  every entry must have its feature's shape, numbers must be finite, labels
  integers in [0, num_classes), and tokens integers in [0, vocab_size), or -1 in
  a target. One pass over the data, no copies of it.

  Args:
    columns: Stored entries by feature name, examples along the first axis.
    schema: What the columns should be.
    split: The split's name, for the message.
    indices: The example each row is, where the rows are not the whole split.

  Raises:
    ValueError: Naming the split, the feature, the first offending example,
      how many offend, and the rule.

  >>> from deepseek_jax.data.schema import Feature, Schema
  >>> x, y = Feature(kind="number"), Feature(kind="label", num_classes=2)
  >>> schema = Schema(features={"x": x, "y": y}, inputs=("x",), target="y")
  >>> columns = {"x": np.ones(3, np.float32), "y": np.array([0, 1, 2])}
  >>> check_columns(columns, schema, split="train")
  Traceback (most recent call last):
    ...
  ValueError: train: 'y' must be in [0, 2), got 2 at example 2 (1 of 3 ...
  """
  lengths = {}
  for name, feature in schema.features.items():
    if name not in columns:
      raise ValueError(
        f"{split}: a column is needed for every feature, {name!r} is missing "
        f"from {sorted(columns)}."
      )
    _check_shape(columns[name], feature, f"{split}: {name!r}")
    lengths[name] = len(columns[name])
  if len(set(lengths.values())) > 1:
    raise ValueError(f"{split}: columns must be of one length, got {lengths}.")
  if not next(iter(lengths.values())):
    raise ValueError(f"{split}: a split must hold at least one example, got 0.")
  for name, feature in schema.features.items():
    low = -1 if name == schema.target and feature.kind == "tokens" else 0
    _check_values(columns[name], feature, low, f"{split}: {name!r}", indices)


def _check_shape(column: np.ndarray, feature: Feature, where: str) -> None:
  if column.ndim == 0:
    raise ValueError(
      f"{where} must hold examples along its first axis, got a scalar."
    )
  if column.shape[1:] != feature.shape:
    rule = "(height, width, channels) " if feature.kind == "image" else ""
    raise ValueError(
      f"{where} must hold entries of shape {rule}{feature.shape}, got "
      f"{column.shape[1:]} (the first axis counts examples)."
    )


def _check_values(
  column: np.ndarray,
  feature: Feature,
  low: int,
  where: str,
  indices: np.ndarray | None,
) -> None:
  limit = feature.num_classes or feature.vocab_size
  if limit is not None:  # Labels and tokens.
    if not np.issubdtype(column.dtype, np.integer):
      raise ValueError(f"{where} must be integers, got {column.dtype}.")
    bad = (column < low) | (column >= limit)
    rule = f"be in [{low}, {limit})"
  elif np.issubdtype(column.dtype, np.floating):
    bad = ~np.isfinite(column)
    rule = "be finite"
  elif np.issubdtype(column.dtype, np.integer) or column.dtype == bool:
    return
  else:
    raise ValueError(f"{where} must be numbers, got {column.dtype}.")
  if bad.any():
    raise ValueError(_offence(column, bad, where, rule, indices))


def _offence(
  column: np.ndarray,
  bad: np.ndarray,
  where: str,
  rule: str,
  indices: np.ndarray | None,
) -> str:
  rows = bad.reshape(len(bad), -1).any(axis=1)
  row = int(rows.argmax())
  value = column[row][bad[row]].flat[0] if column.ndim > 1 else column[row]
  example = row if indices is None else int(indices[row])
  return (
    f"{where} must {rule}, got {value} at example {example} "
    f"({int(rows.sum())} of {len(column)} examples)."
  )
