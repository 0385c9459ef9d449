"""A killed run, started again, gives the bits of an unbroken one."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def load_drill():
  path = ROOT / "experiments" / "benchmarks" / "kill_drill.py"
  spec = importlib.util.spec_from_file_location("kill_drill", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_bit(tmp_path, data_dir):
  found = load_drill().drill(trials=4, epochs=4, seed=1, root=tmp_path)
  assert found["equal"] == 4, found
