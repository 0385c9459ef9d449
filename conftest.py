"""Strict JAX, eight fake devices and one prepared data directory for all."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import pytest


def pytest_configure(config):
  """Compiles the default run hastily: that is what most of its time goes to.

  XLA's own passes all run; LLVM's costly ones do not. Runs of other tests, as
  `-m slow` or `-m ""`, compile what users get.
  """
  if config.getoption("markexpr") == "not slow":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_collection_modifyitems(items):
  """Marks the tests of `tests/slow.txt`, most of them one case of several."""
  path = pathlib.Path(__file__).with_name("tests") / "slow.txt"
  lines = path.read_text(encoding="utf-8").splitlines()
  slow = {line for line in lines if not line.startswith("#")}
  for item in items:
    if item.nodeid in slow:
      item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory, worker_id):
  """The TFDS directory of this run, shared by the workers of xdist."""
  root = tmp_path_factory.getbasetemp()
  path = (root if worker_id == "master" else root.parent) / "data_sets"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(path))
    yield path
