"""The comparison runs alone, and says how to bring the peers in."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = (
  pathlib.Path(__file__).parents[2]
  / "experiments/benchmarks/classifier_vs_peers.py"
)


@pytest.mark.slow
def test_missing_peers_are_skipped_with_the_remedy(tmp_path, data_dir):
  peers = {"DEEPSEEK_JAX_KERAS_PYTHON", "DEEPSEEK_JAX_TORCH_PYTHON"}
  fake_devices = {"JAX_NUM_CPU_DEVICES"}
  env = {k: v for k, v in os.environ.items() if k not in peers | fake_devices}
  flags = ["--force", "--rounds=1", "--warmup=1", "--batch-sizes=256"]
  places = [f"--results={tmp_path}", f"--torch-python={tmp_path / 'nowhere'}"]
  run = subprocess.run(
    [sys.executable, str(SCRIPT), *flags, *places],
    capture_output=True,
    text=True,
    check=True,
    env=env,
  )
  assert "keras skipped: not asked for. Make an environment" in run.stdout
  assert "torch skipped: no interpreter at" in run.stdout
  result = json.loads((tmp_path / "classifier_vs_peers.json").read_text())
  (label,) = result["details"]["cases"]
  ours = result["details"]["cases"][label]["deepseek_jax"]
  assert ours["parameters"] > 0
  assert ours["last_loss"] < ours["first_loss"]
