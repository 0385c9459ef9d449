"""Loads a data set by name."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_jax.data.dataset import Dataset
from deepseek_jax.data.schema import unknown
from deepseek_jax.data.text import check_length
from deepseek_jax.data.tokenizers import check_tokenizer
from deepseek_jax.data.tokens import Tokenizer

if TYPE_CHECKING:
  import tensorflow_datasets as tfds


class NotPreparedError(RuntimeError):
  """A data set cannot be prepared here; the message says what to run where."""


def load(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  download: bool = True,
  inputs: Sequence[str] | None = None,
  target: str | None = None,
  splits: Mapping[str, str] | None = None,
  memory_limit: int = 2**30,
  length: int | None = None,
  tokenizer: str | Tokenizer = "bytes",
) -> Dataset:
  """Loads a data set, preparing it first if it is not on disk.

  Preparing is safe when many processes load at once and when one is killed: a
  lock lets one prepare, into a directory that is renamed when it is complete.
  No TensorFlow is needed to read; some of TFDS's own builders need it to
  prepare, and the error then says what to run where.

  Args:
    name: "digits" (scikit-learn's, made offline in about two seconds),
      "python_text" (the running Python's library, for language models) or
      "tfds:NAME", "tfds:NAME/CONFIG", "tfds:NAME:VERSION" for any data set of
      TFDS, or any that is prepared in `data_dir`.
    data_dir: Where data sets live, a local directory; `None` is TFDS's default,
      `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
    download: Whether the network may be used to prepare.
    inputs: The features to read; `None` takes the data set's supervised keys.
    target: The feature to predict; `None` takes the data set's.
    splits: For each of "train", "validation" and "test" a TFDS split such as
      "train[:80%]". `None` takes the data set's own; if it has no validation
      split the last 10 % of train, and if it has no test split either the
      10 % before those.
    memory_limit: In bytes. A split whose decoded columns take at most this is
      held in memory; a larger one is read from its files batch by batch, or
      refused if it is text.
    length: Tokens a row of text, which are packed (see `PackedReader`); at
      least 1. `None` is 512 for "python_text", and otherwise reads no text.
    tokenizer: What makes tokens of text: "bytes", "bpe:SIZE" for byte pairs
      learned from the training split, or a tokenizer.

  Returns:
    The data set, checked: shapes agree, numbers are finite, labels in range
    (what is not held in memory is checked when it is read).

  Raises:
    ValueError: If the name or a feature is unknown, or the data is bad.
    NotPreparedError: If the data set cannot be prepared here.

  >>> import deepseek_jax as dj
  >>> digits = dj.data.load("digits")
  >>> len(digits.train), len(digits.validation), len(digits.test)
  (1257, 180, 360)
  >>> digits.schema.input_shapes, digits.schema.num_classes
  ({'image': (8, 8, 1)}, 10)
  """
  # TFDS takes half a second to import: only who loads a data set pays.
  from deepseek_jax.data import prepared, reading, reading_text

  _check_text(name, length, tokenizer)
  root = prepared.data_root(data_dir)
  if name == "digits":
    builder = prepared.ensure("digits:1.0.0", root, lambda: _make_digits(root))
  elif name == "python_text":
    builder = _python_text(root)
    length = 512 if length is None else length
  elif name.startswith("tfds:") and len(name) > 5:
    builder = prepared.ensure(
      name[5:],
      root,
      lambda: prepared.make(name[5:], root, download=download),
    )
  else:
    raise ValueError(unknown("data set", name, _known(root)))
  if length is not None:
    return reading_text.read(
      name,
      builder,
      root=root,
      length=length,
      tokenizer=tokenizer,
      inputs=inputs,
      target=target,
      splits=splits,
      memory_limit=memory_limit,
    )
  return reading.read(
    name,
    builder,
    inputs=inputs,
    target=target,
    splits=splits,
    memory_limit=memory_limit,
  )


def _make_digits(root: Path) -> None:
  from deepseek_jax.data import prepared
  from deepseek_jax.data.sources.digits import Digits

  builder = Digits(data_dir=root, file_format="array_record")
  prepared.prepare(builder, root, quiet=True)


def _python_text(root: Path) -> "tfds.core.DatasetBuilder":
  from deepseek_jax.data import prepared
  from deepseek_jax.data.sources.python_text import PythonText

  def make() -> None:
    builder = PythonText(data_dir=root, file_format="array_record")
    prepared.prepare(builder, root, quiet=True)

  config = f"py{platform.python_version()}"
  return prepared.ensure(f"python_text/{config}:1.0.0", root, make)


def _check_text(
  name: str, length: int | None, tokenizer: str | Tokenizer
) -> None:
  """Refuses the arguments of text for what is none."""
  if length is not None:
    check_length(length)
  if isinstance(tokenizer, str):
    check_tokenizer(tokenizer)
  given = length is not None or tokenizer != "bytes"
  if name == "digits" and given:
    raise ValueError(
      f"length and tokenizer are for data sets of text, {name!r} has none; got "
      f"{length=}, {tokenizer=}."
    )
  if name != "python_text" and length is None and given:
    raise ValueError(
      "length must be given to read text as tokens, got length=None, "
      f"{tokenizer=}."
    )


def _known(root: Path) -> list[str]:
  import tensorflow_datasets as tfds

  names = set(tfds.list_builders(with_community_datasets=False))
  if root.is_dir():
    names |= {path.name for path in root.glob("[!.]*") if path.is_dir()}
  return ["digits", "python_text", *(f"tfds:{name}" for name in names)]
