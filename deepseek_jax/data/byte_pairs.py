"""Byte pairs: a vocabulary of the sequences of bytes a text repeats."""

import functools
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from deepseek_jax.data.progress import tracked
from deepseek_jax.data.tokens import Tokenizer, utf8

_BYTES = 257  # The separator, and every byte.


class BPETokenizer(Tokenizer):
  """Bytes, and the pairs of tokens a text repeats most, merged one by one.

  Id 0 is the separator, `b + 1` is byte b, and every merge makes the next id.
  Text is cut into words with the space before them, numbers, signs and runs of
  spaces first (GPT-2's rule), and no token crosses a cut. Any text in UTF-8 can
  be encoded: what was not merged stays bytes.

  Fewer tokens than bytes make a model see further at the same cost, for a
  greater table of embeddings; `ByteTokenizer` needs nothing learned.

  Args:
    merges: Pairs of ids, each below the id their merge makes.

  Raises:
    ValueError: If a pair names an id that is not there yet.

  >>> tokenizer = BPETokenizer([(98, 99), (257, 257)])
  >>> tokenizer.encode("ababac").tolist(), tokenizer.decode([258, 98])
  ([258, 98, 100], 'ababa')

  References:
    Sennrich, Haddow and Birch, "Neural machine translation of rare words with
    subword units", 2016, https://arxiv.org/abs/1508.07909.
    Radford et al., "Language models are unsupervised multitask learners", 2019
    (byte-level pairs).
  """

  def __init__(self, merges: Sequence[Sequence[int]]):
    pieces = [b"", *(bytes([byte]) for byte in range(256))]
    known = set(pieces)
    self._merges = []
    for place, pair in enumerate(merges):
      left, right = _checked(pair, place, len(pieces))
      piece = pieces[left] + pieces[right]
      # Two pairs may make the same bytes: then the first one's id stands.
      if piece not in known:
        known.add(piece)
        pieces.append(piece)
      self._merges.append((left, right))
    self.pieces = tuple(pieces)

  @classmethod
  def train(
    cls, texts: Iterable[str | bytes], vocab_size: int
  ) -> "BPETokenizer":
    """Learns a vocabulary; the same texts always give the same.

    Args:
      texts: What to learn from: UTF-8, none of them empty.
      vocab_size: How many ids there shall be, the separator and 256 bytes
        among them; at least 257.

    Returns:
      The tokenizer, of exactly that size.

    Raises:
      ValueError: If the size is out of range, the texts are no UTF-8, or they
        repeat too few pairs for a vocabulary of that size.

    >>> tokenizer = BPETokenizer.train(["to be or not to be"], 259)
    >>> tokenizer.pieces[257:], tokenizer.encode("be to").tolist()
    ((b'be', b'to'), [257, 33, 258])
    """
    if vocab_size < _BYTES:
      raise ValueError(
        f"vocab_size must be at least {_BYTES}, the separator and 256 bytes, "
        f"got {vocab_size=}."
      )
    import tokenizers  # Only who uses byte pairs pays for the import.
    from tokenizers import models, trainers

    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size - 1,  # The separator is no word of any text.
      min_frequency=2,
      initial_alphabet=_alphabet(),
      show_progress=False,
    )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = _cutter()
    learner.train_from_iterator(_strings(texts), trainer)
    tokenizer = cls(_ids(json.loads(learner.to_str())["model"]["merges"]))
    if tokenizer.vocab_size < vocab_size:
      raise ValueError(
        f"vocab_size must be at most {tokenizer.vocab_size} for these texts, "
        f"which repeat no more pairs, got {vocab_size=}."
      )
    return tokenizer

  def to_json(self) -> str:
    """Returns the merges, as a JSON object."""
    return self._json

  def __repr__(self) -> str:
    """Returns its kind and size."""
    return f"BPETokenizer(vocab_size={self.vocab_size})"

  def __reduce__(self) -> tuple[Any, ...]:
    """Pickles the merges; what encodes is made again."""
    return BPETokenizer, (self._merges,)

  @functools.cached_property
  def _json(self) -> str:
    fields = {"kind": "bpe", "merges": self._merges}
    return json.dumps(fields, separators=(",", ":"))

  @functools.cached_property
  def _encoder(self) -> Any:
    import tokenizers
    from tokenizers import models

    names = [_name(piece) for piece in self.pieces]
    encoder = tokenizers.Tokenizer(
      models.BPE(
        vocab={name: place for place, name in enumerate(names) if name},
        merges=[(names[left], names[right]) for left, right in self._merges],
      )
    )
    encoder.pre_tokenizer = _cutter()
    return encoder

  def _prepare(self, text: str | bytes) -> str:
    return _string(text)

  def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _checked(pair: Sequence[int], place: int, size: int) -> tuple[int, int]:
  """Returns the ids of a pair, which must be below `size`."""
  is_pair = len(pair) == 2 and all(type(side) is int for side in pair)
  if not (is_pair and all(0 < side < size for side in pair)):
    raise ValueError(
      f"merges[{place}] must be two ids in [1, {size}), got {pair!r}."
    )
  return pair[0], pair[1]


def _string(text: str | bytes) -> str:
  raw = utf8(text)
  try:
    return raw.decode() if isinstance(text, bytes) else text
  except UnicodeDecodeError as error:
    raise ValueError(
      f"text must be UTF-8 for byte pairs, got byte {raw[error.start]:#04x} at "
      f"byte {error.start}; a ByteTokenizer takes any but NUL."
    ) from error


def _strings(texts: Iterable[str | bytes]) -> Iterator[str]:
  total = operator.length_hint(texts) or None
  for place, text in enumerate(tracked(texts, "learning byte pairs", total)):
    try:
      yield _string(text)
    except ValueError as error:
      raise ValueError(f"texts[{place}]: {error}") from error


def _cutter() -> Any:
  from tokenizers import pre_tokenizers

  return pre_tokenizers.ByteLevel(add_prefix_space=False)


@functools.cache
def _alphabet() -> list[str]:
  """Returns the character that stands for each byte in `tokenizers`.

  Bytes that are printable in Latin-1 stand for themselves; the others are the
  characters from 256 on, in order.
  """
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return [
    chr(byte if byte in printable else next(others)) for byte in range(256)
  ]


def _name(piece: bytes) -> str:
  alphabet = _alphabet()
  return "".join([alphabet[byte] for byte in piece])


def _ids(merges: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
  """Returns merges of names as merges of our ids."""
  places = {name: byte + 1 for byte, name in enumerate(_alphabet())}
  pairs = []
  for left, right in merges:
    pairs.append((places[left], places[right]))
    places.setdefault(left + right, len(places) + 1)
  return pairs
