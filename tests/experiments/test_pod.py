"""The pod benchmark runs, and counts by hand what it can."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "experiments/benchmarks"


@pytest.fixture
def pod(monkeypatch):
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  import pod

  # In this process, which has devices enough.
  monkeypatch.setattr(
    pod, "compiled", lambda flags, *args: pod._compiled(*args, "cpu")
  )
  return pod


def test_the_7b_model_has_7b_parameters(pod):
  full = pod.pod_model.Dense()
  embedding = full.features * pod.pod_model.VOCABULARY
  assert 6.5e9 < full.product_params + embedding < 7.5e9
  size = dataclasses.replace(full, num_layers=2)
  shapes = jax.tree.leaves(jax.eval_shape(lambda: _params(size)))
  count = sum(x.size for x in shapes)
  # Without the embedding, which is looked up, and the norms.
  norms = size.features * (2 * size.num_layers + 1)
  assert size.product_params == count - embedding - norms


def _params(size):
  from flax import nnx

  return nnx.as_pure(nnx.split(size.model(), nnx.Param, ...)[1])


@pytest.mark.slow
def test_a_small_pod_is_compiled_and_written(pod, tmp_path, monkeypatch):
  monkeypatch.setattr(pod, "MESHES", dict(list(pod.MESHES.items())[:1]))
  for case in ("meshes", "scaling"):
    command = ["pod.py", "--small", "--cases", case, "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    pod.main()
  cases = json.loads((tmp_path / "pod.json").read_text())["cases"]
  (report,) = cases["meshes"]["reports"].values()
  assert report["fits"]
  assert report["mesh"] == {"data": 2, "fsdp": 2}
  found = report["roofline"]
  # What the model asks for is computed, and some of it twice.
  assert found["model_flops"] <= found["flops"] <= 1.6 * found["model_flops"]
  kept = [row["efficiency"] for row in cases["scaling"]["reports"].values()]
  assert kept[0] == {"overlapped": 1.0, "apart": 1.0}
  assert len(kept) == 2
  assert "<svg" in (tmp_path / "pod.svg").read_text()


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler comes with the extra deepseek-jax[tpu]",
)
def test_the_trainers_step_takes_the_kernels_of_a_tpu(pod):
  size = dataclasses.replace(
    pod.SMALL, features=256, hidden=512, num_heads=2, length=1024
  )
  found = pod._compiled(size, pod.parse("v5e:2x2"), pod.MeshSpec(fsdp=2), "tpu")
  assert found.fits
  # They say what they compute.
  assert found.roofline.unknown == ()
  asked = found.roofline.model_flops
  assert asked < found.roofline.flops < 2 * asked
