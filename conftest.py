"""Strict JAX, eight fake devices and one prepared data directory for all."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import pytest


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory, worker_id):
  """The TFDS directory of this run, shared by the workers of xdist."""
  root = tmp_path_factory.getbasetemp()
  path = (root if worker_id == "master" else root.parent) / "data_sets"
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TFDS_DATA_DIR", str(path))
    yield path
