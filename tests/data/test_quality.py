"""Each way of being bad data has one clear error, from arrays and files."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from deepseek_jax import data
from deepseek_jax.data.quality import check_columns


def good(num: int = 12) -> dict[str, np.ndarray]:
  return {
    "image": np.zeros((num, 4, 3, 1), np.uint8),
    "age": np.ones((num, 2), np.float32),
    "label": np.arange(num) % 3,
  }


def build(**bad) -> data.Dataset:
  return data.from_arrays(
    good(),
    {**good(6), **bad},
    good(5),
    inputs=["image", "age"],
    target="label",
    num_classes=3,
  )


def put(column: np.ndarray, index, value) -> np.ndarray:
  column[index] = value
  return column


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (
      {"label": np.array([0, 1, 2, 3, 1, 9])},
      r"validation: 'label' must be in \[0, 3\), got 3 at example 3 "
      r"\(2 of 6 examples\)",
    ),
    ({"label": np.array([0, 1, 2, 0, 1, -1])}, r"got -1 at example 5"),
    ({"label": np.linspace(0, 2, 6)}, "'label' must be integers, got float64"),
    (
      {"image": np.zeros((6, 4, 3), np.uint8)},
      r"'image' must hold entries of shape \(height, width, channels\) "
      r"\(4, 3, 1\), got \(4, 3\)",
    ),
    ({"image": np.zeros((6, 3, 4, 1), np.uint8)}, r"got \(3, 4, 1\)"),
    (
      {"age": put(good(6)["age"], (2, 1), np.nan)},
      r"'age' must be finite, got nan at example 2 \(1 of 6 examples\)",
    ),
    ({"age": put(good(6)["age"], 4, -np.inf)}, "got -inf at example 4"),
    ({"age": np.full((6, 2), "old")}, "'age' must be numbers, got <U3"),
    ({"label": np.arange(5) % 3}, "columns must be of one length, got"),
    (
      {name: column[:0] for name, column in good().items()},
      "validation: a split must hold at least one example, got 0",
    ),
    ({"age": np.float32(1)}, "must hold examples along its first axis"),
  ],
)
def test_bad_columns_are_refused(bad, message):
  with pytest.raises(ValueError, match=message):
    build(**bad)


def test_good_columns_are_not():
  schema = build().schema
  assert schema.input_shapes == {"image": (4, 3, 1), "age": (2,)}
  assert schema.num_classes == 3


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"inputs": ["imgae"]}, "unknown feature 'imgae'; did you mean 'image'"),
    ({"target": "lable"}, "unknown feature 'lable'; did you mean 'label'"),
    ({"inputs": []}, "inputs must name at least one feature"),
    ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
    ({"class_names": ["a", "b"], "num_classes": 3}, "must hold num_classes=3"),
    ({"ranges": {"image": (255, 0)}}, "low must be below high"),
  ],
)
def test_bad_descriptions_are_refused(change, message):
  arguments = {"inputs": ["image"], "target": "label", **change}
  with pytest.raises(ValueError, match=message):
    data.from_arrays(good(), good(), good(), **arguments)


def test_a_missing_column_is_named():
  rest = {name: column for name, column in good().items() if name != "age"}
  with pytest.raises(ValueError, match=r"test: a column is needed .* 'age'"):
    data.from_arrays(
      good(), good(), rest, inputs=["image", "age"], target="label"
    )


@pytest.mark.parametrize("name", ["mask", "index"])
def test_the_names_of_a_batch_are_reserved(name):
  rows = {name: np.ones(4, np.float32), "y": np.arange(4) % 2}
  with pytest.raises(ValueError, match=f"may not be called '{name}'"):
    data.from_arrays(rows, rows, rows, inputs=[name], target="y")


def test_an_index_outside_a_split_is_refused():
  split = build().train
  with pytest.raises(IndexError):
    split.take(np.array([12]))
  with pytest.raises(IndexError):
    split[12]


@pytest.mark.parametrize("memory_limit", [2**20, 0])
def test_bad_files_are_refused_when_they_are_read(
  tiny_root, monkeypatch, memory_limit
):
  """A builder may write anything; reading, held or not, checks it."""
  decode = tfds.core.data_sources.array_record.ArrayRecordDataSource

  def with_nan(self, keys):
    examples = original(self, keys)
    return [{**example, "area": np.float32("nan")} for example in examples]

  original = decode.__getitems__
  monkeypatch.setattr(decode, "__getitems__", with_nan)

  def read():
    tiny = data.load(
      "tfds:tiny_shapes",
      data_dir=tiny_root,
      target="area",
      memory_limit=memory_limit,
    )
    next(iter(data.batches(tiny.train, 4, shuffle=False, prefetch=0)))

  with pytest.raises(ValueError, match="train: 'area' must be finite, got nan"):
    read()


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("tokens", -1, r"'tokens' must be in \[0, 9\), got -1 at example 1"),
    ("tokens", 9, r"'tokens' must be in \[0, 9\), got 9 at example 1"),
    ("targets", -2, r"'targets' must be in \[-1, 9\), got -2 at example 1"),
    ("targets", 9, r"'targets' must be in \[-1, 9\), got 9 at example 1"),
  ],
)
def test_tokens_must_be_of_the_vocabulary(name, value, message):
  feature = data.Feature(kind="tokens", shape=(2,), dtype="int32", vocab_size=9)
  schema = data.Schema(
    features={"tokens": feature, "targets": feature},
    inputs=("tokens",),
    target="targets",
  )
  columns = {
    "tokens": np.array([[0, 8]] * 3),
    "targets": np.array([[8, -1]] * 3),
  }
  check_columns(columns, schema, split="train")
  columns[name] = put(columns[name], (1, 1), value)
  with pytest.raises(ValueError, match=f"train: {message}"):
    check_columns(columns, schema, split="train")
