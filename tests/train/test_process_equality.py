"""Two processes of four devices train as one process of one device does."""

import json
import subprocess
import sys

import numpy as np
import pytest

COMMON = """
import dataclasses
import jax, optax
import numpy as np
from jax.experimental import multihost_utils
from flax import nnx
from deepseek_jax.core import tree
from deepseek_jax.parallel import MeshSpec
from deepseek_jax.train import *

@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(Optimizer):
  def build(self, total_steps, **options):
    return TRANSFORM

class Kept(KIND):
  def run(self):
    result = super().run()
    params = nnx.to_pure_dict(nnx.as_pure(nnx.state(result.model, nnx.Param)))
    whole = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
      paths = tree.leaf_paths(whole)
      np.savez(f"{self.workdir}/params.npz",
               **dict(zip(paths, jax.tree.leaves(whole), strict=True)))
    return result

TRAIN = Train(epochs=None, steps=4, evaluate_every=2, log_every=1,
              tensorboard=False, progress=False)
"""
CLASSIFIER = """
KIND, TRANSFORM = Experiment, optax.sgd(0.1, momentum=0.9)
COMMON
experiment = Kept(
  data=Data(batch_size=32), optimizer=Plain(), train=TRAIN,
  model=Classifier(channels=(8,), lstm_features=16, num_heads=2),
)
"""
LANGUAGE = """
KIND, TRANSFORM = LanguageExperiment, optax.adam(1e-2, eps=1e-4)
COMMON
experiment = Kept(
  data=Text(length=32, batch_size=16, validation=0.002), optimizer=Plain(),
  model=LanguageModel(features=16, num_layers=4, num_heads=2, hidden=32,
                      MORE),
  train=TRAIN,
)
"""
IMPORT = "import optax\nfrom deepseek_jax.train import *\n"
CASES = {
  "classifier": (CLASSIFIER, {"data": 2, "fsdp": 2, "tensor": 2}),
  "pipeline": (
    LANGUAGE.replace("MORE", "scan=True, microbatches=2"),
    {"stage": 2, "data": 2, "fsdp": 2},
  ),
  "experts": (
    LANGUAGE.replace("MORE", "experts=4"),
    {"expert": 4, "sequence": 2, "data": 1},
  ),
}


def train(folder, name, count, devices, mesh, data_dir):
  """Runs the experiment; returns lines, metrics and parameters."""
  flags = [f"--mesh.{axis}={size}" for axis, size in mesh.items()]
  command = [sys.executable, "-m", "deepseek_jax.cli", "launch", "-n"]
  command += [str(count), "--devices-per-process", str(devices)]
  command += ["experiment.py", "--workdir", name, *flags]
  done = subprocess.run(
    command, cwd=folder, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  lines = (folder / name / "metrics.jsonl").read_text().splitlines()
  metrics = json.loads((folder / name / "result.json").read_text())["metrics"]
  with np.load(folder / name / "params.npz") as params:
    return [json.loads(line) for line in lines], metrics, dict(params)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_parameters_are_those_of_one_device(
  tmp_path, data_dir, case, monkeypatch
):
  text, mesh = CASES[case]
  monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
  text = IMPORT + text.replace("COMMON", COMMON)
  (tmp_path / "experiment.py").write_text(text)
  lines, metrics, params = train(tmp_path, "one", 1, 1, {"data": 1}, data_dir)
  found = train(tmp_path, "many", 2, 4, mesh, data_dir)
  for many, one in zip(found[0], lines, strict=True):
    for name in ("train/loss", "validation/loss"):
      assert (name in many) == (name in one)
      if name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5)
  for name, value in metrics.items():
    np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-6)
  assert found[2].keys() == params.keys()
  for path, value in params.items():
    np.testing.assert_allclose(
      found[2][path], value, rtol=1e-5, atol=1e-6, err_msg=path
    )
