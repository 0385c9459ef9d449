"""Laws of the digits: what they are, and how they come to be on disk."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deepseek_jax import data

SPLITS = ("train", "validation", "test")
SHA256 = {
  "train": "4c8b1fde1319ed4fc17b452b80bc4800cae7db4a6e5df6ea74b23b5bcb61d84b",
  "validation": (
    "5ec2ffb60a2e80b2b18332bb780c746febee11f11a4e47122b06357fc47dc777"
  ),
  "test": "8915cd777c02fa16b548b9e2bcf5fac1f970f113c29c98bae3a713c9f735ed38",
}
LOAD = "import sys, deepseek_jax as d; d.data.load('digits', data_dir={!r})"


def start(root: Path, code: str = LOAD) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", code.format(str(root))],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def contents(root: Path) -> dict[str, bytes]:
  return {
    path.name: path.read_bytes()
    for path in (root / "digits" / "1.0.0").iterdir()
  }


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_fixed(digits, name):
  columns = getattr(digits, name)[:]
  stored = columns["image"].tobytes() + columns["label"].tobytes()
  assert hashlib.sha256(stored).hexdigest() == SHA256[name]


def test_splits_are_disjoint_and_complete(digits):
  images = [
    image.tobytes()
    for name in SPLITS
    for image in getattr(digits, name)[:]["image"]
  ]
  # No picture occurs twice in the source, so none can be in two splits.
  assert len(set(images)) == len(images) == 1797
  source = load_digits().images.astype(np.uint8)
  assert {image.tobytes() for image in source} == set(images)


def test_splits_are_stratified(digits):
  counts = {
    name: np.bincount(getattr(digits, name)[:]["label"], minlength=10)
    for name in SPLITS
  }
  total = sum(counts.values())
  for name, share in {"train": 0.7, "validation": 0.1, "test": 0.2}.items():
    assert np.all(np.abs(counts[name] - share * total) < 2)


def test_the_schema_says_what_the_pixels_are(digits):
  image = digits.schema.features["image"]
  assert (image.kind, image.shape) == ("image", (8, 8, 1))
  assert (image.dtype, image.low, image.high) == ("uint8", 0, 16)
  assert digits.schema.class_names == tuple("0123456789")
  assert (digits.schema.inputs, digits.schema.target) == (("image",), "label")


def test_preparing_twice_gives_identical_bytes(tmp_path):
  for name in ("first", "second"):
    data.load("digits", data_dir=tmp_path / name)
  assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_processes_may_prepare_at_the_same_time(tmp_path):
  loaders = [start(tmp_path) for _ in range(2)]
  for loader in loaders:
    _, errors = loader.communicate(timeout=120)
    assert loader.returncode == 0, errors
  assert len(data.load("digits", data_dir=tmp_path).train) == 1257


def test_preparing_is_silent_and_loads_no_tensorflow(tmp_path):
  loader = start(tmp_path, LOAD + "; assert 'tensorflow' not in sys.modules")
  output, errors = loader.communicate(timeout=120)
  assert (loader.returncode, output, errors) == (0, "", "")


def test_loading_again_needs_neither_sklearn_nor_a_writable_directory(digits):
  # Permissions do not bind root, so what is checked is that nothing changes.
  root = Path(os.environ["TFDS_DATA_DIR"])
  before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
  code = LOAD + "; assert not {{'sklearn', 'tensorflow'}} & set(sys.modules)"
  loader = start(root, code)
  _, errors = loader.communicate(timeout=120)
  assert loader.returncode == 0, errors
  assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_a_kill_while_preparing_leaves_nothing_that_is_used(tmp_path, delay):
  loader = start(tmp_path)
  while not (tmp_path / ".deepseek_jax.lock").exists():
    time.sleep(0.005)
  time.sleep(delay)
  loader.send_signal(signal.SIGKILL)
  loader.communicate()
  digits = data.load("digits", data_dir=tmp_path)
  assert [len(getattr(digits, name)) for name in SPLITS] == [1257, 180, 360]


def test_a_kill_while_writing_leaves_nothing_that_is_used(tmp_path):
  code = (
    "import os, signal, tensorflow_datasets.core.writer as w\n"
    "w.Writer.finalize = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  loader = start(tmp_path, code + LOAD)
  loader.communicate(timeout=120)
  assert loader.returncode == -signal.SIGKILL
  assert list((tmp_path / "digits").glob("incomplete.*"))
  assert len(data.load("digits", data_dir=tmp_path).train) == 1257
