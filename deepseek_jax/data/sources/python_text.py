"""The running Python's standard library as a TFDS data set of texts."""

import hashlib
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import ClassVar

import tensorflow_datasets as tfds

_DESCRIPTION = """
The source text of the standard library of one version of Python, one example a
file, without its tests: some 660 files and 12 MB of English and code. Of twenty
files one is for validation and one for testing.
"""

_CITATION = """
@misc{python,
  author = {Python Software Foundation},
  title = {The Python standard library},
  howpublished = {https://docs.python.org/3/library/}
}
"""

# Tests, what others installed, and what is made when Python is built.
_LEFT_OUT = frozenset(
  {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
  }
)
_MADE = ("_sysconfigdata", "config-")


class PythonText(tfds.core.GeneratorBasedBuilder):
  """Source files in three fixed, disjoint splits; a configuration a Python.

  A file is the text its interpreter reads: decoded by its coding cookie, UTF-8
  if it has none, every newline a line feed. Files that are empty, hold a NUL or
  cannot be decoded are left out. The split follows from the SHA-256 of the path
  alone, so a file that two versions of Python have is on one side in both.

  References:
    Python Software Foundation, "The Python standard library",
    https://docs.python.org/3/library/.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar = {"1.0.0": "First release."}
  BUILDER_CONFIGS: ClassVar = [
    tfds.core.BuilderConfig(
      name=f"py{platform.python_version()}",
      description=f"The library of Python {platform.python_version()}.",
    )
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      citation=_CITATION,
      homepage="https://docs.python.org/3/library/",
      features=tfds.features.FeaturesDict(
        {"path": tfds.features.Text(), "text": tfds.features.Text()}
      ),
      supervised_keys=("text", "text"),
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> Mapping[str, Iterator[tuple[str, dict[str, str]]]]:
    library = Path(sysconfig.get_path("stdlib"))
    parts = {"train": [], "validation": [], "test": []}
    for path in sorted(_files(library)):
      parts[split_of(path)].append(path)
    return {
      name: self._generate_examples(library, part)
      for name, part in parts.items()
    }

  def _generate_examples(
    self, library: Path, part: Sequence[PurePath]
  ) -> Iterator[tuple[str, dict[str, str]]]:
    for relative in part:
      if text := _read(library / relative):
        path = relative.as_posix()
        yield path, {"path": path, "text": text}


def split_of(path: PurePath) -> str:
  """Returns the split of a file, by its path relative to the library.

  >>> split_of(PurePath("json/decoder.py"))
  'train'
  """
  digest = hashlib.sha256(path.as_posix().encode()).digest()
  place = int.from_bytes(digest) % 20
  return {0: "validation", 1: "test"}.get(place, "train")


def _files(library: Path) -> Iterator[PurePath]:
  """Yields the source files of a library, relative to it."""
  for folder, folders, files in os.walk(library):
    # Not walked into: what was installed beside the library may be vast.
    folders[:] = [name for name in folders if _belongs(name)]
    relative = PurePath(folder).relative_to(library)
    for name in files:
      if name.endswith(".py") and _belongs(name):
        yield relative / name


def _belongs(name: str) -> bool:
  return name not in _LEFT_OUT and not name.startswith(_MADE)


def _read(path: Path) -> str:
  """Returns a file's text, or nothing if it has none a model could read."""
  try:
    with tokenize.open(path) as file:
      text = file.read()
  except (SyntaxError, UnicodeDecodeError):  # A bad cookie, or none.
    return ""
  return "" if "\0" in text else text
