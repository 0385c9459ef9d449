"""Laws of tokenizers: text comes back, and tokens are as they were."""

import json
import pickle
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from deepseek_jax import data
from deepseek_jax.data import byte_pairs

TEXTS = [
  "def spam(eggs):\n    return eggs + 1\n\n\ndef ham(eggs):\n    return eggs\n",
  "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
  b"for i in range(10):\n    print(i, i * i)\n",
] * 3
BYTES = data.ByteTokenizer()
PAIRS = data.BPETokenizer.train(TEXTS, 300)
BOTH = [BYTES, PAIRS]

texts = st.text(st.characters(exclude_characters="\0", exclude_categories="C"))
anything = (texts | st.text()).filter(lambda text: text and "\0" not in text)


@pytest.mark.parametrize("tokenizer", BOTH)
@settings(max_examples=40, deadline=None)
@given(text=anything)
def test_text_comes_back(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert ids.min() > 0
  assert ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize("tokenizer", BOTH)
@settings(max_examples=40, deadline=None)
@given(text=anything)
def test_bytes_of_tokens_add_up_to_the_text(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("tokenizer", BOTH)
@settings(max_examples=40, deadline=None)
@given(text=anything)
def test_a_text_and_its_utf8_are_the_same(tokenizer, text):
  np.testing.assert_array_equal(
    tokenizer.encode(text), tokenizer.encode(text.encode())
  )


@pytest.mark.parametrize("tokenizer", BOTH)
@settings(max_examples=40, deadline=None)
@given(some=st.lists(anything, max_size=5))
def test_many_are_encoded_as_one_by_one(tokenizer, some):
  together = list(tokenizer.encode_all(some))
  assert len(together) == len(some)
  for ids, text in zip(together, some, strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_many_are_encoded_as_one_by_one_however_they_are_batched(monkeypatch):
  whole = list(PAIRS.encode_all(TEXTS))
  monkeypatch.setattr("deepseek_jax.data.tokens._BATCH", 70)
  for ids, again in zip(whole, PAIRS.encode_all(TEXTS), strict=True):
    np.testing.assert_array_equal(ids, again)


@pytest.mark.parametrize("tokenizer", BOTH)
def test_separators_are_no_text(tokenizer):
  ids = [0, *tokenizer.encode("one"), 0, *tokenizer.encode("two"), 0]
  assert tokenizer.separator == 0
  assert tokenizer.token_bytes[0] == 0
  assert tokenizer.decode(ids) == "onetwo"
  assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("tokenizer", BOTH)
def test_a_cut_character_is_replaced(tokenizer):
  two_bytes = [tokenizer.pieces.index(bytes([b])) for b in "é".encode()]
  assert tokenizer.decode(two_bytes) == "é"
  assert tokenizer.decode(two_bytes[:1]) == "\ufffd"


@pytest.mark.parametrize("tokenizer", BOTH)
def test_ids_may_come_from_a_device(tokenizer):
  assert tokenizer.decode(jnp.asarray(tokenizer.encode("spam"))) == "spam"


def test_bytes_are_their_own_ids():
  raw = bytes(range(1, 256))  # No UTF-8, and no need for it.
  assert BYTES.encode(raw).tolist() == list(raw)
  assert BYTES.vocab_size == 256


@pytest.mark.parametrize("tokenizer", BOTH)
def test_a_tokenizer_is_known_by_what_it_does(tokenizer):
  for again in (
    data.tokenizer_from_json(tokenizer.to_json()),
    pickle.loads(pickle.dumps(tokenizer)),
  ):
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again.pieces == tokenizer.pieces
    np.testing.assert_array_equal(
      again.encode("def spam"), tokenizer.encode("def spam")
    )
  assert BYTES != PAIRS
  assert data.BPETokenizer.train(TEXTS, 299) != PAIRS
  assert BYTES != "bytes"


def test_the_same_texts_teach_the_same():
  assert data.BPETokenizer.train(iter(TEXTS), 300) == PAIRS
  assert PAIRS.vocab_size == len(set(PAIRS.pieces)) == 300


def test_a_larger_vocabulary_begins_with_a_smaller_one():
  small = data.BPETokenizer.train(TEXTS, 270)
  assert PAIRS.pieces[:270] == small.pieces


def test_without_pairs_every_byte_is_a_token():
  tokenizer = data.BPETokenizer.train(["x"], 257)
  assert tokenizer.encode("né").tolist() == [b + 1 for b in "né".encode()]


def test_the_alphabet_is_that_of_the_library():
  letters = byte_pairs._alphabet()
  assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
  for text in ("\n \t!~", "\x7f\x80\x90\xad\xff", "ÿĀ€😀"):
    ((name, _),) = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    ).pre_tokenize_str(text)
    assert name == byte_pairs._name(text.encode())


@settings(max_examples=40, deadline=None)
@given(st.text("adefghmnprstu", min_size=1, max_size=12))
def test_pairs_are_merged_in_the_order_they_were_learned(word):
  merges = json.loads(PAIRS.to_json())["merges"]
  ids = [byte + 1 for byte in word.encode()]
  for pair in merges:
    merged = PAIRS.pieces.index(b"".join(PAIRS.pieces[i] for i in pair))
    place = 0
    while place < len(ids) - 1:
      if ids[place : place + 2] == pair:
        ids[place : place + 2] = [merged]
      place += 1
  assert PAIRS.encode(word).tolist() == ids


def test_the_first_pair_is_the_most_frequent():
  tokenizer = data.BPETokenizer.train(["aab"] * 5 + ["bcb"] * 4 + ["ab"], 258)
  assert tokenizer.pieces[257] == b"ab"


def test_two_ways_to_the_same_bytes_are_one_token():
  tokenizer = data.BPETokenizer([(98, 99), (257, 98), (99, 98), (98, 259)])
  assert tokenizer.pieces[257:] == (b"ab", b"aba", b"ba")
  assert tokenizer.decode(tokenizer.encode("abababa")) == "abababa"


@pytest.mark.parametrize("tokenizer", BOTH)
@pytest.mark.parametrize(
  ("ids", "message"),
  [
    ([1, -1], r"ids must be in \[0, {size}\), got -1 at place 1"),
    ([70000], r"ids must be in \[0, {size}\), got 70000 at place 0"),
    ([[1, 2]], r"integers along one axis, got an array of shape \(1, 2\)"),
    ([0.5], "integers along one axis, .* type float64"),
    (np.asarray(3), r"integers along one axis, got an array of shape \(\)"),
  ],
)
def test_unknown_ids_are_refused(tokenizer, ids, message):
  message = message.replace("{size}", str(tokenizer.vocab_size))
  with pytest.raises(ValueError, match=message):
    tokenizer.decode(ids)


@pytest.mark.parametrize(
  ("tokenizer", "text", "message"),
  [
    (BYTES, "", "text must not be empty"),
    (PAIRS, b"", "text must not be empty"),
    (BYTES, "one\0two", "no NUL byte, .* got one at byte 3 of 7"),
    (BYTES, "a\ud800", r"lone surrogate '\\ud800' at character 1"),
    (PAIRS, "a\ud800", r"lone surrogate '\\ud800' at character 1"),
    (PAIRS, b"ab\xff", "must be UTF-8 for byte pairs, got byte 0xff at byte 2"),
  ],
)
def test_what_cannot_be_said_is_refused(tokenizer, text, message):
  with pytest.raises(ValueError, match=message):
    tokenizer.encode(text)
  with pytest.raises(ValueError, match=rf"texts\[1\]: .*{message}"):
    list(tokenizer.encode_all(["fine", text]))


@pytest.mark.parametrize(
  ("some", "size", "message"),
  [
    (["ab"], 256, "vocab_size must be at least 257, .* got vocab_size=256"),
    (["abab"], 300, "must be at most 258 for these texts, .* vocab_size=300"),
    ([], 300, "must be at most 257 for these texts"),
    (["ab", ""], 258, r"texts\[1\]: text must not be empty"),
    (["ab", b"\xe9"], 258, r"texts\[1\]: text must be UTF-8"),
  ],
)
def test_what_teaches_nothing_is_refused(some, size, message):
  with pytest.raises(ValueError, match=message):
    data.BPETokenizer.train(some, size)


@pytest.mark.parametrize("pair", [(1, 257), (0, 1), (-1, 1), (1,), (1, True)])
def test_merges_of_what_is_not_there_are_refused(pair):
  with pytest.raises(ValueError, match=r"merges\[0\] must be two ids in"):
    data.BPETokenizer([pair])


@pytest.mark.parametrize(
  "text",
  [
    "",
    "byte",
    "[]",
    "{}",
    '{"kind": "words"}',
    '{"kind": "bpe"}',
    '{"kind": "bpe", "merges": 3}',
    '{"kind": "bpe", "merges": [[1, "2"]]}',
    '{"kind": "bpe", "merges": [[1, 900]]}',
    '{"kind": "bpe", "merges": [], "more": 1}',
  ],
)
def test_other_text_is_no_tokenizer(text):
  with pytest.raises(
    ValueError, match="must be a tokenizer written by to_json"
  ):
    data.tokenizer_from_json(text)


def test_bytes_need_no_library():
  code = (
    "import sys, deepseek_jax as dj\n"
    "texts = dj.data.from_texts(['a'], ['b'], ['c'], length=2)\n"
    "assert dj.data.tokenizer_from_json('bytes')\n"
    "assert not {'tokenizers', 'huggingface_hub', 'rich'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
