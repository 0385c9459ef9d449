"""Finds a TFDS data set on disk, or prepares it there, safely and once."""

import contextlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import tensorflow_datasets as tfds

from deepseek_jax.data.loading import NotPreparedError
from deepseek_jax.data.schema import unknown

_FORMAT = "array_record"  # The one that can be read at any index without TF.


def data_root(data_dir: str | os.PathLike[str] | None) -> Path:
  """Returns the directory data sets live in: the argument or TFDS's default."""
  # Read now, because TFDS reads the variable once, when it is imported.
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return Path(data_dir or default).expanduser()


def ensure(
  name: str, root: Path, make: Callable[[], None]
) -> tfds.core.DatasetBuilder:
  """Returns a builder that reads a data set, made first if it is not there.

  Args:
    name: As TFDS writes it: "name", "name/config", "name:1.2.3".
    root: The data directory.
    make: Prepares the data set in `root`, or does nothing if it is there.

  Returns:
    A builder made from the files alone, whoever wrote them.

  Raises:
    ValueError: If what is there cannot be read.
  """
  builder = find(name, root)
  if builder is None:
    make()
    builder = find(name, root)
  if builder is None:
    error = FileNotFoundError("its description is missing")
    raise ValueError(damaged(_directory(name, root), error))
  return builder


def find(name: str, root: Path) -> tfds.core.DatasetBuilder | None:
  """Returns a builder that reads what is prepared under `root`, if any is.

  Args:
    name: As TFDS writes it: "name", "name/config", "name:1.2.3".
    root: The data directory.

  Returns:
    A builder that needs none of the code the data set was made by, or `None`.

  Raises:
    ValueError: If the directory is there but its description cannot be read.
  """
  try:
    return tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
  except tfds.core.registered.DatasetNotFoundError:
    return None
  except Exception as error:  # TFDS raises many types for a damaged directory.
    raise ValueError(damaged(_directory(name, root), error)) from error


def damaged(path: str | os.PathLike, error: Exception) -> str:
  """Returns the message for a data set that cannot be read."""
  text = " ".join(f"{type(error).__name__}: {error}".split())
  return (
    f"the data set in {path} cannot be read; if it is incomplete or damaged, "
    f"delete that directory and load again. ({text[:300]})"
  )


def make(name: str, root: Path, *, download: bool = True) -> None:
  """Prepares a data set TFDS knows, unless its directory is there.

  Args:
    name: As TFDS writes it.
    root: The data directory.
    download: Whether the network may be used.

  Raises:
    ValueError: If TFDS knows no such data set.
    NotPreparedError: If it cannot be prepared here; the message is what to run,
      and where. Nothing half-made is left.
  """
  builder = _construct(name, root)
  if builder.data_path.exists():  # Made meanwhile, or damaged: reading tells.
    return
  if not download:
    raise NotPreparedError(_advice(name, root, "download is False", builder))
  if not _reachable(list(builder.url_infos or ())):
    raise NotPreparedError(
      _advice(name, root, "its host does not answer", builder)
    )
  try:
    prepare(builder, root, quiet=not sys.stderr.isatty())
  except Exception as error:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if module := _missing_module(error):
      reason = f"preparing it (not reading it) needs {module}"
    raise NotPreparedError(_advice(name, root, reason, builder)) from error


def prepare(
  builder: tfds.core.DatasetBuilder, root: Path, *, quiet: bool
) -> None:
  """Runs the builder unless its data is there; one process at a time does.

  TFDS writes into a temporary directory and renames it when it is complete, so
  a process killed in between leaves nothing that is taken for the data set.

  Args:
    builder: What prepares.
    root: The data directory it was given.
    quiet: Whether to swallow TFDS's progress bars.
  """
  root.mkdir(parents=True, exist_ok=True)
  # One lock for all, because data sets share the directory of downloads.
  with filelock.FileLock(root / ".deepseek_jax.lock"):
    if builder.data_path.exists():  # Another process was faster.
      return
    logging.getLogger(__name__).info(
      "Preparing %s in %s.", builder.info.full_name, builder.data_path
    )
    with contextlib.ExitStack() as stack:
      for path in (root / builder.name, root / "downloads"):
        stack.enter_context(_removed_on_error(path))
      if quiet:
        silence = io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(silence))
        stack.enter_context(contextlib.redirect_stderr(silence))
      builder.download_and_prepare(
        download_dir=root / "downloads", file_format=_FORMAT
      )


def _construct(name: str, root: Path) -> tfds.core.DatasetBuilder:
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints and raises.
      return tfds.builder(name, data_dir=root, file_format=_FORMAT)
  except tfds.core.registered.DatasetNotFoundError as error:
    known = tfds.list_builders(with_community_datasets=False)
    message = unknown("TFDS data set", name, known)
    raise ValueError(f"{message} It is not in {root} either.") from error
  except ImportError as error:
    reason = f"its builder needs {_missing_module(error)}"
    raise NotPreparedError(_advice(name, root, reason)) from error
  except Exception as error:  # An unknown configuration, for one.
    text = " ".join(str(error).split())[:500]
    raise ValueError(
      f"TFDS cannot make a builder for {name!r}: {text}"
    ) from error


def _advice(
  name: str,
  root: Path,
  reason: str,
  builder: tfds.core.DatasetBuilder | None = None,
) -> str:
  """Returns what to run, and where, to have the data set."""
  features = repr(builder.info.features) if builder else "Image"
  media = any(kind in features for kind in ("Image(", "Video(", "Audio("))
  packages = "tensorflow-datasets array-record importlib-resources"
  if media or builder is None:
    packages += " tensorflow"
  return (
    f"'tfds:{name}' is not prepared in {root} and cannot be prepared here: "
    f"{reason}. On a machine with a network run\n"
    f"  pip install {packages}\n"
    f"  tfds build {name} --file_format={_FORMAT} --data_dir=DIR\n"
    f"and copy DIR/{name.split('/')[0].split(':')[0]} into {root}."
  )


def _reachable(urls: list[str]) -> bool:
  """Returns whether a download can start; TFDS itself retries for minutes."""
  import requests
  from requests.compat import urlsplit

  hosts = {
    f"{parts.scheme}://{parts.netloc}"
    for parts in map(urlsplit, urls)
    if parts.scheme in ("http", "https")
  }
  for host in sorted(hosts)[:3]:
    with contextlib.suppress(requests.RequestException):
      requests.head(host, timeout=5)
      return True
  return not hosts


def _missing_module(error: BaseException | None) -> str | None:
  """Returns the module whose absence is at the root of `error`, if any is."""
  while error is not None:
    if isinstance(error, ImportError) and error.name:
      return error.name
    error = error.__cause__ or error.__context__
  return None


def _directory(name: str, root: Path) -> Path:
  return root / name.split(":")[0]


@contextlib.contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
  """Removes `path` if the block fails and it was not there before."""
  existed = path.exists()
  try:
    yield
  except BaseException:
    if not existed:
      shutil.rmtree(path, ignore_errors=True)
    raise
