"""Keeps what was learned and encoded, so that it is done once."""

import contextlib
import dataclasses
import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import filelock
import numpy as np

from deepseek_jax.data.tokenizers import tokenizer_from_json
from deepseek_jax.data.tokens import Tokenizer

_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
  """A tokenizer, and the stream of tokens it made of each split.

  Attributes:
    tokenizer: What encoded.
    streams: What `pack` returned, by split.
  """

  tokenizer: Tokenizer
  streams: Mapping[str, np.ndarray]


def cached(path: Path, make: Callable[[], Encoded]) -> Encoded:
  """Returns what a file holds, made and written first if it holds nothing.

  One process makes while others wait. The file appears when it is complete; a
  damaged one is replaced. Where nothing can be written, nothing is kept.

  Args:
    path: The file, in a directory for such files.
    make: Does the work.
  """
  if (found := _read(path)) is not None:
    return found
  with contextlib.ExitStack() as stack:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      stack.enter_context(filelock.FileLock(path.parent / ".lock"))
    except OSError as error:
      logging.getLogger(__name__).info("Tokens are not kept: %s", error)
      return make()
    if (found := _read(path)) is not None:  # Another process was faster.
      return found
    made = make()
    _write(path, made)
    return made


def _read(path: Path) -> Encoded | None:
  """Returns what `_write` wrote, or `None` if it cannot be read."""
  try:
    # A zip, whose checksums are compared. NumPy alone would not close it if it
    # is damaged.
    with path.open("rb") as stored, np.load(stored) as file:
      tokenizer = tokenizer_from_json(file["tokenizer"].tobytes().decode())
      return Encoded(tokenizer, {split: file[split] for split in _SPLITS})
  except FileNotFoundError:
    return None
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
    logging.getLogger(__name__).warning("Making %s anew: %s", path, error)
    return None


def _write(path: Path, encoded: Encoded) -> None:
  partial = path.with_name(f".{path.name}.partial")
  text = encoded.tokenizer.to_json().encode()
  try:
    with partial.open("wb") as file:
      np.savez(
        file,
        tokenizer=np.frombuffer(text, np.uint8),
        train=encoded.streams["train"],
        validation=encoded.streams["validation"],
        test=encoded.streams["test"],
      )
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
  except OSError as error:
    logging.getLogger(__name__).warning("Tokens are not kept: %s", error)
    partial.unlink(missing_ok=True)
