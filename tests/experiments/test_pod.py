"""The pod benchmark runs, and counts by hand what it can."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

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


def test_the_models_have_the_sizes_they_are_named_for(pod):
  for size, low, high in (
    (pod.pod_model.Dense(), 6.5e9, 7.5e9),
    (pod.pod_model.Mixture(), 9e9, 12e9),
  ):
    # As many in every layer.
    few, more = (dataclasses.replace(size, num_layers=n) for n in (1, 2))
    layer = more.num_params - few.num_params
    count = few.num_params + (size.num_layers - 1) * layer
    assert low < count < high


@pytest.mark.slow
def test_all_to_alls_send_what_they_should_by_hand(pod):
  size, spec = pod.SMALL_MIXTURE, pod.MeshSpec(expert=4, data=1)
  report = pod._compiled(size, pod.parse("v5e:2x2"), spec, "cpu")
  (swapped,) = (
    x for x in report.roofline.collectives if x.kind == "all-to-all"
  )
  assert (swapped.place, swapped.calls) == ("expert", 6 * size.num_layers)
  # Whose CPUs swap bfloat16 as float32.
  assert swapped.sent == 2 * size.swapped(spec.resolve(4))


@pytest.mark.slow
def test_a_small_pod_is_compiled_and_written(pod, tmp_path, monkeypatch):
  monkeypatch.setattr(pod, "MESHES", dict(list(pod.MESHES.items())[:1]))
  for case in ("meshes", "scaling", "experts"):
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
  (swapped,) = cases["experts"]["reports"].values()
  swapped = swapped["all_to_all_bytes"]
  assert swapped["in_the_program"] == 2 * swapped["by_hand"]
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
