"""Laws of the schema: it survives JSON, and says how batches are scaled."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax import data


def classes(**change) -> data.Schema:
  features = {
    "picture": data.Feature(
      kind="image", shape=(2, 2, 1), dtype="uint8", low=0, high=255
    ),
    "label": data.Feature(
      kind="label", dtype="int64", num_classes=2, class_names=("no", "yes")
    ),
    "weight": data.Feature(kind="number"),
    "count": data.Feature(kind="number", dtype="int32"),
  }
  arguments = {"inputs": ("picture",), "target": "label", **change}
  return data.Schema(features=features, **arguments)


@pytest.mark.parametrize("target", ["label", "weight"])
def test_json_reads_back_equal_and_in_order(target):
  schema = classes(target=target)
  again = data.Schema.from_json(schema.to_json())
  assert again == schema
  assert list(again.features) == list(schema.features)


def test_a_digits_schema_reads_back_equal(digits):
  assert data.Schema.from_json(digits.schema.to_json()) == digits.schema


@pytest.mark.parametrize(
  "text",
  ["", "[]", "{}", '{"features": []}', '{"features": {"x": {"kin": 1}}}'],
)
def test_other_text_is_refused(text):
  with pytest.raises(ValueError, match="must be a schema written by to_json"):
    data.Schema.from_json(text)


def test_unknown_fields_are_refused():
  fields = json.loads(classes().to_json())
  fields["color"] = "red"
  with pytest.raises(ValueError, match="must be a schema written by to_json"):
    data.Schema.from_json(json.dumps(fields))


@pytest.mark.parametrize("target", ["count", "nothing", "picture"])
def test_a_target_must_be_a_label_or_a_float(target):
  with pytest.raises(ValueError, match=r"target|unknown feature"):
    classes(target=target, inputs=("weight",))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"kind": "image", "shape": (8, 8)}, r"rank 3 .*shape=\(8, 8\)"),
    ({"kind": "label"}, "num_classes must be at least 2, got None"),
    ({"kind": "number", "low": 1, "high": 1}, "low must be below high"),
  ],
)
def test_impossible_features_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    data.Feature(**fields)


@given(st.integers(-100, 100), st.integers(1, 155))
def test_ranges_are_mapped_to_the_unit_interval(low, width):
  feature = data.Feature(
    kind="number", dtype="int16", low=low, high=low + width
  )
  stored = np.arange(low, low + width + 1, dtype=np.int16)
  values = feature.to_batch(stored)
  assert values.dtype == np.float32
  np.testing.assert_allclose(
    values, (stored - low) / width, rtol=1e-6, atol=1e-6
  )


def test_numbers_without_a_range_keep_their_values():
  values = np.array([-3.0, 1e6], np.float64)
  np.testing.assert_array_equal(
    data.Feature(kind="number", dtype="float64").to_batch(values), values
  )
  np.testing.assert_array_equal(
    data.Feature(kind="number", dtype="int64").to_batch(np.arange(5)),
    np.arange(5, dtype=np.float32),
  )


def language(**change) -> data.Schema:
  tokens = {"kind": "tokens", "shape": (8,), "vocab_size": 256}
  features = {
    "tokens": data.Feature(
      **{**tokens, "dtype": "uint8", "tokenizer": "bytes", **change}
    ),
    "targets": data.Feature(**tokens, dtype="int32"),
  }
  return data.Schema(features=features, inputs=("tokens",), target="targets")


def test_a_schema_of_tokens_says_what_is_learned_and_how_to_read_it():
  schema = language()
  assert schema.task == "language"
  assert schema.vocab_size == 256
  assert schema.tokenizer == data.ByteTokenizer()
  assert schema.num_classes is schema.class_names is None
  assert schema.input_shapes == {"tokens": (8,)}
  assert data.Schema.from_json(schema.to_json()) == schema
  assert language(tokenizer=None).tokenizer is None


@pytest.mark.parametrize(
  ("target", "task"), [("label", "classification"), ("weight", "regression")]
)
def test_other_schemas_have_no_vocabulary(target, task):
  schema = classes(target=target)
  assert schema.task == task
  assert schema.vocab_size is schema.tokenizer is None
  # Runs of a version that knew no tokens are told by their schema's text.
  assert "vocab_size" not in schema.to_json()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"shape": (8, 1)}, r"shape \(length,\), got shape=\(8, 1\)"),
    ({"shape": (0,)}, r"got shape=\(0,\)"),
    ({"dtype": "float32"}, "tokens must be integers, got dtype='float32'"),
    (
      {"vocab_size": None},
      "vocab_size must be at least 2, got vocab_size=None",
    ),
    ({"vocab_size": 255}, "that of the tokenizer, 256, got vocab_size=255"),
    ({"tokenizer": "words"}, "must be a tokenizer written by to_json"),
    ({"shape": (9,)}, "inputs must be one feature of tokens, of the shape"),
    ({"kind": "number"}, "vocab_size and tokenizer must be None for 'number'"),
  ],
)
def test_impossible_tokens_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    language(**change)
