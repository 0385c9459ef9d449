"""Reads the texts of a prepared TFDS data set as packed tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from deepseek_jax.data import text
from deepseek_jax.data.dataset import Dataset
from deepseek_jax.data.features import text_feature
from deepseek_jax.data.packing import pack
from deepseek_jax.data.prepared import damaged
from deepseek_jax.data.reading import open_splits
from deepseek_jax.data.tokenizers import Tokenizer, make_tokenizer

_CHUNK = 256  # Documents read at a time.


def read(
  name: str,
  builder: tfds.core.DatasetBuilder,
  *,
  length: int,
  tokenizer: str | Tokenizer,
  inputs: Sequence[str] | None,
  target: str | None,
  splits: Mapping[str, str] | None,
  memory_limit: int,
) -> Dataset:
  """Returns the texts a builder has prepared, for a language model.

  Args:
    name: The name the data set shall have.
    builder: A builder whose data is in place.
    length: Tokens a row.
    tokenizer: "bytes", "bpe:SIZE" or a tokenizer.
    inputs: The one feature to read; `None` takes the data set's text.
    target: Must be `None`: what is predicted are the tokens that follow.
    splits: As `reading.read`.
    memory_limit: The most bytes a split's tokens may take.

  Returns:
    The data set; documents without text are left out.

  Raises:
    ValueError: If the features do not suit, or the files cannot be read.
  """
  if target is not None:
    raise ValueError(
      "target must be None for tokens, which predict those that follow, got "
      f"{target=}."
    )
  feature = text_feature(builder.info, inputs)
  sources = open_splits(builder, splits)
  made = make_tokenizer(
    tokenizer, lambda: _documents(sources["train"], feature)
  )
  streams = {
    split: pack(
      _documents(source, feature),
      made,
      name=split,
      memory_limit=memory_limit,
    )
    for split, source in sources.items()
  }
  return text.packed(name, streams, made, length)


def _documents(source: Any, feature: str) -> Iterator[bytes]:
  """Yields the texts of a TFDS data source that are not empty."""
  for start in range(0, len(source), _CHUNK):
    rows = range(start, min(start + _CHUNK, len(source)))
    try:
      examples = source.__getitems__([*rows])
    except Exception as error:
      path = source.dataset_info.data_dir
      raise ValueError(damaged(path, error)) from error
    yield from filter(None, (example[feature] for example in examples))
