"""What a run refuses: one clear error each, and nothing overwritten."""

import os

import filelock
import jax
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import deepseek_jax as dj


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"epochs": None}, "epochs or steps must be given"),
    ({"epochs": 0}, "epochs must be positive"),
    ({"epochs": None, "steps": 0}, "steps must be at least 1"),
    ({"batch_size": 151}, r"batch_size must be in \[1, 150\]"),
    ({"batch_size": 0}, r"batch_size must be in \[1, 150\]"),
    ({"accumulate": 5}, "accumulate must be at least 1 and divide"),
    ({"batch_size": 8.0}, "batch_size must be an integer"),
    ({"epochs": None, "steps": 2.5}, "steps must be an integer"),
    ({"loss": lambda outputs, targets: outputs}, "have a method `weights`"),
    (
      {"loss": dj.train.CrossEntropy(class_weights=(1.0, 2.0))},
      "one weight for each of the 3 classes, got 2",
    ),
    ({"clip_norm": 0.0}, "clip_norm must be positive"),
    ({"monitor": "validation/los"}, "did you mean 'validation/loss'"),
    ({"patience": 0}, "patience must be at least 1"),
    ({"keep": 0}, "keep must be at least 1"),
    ({"max_skipped": 0}, "max_skipped must be at least 1"),
    ({"log_every": 0}, "log_every must be at least 1"),
    ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
    ({"l1": -1.0}, "l1 must be finite and at least 0"),
    ({"l2": float("nan")}, "l2 must be finite and at least 0"),
    ({"seed": -1}, "seed must be at least 0"),
    ({"prefetch": -1}, "prefetch must be at least 0"),
    (
      {"model": nnx.Linear(6, 4, rngs=nnx.Rngs(0))},
      r"model must return logits \['batch', 3\]",
    ),
  ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
  run, tmp_path, changes, message, monkeypatch
):
  # The checks of a user's installation, where no hook looks at types first.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=message):
    run(**changes)
  assert not (tmp_path / "run").exists()


def test_batches_that_do_not_fit_the_mesh_are_refused(run):
  with pytest.raises(ValueError, match="must be divisible by the 8 devices"):
    run(mesh=None, batch_size=30)


def test_a_mesh_with_other_axes_is_refused(run):
  mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
  with pytest.raises(ValueError, match=r"mesh must have axes of .*got 'model'"):
    run(mesh=mesh)


def test_sizes_that_do_not_fit_the_devices_are_refused(run):
  with pytest.raises(ValueError, match=r"fsdp=3 = 3 for 8 devices"):
    run(mesh=dj.parallel.MeshSpec(fsdp=3))


def test_a_foreign_directory_is_refused_and_untouched(run, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "thesis.tex").write_text("precious")
  with pytest.raises(ValueError, match=r"which holds 'thesis.tex'"):
    run()
  assert os.listdir(tmp_path / "run") == ["thesis.tex"]


def test_a_file_is_no_workdir(run, tmp_path):
  (tmp_path / "run").write_text("precious")
  with pytest.raises(ValueError, match="workdir must be a directory"):
    run()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"epochs": 5}, r"arguments.epochs was 4, now 5"),
    ({"loss": dj.train.CrossEntropy(label_smoothing=0.1)}, "label_smoothing"),
    ({"config": {"a": 1}}, r"config was None, now \{'a': 1\}"),
    (
      {"model": nnx.Linear(6, 3, rngs=nnx.Rngs(0))},
      r"parameters.hidden/kernel was 'float32\[6, 16\]', now None",
    ),
  ],
)
def test_another_run_is_not_overwritten(run, tmp_path, changes, message):
  run(epochs=4)
  before = (tmp_path / "run" / "result.json").read_bytes()
  with pytest.raises(ValueError, match=message):
    run(**changes)
  assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_damaged_run_json_is_told(run, tmp_path):
  run(epochs=1)
  (tmp_path / "run" / "run.json").write_text("{")
  with pytest.raises(ValueError, match=r"run.json cannot be read"):
    run(epochs=1)


def test_two_processes_cannot_share_a_workdir(run, tmp_path):
  run(epochs=1)
  with (
    filelock.FileLock(tmp_path / "run" / ".lock"),
    pytest.raises(ValueError, match="in use by another process"),
  ):
    run(epochs=1)
  assert run(epochs=1).complete


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("run.json", '{"format": 1}', "run.json is damaged"),
    ("run.json", '{"format": 2}', "must have format 1"),
    ("result.json", "[1]", "result.json is damaged"),
    ("metrics.jsonl", '5\n{"step": 5}\n', "damaged in line 1"),
  ],
)
def test_damaged_files_are_named(run, tmp_path, name, content, message):
  run(epochs=1)
  (tmp_path / "run" / name).write_text(content)
  with pytest.raises(ValueError, match=message):
    run(epochs=1)


def test_numbers_of_the_wrong_width_are_told(run):
  x = np.zeros((64, 6), np.float32)
  split = {"x": x, "y": x[:, 0]}
  data = dj.data.from_arrays(split, split, split, inputs=("x",), target="y")
  with pytest.raises(
    ValueError, match=r"model must return numbers \['batch'\]"
  ):
    run(model=nnx.Linear(6, 2, rngs=nnx.Rngs(0)), data=data)
