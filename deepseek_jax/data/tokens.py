"""What every tokenizer can do: token ids of text, and text of token ids."""

import abc
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Int32

_BATCH = 2**20  # Characters encoded at a time: bounds the memory beside tokens.


class Tokenizer(abc.ABC):
  """What turns text into token ids and back.

  Id 0 is the separator, which starts a document and stands for no text. Two
  tokenizers that encode alike are equal, and hash alike.

  Attributes:
    separator: 0.
    pieces: The bytes each token stands for; none for the separator.
  """

  separator: int = 0
  pieces: tuple[bytes, ...]

  @abc.abstractmethod
  def to_json(self) -> str:
    """Returns what `tokenizer_from_json` makes an equal tokenizer of."""

  @abc.abstractmethod
  def _prepare(self, text: str | bytes) -> str | bytes:
    """Checks a text, and returns it as `_encode` takes it."""

  @abc.abstractmethod
  def _encode(self, texts: Sequence[Any]) -> list[np.ndarray]:
    """Encodes what `_prepare` returned."""

  @property
  def vocab_size(self) -> int:
    """How many token ids there are, the separator among them."""
    return len(self.pieces)

  @functools.cached_property
  def token_bytes(self) -> Int32[np.ndarray, "V"]:
    """How many bytes of text each token stands for; 0 for the separator.

    The sum over the tokens of a text is its length in UTF-8, so a loss in nats
    per token becomes bits per byte whatever the vocabulary.
    """
    lengths = np.array([len(piece) for piece in self.pieces], np.int32)
    lengths.flags.writeable = False
    return lengths

  def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
    """Returns the token ids of a text, without a separator.

    Args:
      text: Not empty. Strings are encoded as UTF-8.

    Returns:
      Ids in [1, vocab_size).

    Raises:
      ValueError: If the text is empty, or holds what the tokenizer cannot say.
    """
    return self._encode([self._prepare(text)])[0]

  def encode_all(
    self, texts: Iterable[str | bytes], *, name: str = "texts"
  ) -> Iterator[Int32[np.ndarray, "_"]]:
    """Yields the token ids of many texts: faster than one after the other.

    Args:
      texts: As `encode` takes them.
      name: What to call them in an error.

    Yields:
      What `encode` returns for each.

    Raises:
      ValueError: As `encode`, naming the text: "texts[17]: ...".
    """
    batch, size = [], 0
    for place, text in enumerate(texts):
      try:
        batch.append(self._prepare(text))
      except ValueError as error:
        raise ValueError(f"{name}[{place}]: {error}") from error
      size += len(text)
      if size >= _BATCH:
        yield from self._encode(batch)
        batch, size = [], 0
    yield from self._encode(batch)

  def decode(self, ids: npt.ArrayLike) -> str:
    """Returns the text of token ids; separators are dropped.

    Bytes that are no UTF-8, as a sequence of them cut in two, become U+FFFD.

    Args:
      ids: Integers in [0, vocab_size), along one axis.

    Raises:
      ValueError: If there is no such id.
    """
    rows = np.asarray(ids)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
      raise ValueError(
        "ids must be integers along one axis, got an array of shape "
        f"{rows.shape} and type {rows.dtype}."
      )
    bad = (rows < 0) | (rows >= self.vocab_size)
    if bad.any():
      raise ValueError(
        f"ids must be in [0, {self.vocab_size}), got {rows[bad][0]} at place "
        f"{bad.argmax()}."
      )
    pieces = self.pieces
    return b"".join([pieces[i] for i in rows.tolist()]).decode(errors="replace")

  def __eq__(self, other: object) -> bool:
    """Says whether another tokenizer encodes the same."""
    if not isinstance(other, Tokenizer):
      return NotImplemented
    return self.to_json() == other.to_json()

  def __hash__(self) -> int:
    """Hashes what `__eq__` compares."""
    return hash(self.to_json())


def utf8(text: str | bytes) -> bytes:
  """Returns the bytes of a text.

  Raises:
    ValueError: If it is empty, or a string that has none.
  """
  if not text:
    raise ValueError("text must not be empty.")
  if isinstance(text, bytes):
    return text
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"text must be encodable as UTF-8, got the lone surrogate "
      f"{text[error.start]!r} at character {error.start}."
    ) from error
