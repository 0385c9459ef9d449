"""Documents of any length as rows of one length, without waste."""

import operator
import sys
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int32, Integer, Shaped

from deepseek_jax.data.dataset import Columns
from deepseek_jax.data.progress import tracked
from deepseek_jax.data.tokens import Tokenizer

INPUT, TARGET = "tokens", "targets"


def pack(
  documents: Iterable[str | bytes],
  tokenizer: Tokenizer,
  *,
  name: str = "documents",
  memory_limit: int = sys.maxsize,
) -> Shaped[np.ndarray, "N"]:
  """Returns one stream of tokens: separator, document, separator, document.

  Args:
    documents: Texts, at least one, none of them empty.
    tokenizer: What encodes them.
    name: What to call them in an error.
    memory_limit: The most bytes the stream may take.

  Returns:
    Token ids, in the smallest unsigned type that holds them.

  Raises:
    ValueError: If there is no document, a document cannot be encoded, or the
      stream is too long.

  >>> from deepseek_jax.data import ByteTokenizer
  >>> pack(["ab", "c"], ByteTokenizer())
  array([ 0, 97, 98,  0, 99], dtype=uint8)
  """
  dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
  separator = np.array(tokenizer.separator, dtype).tobytes()
  # A bytearray grows in place, where a list of arrays would be held twice.
  stream = bytearray()
  total = operator.length_hint(documents) or None
  shown = tracked(documents, f"tokenizing {name}", total)
  for tokens in tokenizer.encode_all(shown, name=name):
    stream += separator
    stream += tokens.astype(dtype).tobytes()
    check_memory(len(stream), memory_limit, name=name)
  if not stream:
    raise ValueError(f"{name}: a split must hold at least one text, got 0.")
  return np.frombuffer(stream, dtype)


def check_memory(num_bytes: int, memory_limit: int, *, name: str) -> None:
  """Refuses a stream that takes too many bytes."""
  if num_bytes > memory_limit:
    raise ValueError(
      f"memory_limit must hold the tokens of {name!r}, which take {num_bytes} "
      f"bytes or more, got {memory_limit=}; raise it, or load a part of the "
      "data by splits."
    )


class PackedReader:
  """Rows of tokens and of the tokens that follow them, out of one stream.

  Row i reads `tokens = stream[i T : i T + T]` and predicts
  `targets = stream[i T + 1 : i T + T + 1]`, so every token after the first is
  predicted once, the separator that ends a document too. What the last row
  lacks is the separator in `tokens` and -1, nothing to predict, in `targets`.

  A row holds the end of one document, then others: attention must not cross
  from one to the next (`segment_ids`). In return nothing is lost to padding,
  where rows of one document each are mostly padding.

  Args:
    stream: Token ids, as `pack` returns them; at least two.
    length: T, the tokens of a row; at least 1.
    separator: The id that starts a document.

  Raises:
    ValueError: If the stream or the length is too short.

  >>> reader = PackedReader(np.arange(6, dtype=np.uint8), 4)
  >>> reader.take(np.array([0, 1]))["targets"]
  array([[ 1,  2,  3,  4],
         [ 5, -1, -1, -1]], dtype=int32)

  References:
    Raffel et al., "Exploring the limits of transfer learning with a unified
    text-to-text transformer", 2020, https://arxiv.org/abs/1910.10683 (packing).
  """

  def __init__(
    self, stream: Shaped[np.ndarray, "N"], length: int, separator: int = 0
  ):
    if length < 1:
      raise ValueError(f"length must be at least 1, got {length=}.")
    if len(stream) < 2:
      raise ValueError(
        f"stream must hold at least 2 tokens, got {len(stream)}."
      )
    predicted = len(stream) - 1
    self._rows = -(-predicted // length)
    self._length = length
    self._tail = predicted - (self._rows - 1) * length
    # The stream is held once: rows are views of it until they are gathered.
    self._stream = np.full(self._rows * length + 1, separator, stream.dtype)
    self._stream[: len(stream)] = stream

  def __len__(self) -> int:
    """Returns how many rows there are."""
    return self._rows

  def take(self, indices: Integer[np.ndarray, "*B"]) -> Columns:
    """Gathers the rows at `indices`, without a Python loop over them.

    Args:
      indices: Integers in [0, len(reader)).

    Returns:
      "tokens" as they are stored and "targets" as int32, [*B, T].

    Raises:
      IndexError: If an index is out of range.
    """
    if indices.size and indices.min() < 0:
      raise IndexError(f"an index must be at least 0, got {indices.min()}.")
    step = self._stream.itemsize
    windows = np.ndarray(
      (self._rows, self._length + 1),
      self._stream.dtype,
      self._stream,
      strides=(self._length * step, step),
    )
    rows = windows[indices]
    targets = rows[..., 1:].astype(np.int32)
    is_last = indices == self._rows - 1
    if is_last.any():
      targets[is_last, self._tail :] = -1
    return {INPUT: rows[..., :-1], TARGET: targets}


def segment_ids(
  tokens: Integer[np.ndarray, "*B T"], separator: int = 0
) -> Int32[np.ndarray, "*B T"]:
  """Returns which of its row's documents each token belongs to.

  A separator starts a document and belongs to it. What is left of a document
  that an earlier row began has 0; so has nothing in a row that begins with a
  separator. Tokens of one document see each other, others do not.

  Args:
    tokens: Token ids of packed rows.
    separator: The id that starts a document.

  >>> segment_ids(np.array([7, 7, 0, 5, 5, 0, 3]))
  array([0, 0, 1, 1, 1, 2, 2], dtype=int32)
  """
  return np.cumsum(tokens == separator, axis=-1, dtype=np.int32)
