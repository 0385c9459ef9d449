"""Reads the texts of a prepared TFDS data set as packed tokens."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from deepseek_jax.data import text
from deepseek_jax.data.dataset import Dataset
from deepseek_jax.data.features import text_feature
from deepseek_jax.data.packing import check_memory, pack
from deepseek_jax.data.prepared import damaged
from deepseek_jax.data.reading import open_splits
from deepseek_jax.data.token_cache import Encoded, cached
from deepseek_jax.data.tokenizers import ByteTokenizer, make_tokenizer
from deepseek_jax.data.tokens import Tokenizer

_CHUNK = 256  # Documents read at a time.
_FORMAT = 1  # Of the files; counted up when the same arguments mean another.


def read(
  name: str,
  builder: tfds.core.DatasetBuilder,
  *,
  root: Path,
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
    root: The data directory, where encoded texts are kept.
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
  texts = {
    split: _Documents(source, feature)
    for split, source in open_splits(builder, splits).items()
  }

  def encode() -> Encoded:
    made = make_tokenizer(tokenizer, lambda: texts["train"])
    streams = {
      split: pack(documents, made, name=split, memory_limit=memory_limit)
      for split, documents in texts.items()
    }
    return Encoded(made, streams)

  if tokenizer in ("bytes", ByteTokenizer()):  # As quick to make as to read.
    encoded = encode()
  else:
    encoded = cached(_place(root, builder, feature, splits, tokenizer), encode)
  for split, stream in encoded.streams.items():
    check_memory(stream.nbytes, memory_limit, name=split)
  return text.packed(name, encoded.streams, encoded.tokenizer, length)


class _Documents:
  """The texts of a TFDS data source that are not empty."""

  def __init__(self, source: Any, feature: str):
    self._source = source
    self._feature = feature

  def __len__(self) -> int:
    """Returns how many there are, the empty ones among them."""
    return len(self._source)

  def __iter__(self) -> Iterator[bytes]:
    for start in range(0, len(self), _CHUNK):
      rows = [*range(start, min(start + _CHUNK, len(self)))]
      try:
        examples = self._source.__getitems__(rows)
      except Exception as error:
        path = self._source.dataset_info.data_dir
        raise ValueError(damaged(path, error)) from error
      yield from filter(None, (each[self._feature] for each in examples))


def _place(
  root: Path,
  builder: tfds.core.DatasetBuilder,
  feature: str,
  splits: Mapping[str, str] | None,
  tokenizer: str | Tokenizer,
) -> Path:
  """Returns the file for what is made of these texts by this tokenizer."""
  asked = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
  info = builder.info
  sizes = [
    (split.name, split.num_examples, split.num_bytes)
    for split in info.splits.values()
  ]
  chosen = None if splits is None else sorted(splits.items())
  identity = json.dumps(
    [_FORMAT, info.full_name, sizes, feature, chosen, asked]
  )
  digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
  return root / ".tokens" / f"{info.full_name.replace('/', '-')}-{digest}.npz"
