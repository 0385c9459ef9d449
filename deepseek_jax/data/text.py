"""Data sets of texts: rows of tokens, and the tokens that follow them."""

from collections.abc import Iterable, Mapping

import numpy as np

from deepseek_jax.data.dataset import Dataset, Split
from deepseek_jax.data.packing import INPUT, TARGET, PackedReader, pack
from deepseek_jax.data.schema import Feature, Schema
from deepseek_jax.data.tokenizers import check_tokenizer, make_tokenizer
from deepseek_jax.data.tokens import Tokenizer

Texts = Iterable[str | bytes]


def from_texts(
  train: Texts,
  validation: Texts,
  test: Texts,
  *,
  length: int,
  tokenizer: str | Tokenizer = "bytes",
  name: str = "texts",
) -> Dataset:
  """Returns a data set for a language model of documents in memory.

  Args:
    train: Documents to learn from: texts, none of them empty.
    validation: Documents to validate on.
    test: Documents to test on.
    length: Tokens a row; at least 1.
    tokenizer: "bytes", "bpe:SIZE" for byte pairs learned from `train`, or a
      tokenizer.
    name: The data set's name.

  Returns:
    The data set: documents packed into rows (see `PackedReader`), with the
    columns "tokens" and "targets".

  Raises:
    ValueError: If an argument is out of range, or a text cannot be encoded.

  >>> texts = from_texts(["abc", "de"], ["f"], ["g"], length=4)
  >>> texts.train[:]["tokens"]
  array([[  0,  97,  98,  99],
         [  0, 100, 101,   0]], dtype=uint8)
  >>> texts.schema.task, texts.schema.vocab_size
  ('language', 256)
  """
  texts = {"train": train, "validation": validation, "test": test}
  for split, documents in texts.items():
    if isinstance(documents, str | bytes):
      raise ValueError(
        f"{split} must be several texts, got one; put it into a list."
      )
  check_length(length)
  if isinstance(tokenizer, str) and check_tokenizer(tokenizer) is not None:
    texts["train"] = list(train)  # Read twice.
  made = make_tokenizer(tokenizer, lambda: texts["train"])
  streams = {
    split: pack(documents, made, name=split)
    for split, documents in texts.items()
  }
  return packed(name, streams, made, length)


def packed(
  name: str,
  streams: Mapping[str, np.ndarray],
  tokenizer: Tokenizer,
  length: int,
) -> Dataset:
  """Returns the data set of three streams of tokens.

  Args:
    name: The name the data set shall have.
    streams: What `pack` returned for "train", "validation" and "test".
    tokenizer: What encoded them.
    length: Tokens a row.
  """
  schema = _schema(length, tokenizer)
  splits = {
    split: Split(
      split, schema, PackedReader(stream, length, tokenizer.separator)
    )
    for split, stream in streams.items()
  }
  return Dataset(name=name, schema=schema, **splits)


def check_length(length: int) -> None:
  """Refuses rows without tokens."""
  if length < 1:
    raise ValueError(f"length must be at least 1, got {length=}.")


def _schema(length: int, tokenizer: Tokenizer) -> Schema:
  size = tokenizer.vocab_size
  features = {
    INPUT: Feature(
      kind="tokens",
      shape=(length,),
      dtype=np.min_scalar_type(size - 1).name,
      vocab_size=size,
      tokenizer=tokenizer.to_json(),
    ),
    TARGET: Feature(
      kind="tokens", shape=(length,), dtype="int32", vocab_size=size
    ),
  }
  return Schema(features=features, inputs=(INPUT,), target=TARGET)
