"""Tokenizers: bytes as they are, and any by its name or its JSON."""

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from deepseek_jax.data.byte_pairs import BPETokenizer
from deepseek_jax.data.tokens import Tokenizer, utf8


class ByteTokenizer(Tokenizer):
  """Every byte of the UTF-8 text is a token, and NUL is the separator.

  No text that people write holds a NUL byte, so 256 ids are enough.

  >>> tokenizer = ByteTokenizer()
  >>> tokenizer.encode("né")
  array([110, 195, 169], dtype=int32)
  >>> tokenizer.decode([0, 110, 195, 169])
  'né'
  """

  pieces = (b"", *(bytes([byte]) for byte in range(1, 256)))

  def to_json(self) -> str:
    """Returns "bytes": there is nothing else to say."""
    return "bytes"

  def __repr__(self) -> str:
    """Returns how to make one."""
    return "ByteTokenizer()"

  def _prepare(self, text: str | bytes) -> bytes:
    raw = utf8(text)
    if (place := raw.find(0)) >= 0:
      raise ValueError(
        "text must hold no NUL byte, which is a ByteTokenizer's separator, got "
        f"one at byte {place} of {len(raw)}."
      )
    return raw

  def _encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(raw, np.uint8).astype(np.int32) for raw in texts]


@functools.lru_cache(maxsize=8)
def tokenizer_from_json(text: str) -> Tokenizer:
  """Returns the tokenizer whose `to_json` wrote a text.

  Args:
    text: What `to_json` returned.

  Raises:
    ValueError: If it is nothing of that kind.

  >>> tokenizer_from_json("bytes")
  ByteTokenizer()
  """
  if text == "bytes":
    return ByteTokenizer()
  try:
    fields = json.loads(text)
    if fields.pop("kind") != "bpe":
      raise KeyError("kind")
    return BPETokenizer(**fields)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"text must be a tokenizer written by to_json, got {text[:80]!r}."
    ) from error


def check_tokenizer(name: str) -> int | None:
  """Returns the size that "bpe:SIZE" asks for, or `None` for "bytes".

  Raises:
    ValueError: If it is neither.
  """
  if name == "bytes":
    return None
  if found := re.fullmatch(r"bpe:(\d{1,9})", name, re.ASCII):
    return int(found[1])
  raise ValueError(
    'tokenizer must be "bytes", "bpe:SIZE" or a Tokenizer, got '
    f"tokenizer={name!r}."
  )


def make_tokenizer(
  tokenizer: str | Tokenizer, texts: Callable[[], Iterable[str | bytes]]
) -> Tokenizer:
  """Returns a tokenizer by its name, or the one that was given.

  Args:
    tokenizer: "bytes", "bpe:SIZE" or a tokenizer.
    texts: Returns what byte pairs are learned from.

  Raises:
    ValueError: If the name is unknown, or too little text to learn from.
  """
  if isinstance(tokenizer, Tokenizer):
    return tokenizer
  size = check_tokenizer(tokenizer)
  return ByteTokenizer() if size is None else BPETokenizer.train(texts(), size)
