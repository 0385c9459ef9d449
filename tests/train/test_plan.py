"""What a dry run says is what a run does."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from flax import nnx

import deepseek_jax as dj
from deepseek_jax.parallel import MeshSpec
from deepseek_jax.train import initial, plan
from deepseek_jax.train.placement import Placement

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptron:
  """Compiles in a moment; large enough to be cut."""

  def build(self, schema, rngs):
    return nnx.Sequential(
      lambda x: x.reshape(x.shape[0], -1),
      nnx.Linear(64, 2048, rngs=rngs),
      nnx.Linear(2048, schema.num_classes, rngs=rngs),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small(dj.train.Experiment):
  model: Perceptron = Perceptron()


def experiment(**mesh):
  return Small(
    data=dj.train.Data(batch_size=16),
    optimizer=dj.train.Optimizer(name="adamw"),
    mesh=MeshSpec(**mesh),
  )


def test_memory_is_that_of_the_state_that_is_made():
  asked = experiment(fsdp=2, tensor=2)
  drawn = plan.Plan.of(asked)
  found = drawn.dry_run(jax.devices())
  state = initial.initial_state(
    drawn.build, drawn.tx, drawn.spec.task, Placement(asked.mesh)
  )
  first = jax.devices()[0]

  def held(tree):
    return sum(
      shard.data.nbytes
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
      if shard.device == first
    )

  assert found.bytes_of["parameters"] == held(state.params)
  assert found.bytes_of["optimizer"] == held(state.opt_state)
  assert found.parameters == sum(x.size for x in jax.tree.leaves(state.params))
  assert found.bytes_of["parameters"] < 0.6 * 4 * found.parameters
  assert found.mesh == {"data": 2, "fsdp": 2, "tensor": 2}


def recurrent():
  """Weights that are met at every step of a scan."""
  return dj.train.Experiment(
    data=dj.train.Data(batch_size=16),
    model=dj.train.Classifier(channels=(8,), lstm_features=8, num_heads=2),
    optimizer=dj.train.Optimizer(name="adamw"),
  )


@pytest.mark.parametrize(
  "make", [experiment, pytest.param(recurrent, marks=pytest.mark.slow)]
)
def test_data_parallelism_sends_the_gradient_once(make):
  found = plan.Plan.of(make()).dry_run(jax.devices())
  assert found.sent.keys() == {"all-reduce"}
  # 7/8 of it out, 7/8 back; beside it a few sums of losses and weights.
  gradient = 2 * 7 / 8 * 4 * found.parameters
  assert 0 <= found.sent["all-reduce"]["data"] - gradient < 100
  assert "all-reduce over data" in str(found)


def test_one_device_sends_nothing():
  found = plan.Plan.of(experiment()).dry_run(jax.devices()[:1])
  assert not found.sent
  assert "one device" in str(found)
  assert found.here is None
  assert str(found).endswith("none")


def test_rows_that_do_not_divide_are_refused_before_anything_is_compiled():
  with pytest.raises(ValueError, match=r"divisible by the 8 devices.*got 12"):
    plan.Plan.of(
      dj.train.Experiment(data=dj.train.Data(batch_size=12))
    ).dry_run(jax.devices())


def test_a_dry_run_says_when_train_would_refuse_its_mesh():
  asked = experiment(data=1, fsdp=2)
  devices, here = plan.devices_for(asked.mesh)
  assert (len(devices), here) == (2, 8)
  said = "this machine has 8 devices; train would refuse this mesh here"
  found = plan.Plan.of(asked).dry_run(devices, here)
  assert said in str(found)
  assert "train would" not in str(dataclasses.replace(found, here=None))
  assert plan.devices_for(MeshSpec(fsdp=2)) == (jax.devices(), 8)


@pytest.mark.slow
def test_the_command_needs_no_devices(tmp_path):
  flags = ["--mesh.fsdp", "8", "--mesh.tensor", "4", "--data.batch-size", "16"]
  file = ROOT / "experiments" / "digits.py"
  command = ["-m", "deepseek_jax.cli", "train", str(file), "--dry-run", *flags]
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
  done = subprocess.run(
    [sys.executable, *command], cwd=tmp_path, env=environment,
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert "mesh: fsdp 8, tensor 4 (32 x cpu)" in done.stdout
  assert "optimizer" in done.stdout
  refused = "this machine has 1 device; train would refuse this mesh here"
  assert refused in done.stdout
  assert not list(tmp_path.iterdir()), json.dumps(os.listdir(tmp_path))


def test_a_plan_grows_with_its_pod():
  drawn = plan.Plan.of(experiment())
  grown = dataclasses.replace(drawn, model_flops=3.0).grown(4)
  assert grown.rows == 64
  assert grown.model_flops == 12.0
  assert drawn.model_flops is None


@pytest.mark.slow
def test_preflight_says_what_a_pod_makes_of_an_experiment(tmp_path):
  file = ROOT / "experiments" / "byte_lm.py"
  command = [sys.executable, "-m", "deepseek_jax.cli", "preflight", str(file)]
  flags = ["--mesh.fsdp", "4", "--model.features", "32", "--data.length", "64"]
  flags += ["--data.batch-size", "64"]
  asked = {"cwd": tmp_path, "capture_output": True, "text": True}
  where = ["--topology", "v5e:4x4", "--scaling"]
  done = subprocess.run([*command, *where, *flags], **asked, check=True)
  assert "v5e:4x4: 16 devices, mesh data=4 fsdp=4" in done.stdout
  assert "of the peak for the model's own" in done.stdout
  table = done.stdout.split("the same work a device")[1]
  assert [line.split()[0] for line in table.splitlines()[2:4]] == ["8", "16"]
  done = subprocess.run([*command, "--topology", "v5e:4x5"], **asked)
  assert done.returncode == 2
  assert "the nearest is 'v5e:4x4'" in done.stderr
