"""What TFDS says about features, as a schema."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deepseek_jax.data.schema import Feature, Schema, unknown


def schema_of(
  info: tfds.core.DatasetInfo,
  example: Mapping[str, Any],
  *,
  inputs: Sequence[str] | None = None,
  target: str | None = None,
) -> Schema:
  """Returns the schema of a TFDS data set.

  Images keep the range of their type (0 to 255), unless the data set's metadata
  has `{"ranges": {feature: [low, high]}}`. An unsigned Tensor of rank 3 with 1,
  3 or 4 channels is an image too.

  Args:
    info: What TFDS knows of the data set.
    example: One example, which settles sizes the features leave open.
    inputs: The features to read; `None` takes the supervised keys.
    target: The feature to predict; `None` takes the supervised keys.

  Returns:
    The schema of the inputs and the target, in that order.

  Raises:
    ValueError: If a name is unknown, a feature is of a kind no batch can
      carry, or there are neither names nor supervised keys.
  """
  keys = info.supervised_keys
  if keys is not None and len(keys) == 2:
    inputs = inputs or _names(keys[0])
    target = target or next(iter(_names(keys[1])), None)
  if not inputs or not target:
    raise ValueError(
      "inputs and target must be given for a data set without supervised "
      f"keys; its features are {sorted(example)}."
    )
  ranges = (info.metadata or {}).get("ranges", {})
  features = {}
  for name in (*inputs, target):
    if name not in example:
      raise ValueError(unknown("feature", name, example))
    features[name] = _feature(
      name, info.features[name], example[name], ranges.get(name)
    )
  return Schema(features=features, inputs=tuple(inputs), target=target)


def text_feature(
  info: tfds.core.DatasetInfo, inputs: Sequence[str] | None
) -> str:
  """Returns the name of the feature that holds a TFDS data set's texts.

  Args:
    info: What TFDS knows of the data set.
    inputs: The feature's name; `None` takes the first of the supervised keys,
      or the data set's only text.

  Raises:
    ValueError: If there is not one such feature, or it is no text.
  """
  texts = [
    name
    for name, connector in info.features.items()
    if isinstance(connector, tfds.features.Text)
  ]
  names = list(inputs or _names((info.supervised_keys or ([],))[0]) or texts)
  if not texts:
    raise ValueError(
      f"length and tokenizer are for data sets of text, {info.full_name} has "
      f"none; its features are {sorted(info.features)}."
    )
  if len(names) != 1 or names[0] not in texts:
    raise ValueError(
      f"inputs must name one text, of {sorted(texts)}, for rows of tokens; got "
      f"{names}."
    )
  return names[0]


def _names(keys: Any) -> tuple[str, ...]:
  """Returns the feature names in one half of the supervised keys."""
  if isinstance(keys, str):
    return (keys,)
  values = keys.values() if isinstance(keys, Mapping) else keys
  return tuple(name for key in values for name in _names(key))


def _feature(
  name: str,
  connector: tfds.features.FeatureConnector,
  entry: Any,
  limits: Sequence[int | float] | None,
) -> Feature:
  if isinstance(connector, tfds.features.ClassLabel):
    return Feature(
      kind="label",
      dtype="int64",
      num_classes=connector.num_classes,
      class_names=tuple(connector.names),
    )
  entry = np.asarray(entry)
  dtype = entry.dtype
  if dtype.kind not in "biuf":
    is_text = isinstance(connector, tfds.features.Text)
    raise ValueError(
      f"a batch carries images, labels and numbers; {name!r} is a "
      f"{type(connector).__name__} of type {dtype}."
      + (" Give length to read a text as tokens." if is_text else "")
    )
  unsigned = np.issubdtype(dtype, np.unsignedinteger)
  image = isinstance(connector, tfds.features.Image) or (
    unsigned and entry.ndim == 3 and entry.shape[-1] in (1, 3, 4)
  )
  low, high = limits or (None, None)
  if image and unsigned and limits is None:
    low, high = 0, int(np.iinfo(dtype).max)
  return Feature(
    kind="image" if image else "number",
    shape=entry.shape,
    dtype=dtype.name,
    low=low,
    high=high,
  )
