"""Laws of packing: nothing is lost, and everything is predicted once."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax import data
from deepseek_jax.data.packing import pack

BYTES = data.ByteTokenizer()
documents = st.lists(st.binary(min_size=1, max_size=20), min_size=1).map(
  lambda some: [document.replace(b"\0", b"\1") for document in some]
)
lengths = st.integers(1, 40)


def joined(some: list[bytes]) -> list[int]:
  return list(b"".join(b"\0" + document for document in some))


@settings(max_examples=40, deadline=None)
@given(documents)
def test_a_stream_is_its_documents_each_after_a_separator(some):
  stream = pack(some, BYTES)
  assert stream.dtype == np.uint8
  assert stream.tolist() == joined(some)


@settings(max_examples=40, deadline=None)
@given(documents, lengths)
def test_every_token_after_the_first_is_predicted_once(some, length):
  reader = data.PackedReader(pack(some, BYTES), length)
  rows = reader.take(np.arange(len(reader)))
  targets = rows["targets"].ravel()
  assert targets[targets >= 0].tolist() == joined(some)[1:]
  # What is not predicted is the end of the last row, and less than a row.
  assert np.all(np.diff(targets < 0) >= 0)
  assert (targets < 0).sum() < length


@settings(max_examples=40, deadline=None)
@given(documents, lengths)
def test_a_token_is_read_before_the_one_that_follows_it(some, length):
  reader = data.PackedReader(pack(some, BYTES), length)
  rows = reader.take(np.arange(len(reader)))
  tokens, targets = rows["tokens"].ravel(), rows["targets"].ravel()
  inside = targets[:-1] >= 0
  np.testing.assert_array_equal(tokens[1:][inside], targets[:-1][inside])
  stream = joined(some)
  count = min(len(stream), len(tokens))  # The last may be predicted only.
  assert tokens[:count].tolist() == stream[:count]
  assert not tokens[count:].any()


@settings(max_examples=40, deadline=None)
@given(documents, lengths, st.data())
def test_rows_are_gathered_in_any_order(some, length, draw):
  reader = data.PackedReader(pack(some, BYTES), length)
  every = reader.take(np.arange(len(reader)))
  places = draw.draw(st.lists(st.integers(0, len(reader) - 1)))
  rows = reader.take(np.array(places, int))
  for name, column in every.items():
    np.testing.assert_array_equal(rows[name], column[places])
    for place in places:
      one = reader.take(np.asarray(place))[name]
      np.testing.assert_array_equal(one, column[place])


@settings(max_examples=40, deadline=None)
@given(documents, lengths)
def test_segments_are_the_documents(some, length):
  reader = data.PackedReader(pack(some, BYTES), length)
  tokens = reader.take(np.arange(len(reader)))["tokens"]
  segments = data.segment_ids(tokens)
  number = np.repeat(np.arange(len(some)), [len(each) + 1 for each in some])
  padded = np.full(tokens.size, -1)
  count = min(tokens.size, len(number))
  padded[:count] = number[:count]
  for row, owners in zip(segments, padded.reshape(tokens.shape), strict=True):
    same = row[:, None] == row[None]
    real = (owners >= 0)[:, None] & (owners >= 0)[None]
    np.testing.assert_array_equal(
      same[real], (owners[:, None] == owners[None])[real]
    )


def test_what_is_left_of_a_document_is_segment_zero():
  tokens = np.array([[0, 5, 0, 6], [7, 7, 0, 8]])
  np.testing.assert_array_equal(
    data.segment_ids(tokens), [[1, 1, 2, 2], [0, 0, 1, 1]]
  )
  assert data.segment_ids(tokens).dtype == np.int32
  np.testing.assert_array_equal(
    data.segment_ids(tokens + 3, 3), data.segment_ids(tokens)
  )


@pytest.mark.parametrize(
  ("size", "dtype"), [(256, np.uint8), (257, np.uint16), (65537, np.uint32)]
)
def test_a_token_takes_as_few_bytes_as_its_vocabulary_allows(size, dtype):
  class Wide(data.ByteTokenizer):
    pieces = (b"",) * size

  stream = pack(["ab"], Wide())
  assert (stream.dtype, stream.tolist()) == (dtype, [0, 97, 98])
  rows = data.PackedReader(stream, 2).take(np.array([0]))
  assert rows["tokens"].dtype == dtype
  assert rows["targets"].tolist() == [[97, 98]]


def test_the_stream_is_held_once():
  stream = pack([b"x" * 100_000], BYTES)
  reader = data.PackedReader(stream, 100)
  assert len(pickle.dumps(reader)) < 101_000
  again = pickle.loads(pickle.dumps(reader))
  np.testing.assert_array_equal(
    again.take(np.array([7]))["targets"], reader.take(np.array([7]))["targets"]
  )


def test_a_batch_is_int32_and_its_own():
  texts = data.from_texts(["abcdef"], ["g"], ["h"], length=4)
  source = data.BatchSource(texts.train, 2, shuffle=False)
  batch = source[0]
  assert {name: column.dtype.name for name, column in batch.items()} == {
    "tokens": "int32",
    "targets": "int32",
    "mask": "float32",
    "index": "int32",
  }
  batch["tokens"][:] = batch["targets"][:] = 7
  assert source[0]["tokens"].tolist() == [[0, 97, 98, 99], [100, 101, 102, 0]]
  assert source[0]["targets"].tolist() == [
    [97, 98, 99, 100],
    [101, 102, -1, -1],
  ]


@settings(max_examples=15, deadline=None)
@given(documents, st.integers(1, 8), st.integers(0, 5))
def test_a_restored_stream_continues_as_the_unbroken_one(some, length, done):
  split = data.from_texts(some, [b"v"], [b"t"], length=length).train
  make = lambda: iter(data.batches(split, 1, seed=4, epochs=9, prefetch=0))
  unbroken, restored = make(), make()
  for _ in range(done):
    next(unbroken)
  restored.set_state(unbroken.get_state())
  for batch, again in zip(unbroken, restored, strict=True):
    for name, column in batch.items():
      np.testing.assert_array_equal(column, again[name])


@pytest.mark.parametrize("index", [-1, 2])
def test_rows_that_are_not_there_are_refused(index):
  reader = data.PackedReader(np.arange(6, dtype=np.uint8), 4)
  with pytest.raises(IndexError, match="index"):
    reader.take(np.array([0, index]))


@pytest.mark.parametrize(
  ("stream", "length", "message"),
  [
    ([0, 1], 0, "length must be at least 1, got length=0"),
    ([0], 4, "stream must hold at least 2 tokens, got 1"),
  ],
)
def test_too_little_is_refused(stream, length, message):
  with pytest.raises(ValueError, match=message):
    data.PackedReader(np.array(stream, np.uint8), length)


@pytest.mark.parametrize(
  ("some", "limit", "message"),
  [
    ([], 9, "part: a split must hold at least one text, got 0"),
    (["a", ""], 9, r"part\[1\]: text must not be empty"),
    (["abcd", "efgh"], 9, "tokens of 'part', which take 10 bytes or more"),
  ],
)
def test_documents_that_make_no_stream_are_refused(some, limit, message):
  with pytest.raises(ValueError, match=message):
    pack(some, BYTES, name="part", memory_limit=limit)
