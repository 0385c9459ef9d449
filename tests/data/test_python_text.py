"""Laws of Python's library as a data set: which files, in which split."""

import types
from pathlib import Path, PurePath

import pytest

from deepseek_jax import data
from deepseek_jax.data import prepared
from deepseek_jax.data.sources import python_text

SPLITS = ("train", "validation", "test")
FILES = {
  # A train, a validation and a test file, by the hash of their paths.
  "json/decoder.py": b"import re\n",
  "functools.py": b"def reduce():\n  pass\n",
  "socket.py": b"import _socket\r\nx = 1\r",
  "table.py": "# coding: latin-1\n# né\n".encode("latin-1"),
  "marked.py": b"\xef\xbb\xbf# \xc3\xa9\n",
  # None of these.
  "empty.py": b"",
  "nul.py": b"x = '\0'\n",
  "no_utf8.py": b"# \xe9\n",
  "no_codec.py": b"# coding: klingon\n",
  "README.txt": b"text",
  "test/test_json.py": b"x",
  "json/tests/decoder.py": b"x",
  "idlelib/idle_test/idle.py": b"x",
  "site-packages/numpy/core.py": b"x",
  "dist-packages/core.py": b"x",
  "lib2to3/main.py": b"x",
  "__pycache__/odd.py": b"x",
  "_sysconfigdata__linux.py": b"x",
  "config-3.11-linux/python-config.py": b"x",
}


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
  """A library of a few files, in place of the running Python's."""
  root = tmp_path / "library"
  for name, content in FILES.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
  place = types.SimpleNamespace(get_path=lambda _: str(root))
  monkeypatch.setattr(python_text, "sysconfig", place)
  return root


def read(root: Path) -> dict[str, dict[str, str]]:
  """Prepares in `root` and returns text by path by split."""
  data.load("python_text", data_dir=root, length=4)
  (path,) = (root / "python_text").glob("py*")
  builder = prepared.find(f"python_text/{path.name}", root)
  return {
    split: {
      example["path"].decode(): example["text"].decode()
      for example in builder.as_data_source(split)
    }
    for split in SPLITS
  }


def test_a_file_is_the_text_its_interpreter_reads(library, tmp_path):
  texts = read(tmp_path / "data")
  assert texts == {
    "train": {
      "json/decoder.py": "import re\n",
      "table.py": "# coding: latin-1\n# né\n",
      "marked.py": "# é\n",
    },
    "validation": {"functools.py": "def reduce():\n  pass\n"},
    "test": {"socket.py": "import _socket\nx = 1\n"},
  }


def test_preparing_twice_gives_identical_bytes(library, tmp_path):
  contents = []
  for name in ("first", "second"):
    data.load("python_text", data_dir=tmp_path / name)
    (path,) = (tmp_path / name).glob("python_text/py*/1.0.0")
    contents.append({p.name: p.read_bytes() for p in path.iterdir()})
  assert contents[0] == contents[1]


def test_a_prepared_data_set_needs_no_library(library, tmp_path, monkeypatch):
  before = read(tmp_path / "data")
  monkeypatch.setattr(python_text, "sysconfig", None)
  assert read(tmp_path / "data") == before


def test_pythons_do_not_meet(library, tmp_path, monkeypatch):
  read(tmp_path / "data")
  builder = python_text.PythonText
  (config,) = builder.BUILDER_CONFIGS
  assert config.name.startswith("py3.")
  texts = data.load(
    f"tfds:python_text/{config.name}", data_dir=tmp_path / "data", length=4
  )
  assert texts.schema.tokenizer.decode(texts.test[0]["tokens"]) == "imp"
  with pytest.raises(ValueError, match="py2"):
    data.load("tfds:python_text/py2", data_dir=tmp_path / "data", length=4)


def test_a_failure_while_preparing_leaves_nothing(
  library, tmp_path, monkeypatch
):
  def fail(path):
    raise OSError("Input/output error")

  with monkeypatch.context() as patch:
    patch.setattr(python_text, "_read", fail)
    with pytest.raises(OSError, match="Input/output error"):
      data.load("python_text", data_dir=tmp_path / "data")
  assert not (tmp_path / "data" / "python_text").exists()
  assert len(read(tmp_path / "data")["train"]) == 3


@pytest.mark.parametrize(
  ("split", "paths"),
  {
    "train": ["json/decoder.py", "argparse.py", "asyncio/tasks.py"],
    "validation": ["functools.py", "traceback.py", "xml/dom/minidom.py"],
    "test": ["socket.py", "textwrap.py", "unittest/suite.py"],
  }.items(),
)
def test_a_file_never_moves(split, paths):
  assert {python_text.split_of(PurePath(path)) for path in paths} == {split}


def test_the_library_of_this_python_is_there(data_dir):
  texts = data.load("python_text")
  assert texts.schema.input_shapes == {"tokens": (512,)}
  assert (texts.schema.task, texts.schema.vocab_size) == ("language", 256)
  (path,) = data_dir.glob("python_text/py*")
  builder = prepared.find(f"python_text/{path.name}", data_dir)
  seen = {
    split: {example["path"] for example in builder.as_data_source(split)}
    for split in SPLITS
  }
  assert b"json/decoder.py" in seen["train"]
  assert b"functools.py" in seen["validation"]
  assert b"socket.py" in seen["test"]
  assert sum(map(len, seen.values())) == len(set.union(*seen.values())) > 500
  # Of twenty files, one each; of as many as these, within a third or so.
  for split in ("validation", "test"):
    assert 0.03 < len(seen[split]) / len(set.union(*seen.values())) < 0.08
  num_tokens = sum(len(getattr(texts, split)) * 512 for split in SPLITS)
  assert 8e6 < num_tokens < 16e6
