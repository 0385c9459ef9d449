"""What the columns of a data set mean: kinds, shapes, ranges and classes."""

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from deepseek_jax.data.tokenizers import tokenizer_from_json
from deepseek_jax.data.tokens import Tokenizer

Kind = Literal["image", "label", "number", "tokens"]
Task = Literal["classification", "regression", "language"]

# A batch carries these two beside the features.
RESERVED = ("mask", "index")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
  """One column: what an entry is, and the range of its stored values.

  In a batch labels and tokens are int32 and everything else float32. Integers
  with a known range are mapped to `(x - low) / (high - low)`, that is into
  [0, 1]; floats and integers without a range keep their values.

  Attributes:
    kind: "image" (height, width, channels), "label" (an integer class),
      "tokens" (a row of token ids, in [0, vocab_size); as a target -1 is
      nothing to predict) or "number" (an array of any shape; a scalar has
      shape `()`).
    shape: The shape of one entry.
    dtype: The NumPy name of the stored type.
    low: The least stored value, where it is known.
    high: The greatest stored value, where it is known.
    num_classes: How many classes a label has; `None` for other kinds.
    class_names: The classes' names, in order; `None` for other kinds.
    vocab_size: How many token ids there are; `None` for other kinds.
    tokenizer: What `Tokenizer.to_json` says of the tokenizer ("bytes", for
      one) that made tokens of text; `None` if none did.

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
  vocab_size: int | None = None
  tokenizer: str | None = None

  def __post_init__(self):
    """Refuses fields that do not agree."""
    _check_feature(self)
    if self.kind == "tokens":
      _check_tokens(self)
    elif not (self.vocab_size is None and self.tokenizer is None):
      raise ValueError(
        f"vocab_size and tokenizer must be None for {self.kind!r}, got "
        f"vocab_size={self.vocab_size}, tokenizer={self.tokenizer!r:.80}."
      )

  @property
  def to_batch(self) -> Callable[[np.ndarray], np.ndarray]:
    """The function that turns stored entries into a batch's entries."""
    if self.kind == "label":
      return _to_int32
    if self.kind == "tokens":
      return _as_int32
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
    target: The name a model predicts: a label (classification), a number of a
      float type (regression) or the tokens that follow (language).

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
    is_float = np.issubdtype(np.dtype(dtype), np.floating)
    if kind not in ("label", "tokens") and not is_float:
      raise ValueError(
        "target must be a label, tokens or a feature of a float type, got "
        f"{self.target!r} of kind {kind!r} and type {dtype}."
      )
    if kind == "tokens":
      self._check_language()

  @property
  def target_feature(self) -> Feature:
    """The feature a model predicts."""
    return self.features[self.target]

  @property
  def input_shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of one entry of each input."""
    return {name: self.features[name].shape for name in self.inputs}

  @property
  def task(self) -> Task:
    """What is learned: it follows from the target's kind."""
    if self.target_feature.kind == "tokens":
      return "language"
    is_label = self.target_feature.kind == "label"
    return "classification" if is_label else "regression"

  @property
  def num_classes(self) -> int | None:
    """How many classes the target has; `None` for the other tasks."""
    return self.target_feature.num_classes

  @property
  def class_names(self) -> tuple[str, ...] | None:
    """The names of the target's classes; `None` for the other tasks."""
    return self.target_feature.class_names

  @property
  def vocab_size(self) -> int | None:
    """How many token ids the target has; `None` for the other tasks."""
    return self.target_feature.vocab_size

  @property
  def tokenizer(self) -> Tokenizer | None:
    """What made tokens of text; `None` if nothing did."""
    for name in self.inputs:
      if (text := self.features[name].tokenizer) is not None:
        return tokenizer_from_json(text)
    return None

  def to_json(self) -> str:
    """Returns the schema as text; `from_json` reads it back equal."""
    fields = dataclasses.asdict(self)
    for feature in fields["features"].values():
      for name in ("vocab_size", "tokenizer"):
        # As before there were tokens, so that older runs are recognised.
        if feature[name] is None:
          del feature[name]
    return json.dumps(fields, indent=2)

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

  def _check_language(self) -> None:
    """Refuses inputs the target's tokens cannot follow."""
    target = self.target_feature
    read = [self.features[name] for name in self.inputs]
    if not (
      len(read) == 1
      and read[0].kind == "tokens"
      and read[0].shape == target.shape
      and read[0].vocab_size == target.vocab_size
    ):
      raise ValueError(
        "inputs must be one feature of tokens, of the shape and vocab_size of "
        f"the target's, {target.shape} and {target.vocab_size}; got "
        f"{[(f.kind, f.shape, f.vocab_size) for f in read]}."
      )


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


def _check_tokens(feature: Feature) -> None:
  """Raises a `ValueError` where tokens cannot be as `feature` says."""
  if len(feature.shape) != 1 or feature.shape[0] < 1:
    raise ValueError(
      f"tokens must be a row, of shape (length,), got shape={feature.shape}."
    )
  if not np.issubdtype(np.dtype(feature.dtype), np.integer):
    raise ValueError(f"tokens must be integers, got dtype={feature.dtype!r}.")
  if feature.vocab_size is None or feature.vocab_size < 2:
    raise ValueError(
      f"vocab_size must be at least 2, got vocab_size={feature.vocab_size}."
    )
  if feature.tokenizer is not None:
    size = tokenizer_from_json(feature.tokenizer).vocab_size
    if size != feature.vocab_size:
      raise ValueError(
        f"vocab_size must be that of the tokenizer, {size}, got "
        f"vocab_size={feature.vocab_size}."
      )


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `fields` with the lists JSON knows as the tuples we write."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in fields.items()
  }


def _to_int32(stored: np.ndarray) -> np.ndarray:
  return stored.astype(np.int32)


def _as_int32(stored: np.ndarray) -> np.ndarray:
  # Packed targets are int32 already, and no one else's.
  return stored.astype(np.int32, copy=False)


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
