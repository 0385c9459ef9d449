"""What the columns of a data set mean: kinds, shapes, ranges and classes."""

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

Kind = Literal["image", "label", "number"]

# A batch carries these two beside the features.
RESERVED = ("mask", "index")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
  """One column: what an entry is, and the range of its stored values.

  In a batch a label is int32 and everything else float32. Integers with a
  known range are mapped to `(x - low) / (high - low)`, that is into [0, 1];
  floats and integers without a range keep their values.

  Attributes:
    kind: "image" (height, width, channels), "label" (an integer class) or
      "number" (an array of any shape; a scalar has shape `()`).
    shape: The shape of one entry.
    dtype: The NumPy name of the stored type.
    low: The least stored value, where it is known.
    high: The greatest stored value, where it is known.
    num_classes: How many classes a label has; `None` for other kinds.
    class_names: The classes' names, in order; `None` for other kinds.

  >>> pixels = Feature(
  ...   kind="image", shape=(8, 8, 1), dtype="uint8", low=0, high=16
  ... )
  >>> pixels.to_batch(np.full((1, 8, 8, 1), 4, np.uint8)).max().item()
  0.25
  """

  kind: Kind
  shape: tuple[int, ...] = ()
  dtype: str = "float32"
  low: int | float | None = None
  high: int | float | None = None
  num_classes: int | None = None
  class_names: tuple[str, ...] | None = None

  def __post_init__(self):
    """Refuses fields that do not agree."""
    _check_feature(self)

  @property
  def to_batch(self) -> Callable[[np.ndarray], np.ndarray]:
    """The function that turns stored entries into a batch's entries."""
    if self.kind == "label":
      return _to_int32
    if self.low is None or self.high is None:
      return _to_float32
    if not np.issubdtype(np.dtype(self.dtype), np.integer):
      return _to_float32
    scale = np.float32(1 / (self.high - self.low))
    if self.low == 0:
      return functools.partial(_scale, scale=scale)
    return functools.partial(_shift, low=np.float32(self.low), scale=scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
  """The features of a data set, and which of them a model reads and predicts.

  Attributes:
    features: Feature by name, in order; only those a batch carries.
    inputs: The names a model reads.
    target: The name a model predicts: a label (classification) or a number
      of a float type (regression).

  >>> schema = Schema(
  ...   features={
  ...     "x": Feature(kind="number", shape=(3,)),
  ...     "y": Feature(kind="label", dtype="int64", num_classes=2),
  ...   },
  ...   inputs=("x",),
  ...   target="y",
  ... )
  >>> schema.input_shapes, schema.num_classes
  ({'x': (3,)}, 2)
  >>> Schema.from_json(schema.to_json()) == schema
  True
  """

  features: Mapping[str, Feature]
  inputs: tuple[str, ...]
  target: str

  def __post_init__(self):
    """Refuses names that do not agree."""
    for name in (*self.inputs, self.target):
      if name not in self.features:
        raise ValueError(unknown("feature", name, self.features))
    if not self.inputs or self.target in self.inputs:
      raise ValueError(
        "inputs must name at least one feature and not the target, got "
        f"inputs={self.inputs}, target={self.target!r}."
      )
    for name in RESERVED:
      if name in self.features:
        raise ValueError(
          f"a feature may not be called {name!r}: batches carry a column of "
          f"that name; got features {list(self.features)}."
        )
    kind, dtype = self.features[self.target].kind, self.target_feature.dtype
    if kind != "label" and not np.issubdtype(np.dtype(dtype), np.floating):
      raise ValueError(
        "target must be a label or a feature of a float type, got "
        f"{self.target!r} of kind {kind!r} and type {dtype}."
      )

  @property
  def target_feature(self) -> Feature:
    """The feature a model predicts."""
    return self.features[self.target]

  @property
  def input_shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of one entry of each input."""
    return {name: self.features[name].shape for name in self.inputs}

  @property
  def num_classes(self) -> int | None:
    """How many classes the target has; `None` for regression."""
    return self.target_feature.num_classes

  @property
  def class_names(self) -> tuple[str, ...] | None:
    """The names of the target's classes; `None` for regression."""
    return self.target_feature.class_names

  def to_json(self) -> str:
    """Returns the schema as text; `from_json` reads it back equal."""
    return json.dumps(dataclasses.asdict(self), indent=2)

  @staticmethod
  def from_json(text: str) -> "Schema":
    """Reads what `to_json` wrote.

    Args:
      text: A JSON object.

    Returns:
      The schema.

    Raises:
      ValueError: If the text is no JSON object of that form.
    """
    try:
      fields = json.loads(text)
      features = {
        name: Feature(**_tuples(feature))
        for name, feature in fields.pop("features").items()
      }
      return Schema(features=features, **_tuples(fields))
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
      raise ValueError(
        f"text must be a schema written by to_json, got {text[:80]!r}."
      ) from error


def unknown(what: str, name: str, known: Iterable[str]) -> str:
  """Returns an error message for `name` that lists the nearest known names."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
  return f"unknown {what} {name!r}; {hint or f'known are {known}.'}"


def _check_feature(feature: Feature) -> None:
  """Raises a `ValueError` where the fields of `feature` do not agree."""
  if feature.kind == "image" and len(feature.shape) != 3:
    raise ValueError(
      "an image must have rank 3 (height, width, channels), got "
      f"shape={feature.shape}."
    )
  if feature.kind == "label":
    if feature.num_classes is None or feature.num_classes < 2:
      raise ValueError(
        f"num_classes must be at least 2, got {feature.num_classes}."
      )
    names = feature.class_names
    if names is not None and len(names) != feature.num_classes:
      raise ValueError(
        f"class_names must hold num_classes={feature.num_classes} names, got "
        f"{len(names)}."
      )
  low, high = feature.low, feature.high
  if low is not None and high is not None and not low < high:
    raise ValueError(f"low must be below high, got {low=}, {high=}.")


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `fields` with the lists JSON knows as the tuples we write."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in fields.items()
  }


def _to_int32(stored: np.ndarray) -> np.ndarray:
  return stored.astype(np.int32)


def _to_float32(stored: np.ndarray) -> np.ndarray:
  return stored.astype(np.float32)


def _scale(stored: np.ndarray, scale: np.float32) -> np.ndarray:
  values = stored.astype(np.float32)
  values *= scale
  return values


def _shift(
  stored: np.ndarray, low: np.float32, scale: np.float32
) -> np.ndarray:
  values = stored.astype(np.float32)
  values -= low
  values *= scale
  return values
