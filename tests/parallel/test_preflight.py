"""Laws of preflight: on fake CPU devices, and with the TPU's compiler."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel import MeshSpec, preflight, preflight_compile
from deepseek_jax.parallel.chips import CHIPS
from deepseek_jax.parallel.preflight_compile import Memory, as_if_on
from deepseek_jax.parallel.preflight_report import render, render_scaling
from deepseek_jax.parallel.topology import parse

WIDTH, LAYERS, ROWS = 256, 4, 8
TX = optax.adam(1e-3)


def build(mesh, width=WIDTH, layers=LAYERS, rows=ROWS, keep=True):
  """A training step of a stack of layers, cut over fsdp."""
  put = lambda *dims: NamedSharding(mesh, P(*dims))
  cut = ("replica", "data", "fsdp", "expert")
  body = lambda x, w: (jnp.tanh(x @ w), None)
  body = body if keep else jax.checkpoint(body)

  def loss(w, x):
    x = jax.lax.with_sharding_constraint(x, put(cut))
    return jnp.mean(jax.lax.scan(body, x, w)[0] ** 2)

  def step(w, state, x):
    value, grads = jax.value_and_grad(loss)(w, x)
    updates, state = TX.update(grads, state)
    return optax.apply_updates(w, updates), state, value

  place = lambda x: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=put(*(None, "fsdp")[: x.ndim])
  )
  w = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
  w, state = jax.tree.map(place, (w, jax.eval_shape(TX.init, w)))
  x = jax.ShapeDtypeStruct(
    (rows * mesh.size, width), jnp.float32, sharding=put(cut)
  )
  at = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  jitted = jax.jit(
    step, donate_argnums=(0, 1), out_shardings=(at(w), at(state), None)
  )
  return jitted, (w, state, x)


def model_flops(spec):
  """Three products of every layer for every row."""
  devices = 1
  for size in spec.sizes.values():
    devices *= size
  return 3 * 2.0 * ROWS * devices * LAYERS * WIDTH**2


@pytest.fixture(scope="module")
def report():
  spec = MeshSpec(data=2, fsdp=4)
  return preflight.run(
    build, "v5e:2x4", spec, model_flops=model_flops, compiler="cpu"
  )


def test_a_report_counts_what_is_known_by_hand(report):
  weights = 4 * LAYERS * WIDTH**2
  assert report.mesh == {"data": 2, "fsdp": 4}
  assert report.compiler == "fake CPU devices"
  # Weights and two moments, a quarter of each; a count; the rows.
  assert report.memory.arguments == 3 * weights // 4 + 4 + 4 * ROWS * WIDTH
  assert report.fits
  assert report.spare == int(15.75 * 2**30) - report.memory.total
  assert report.advice is None
  found = report.roofline
  # Of the first layer nobody asks for the gradient of its input.
  assert found.flops == model_flops(MeshSpec(data=2, fsdp=4)) / 8
  assert found.model_flops == found.flops
  sent = {(x.kind, x.place): x.sent for x in found.collectives}
  assert sum(n for (_, place), n in sent.items() if "fsdp" in place) >= (
    2 * weights * 3 / 4
  )


def test_a_report_is_a_page(report):
  text = render(report)
  assert len(text.splitlines()) < 40
  for said in (
    r"v5e:2x4: 8 devices, mesh data=2 fsdp=4",
    r"fake CPU devices: not the TPU compiler, so a guess",
    r"all +\d+\.\d MiB of 15\.8 GiB",
    r"fits, with 1\d\.\d GiB to spare",
    r"overlapped .*limited by (products|memory|network)",
    r"\d\.\d% \.\. \d\.\d% of the peak for the model's own 0\.0 TFLOP",
    r"all-gather +fsdp +\d+",
  ):
    assert re.search(said, text), f"{said} in\n{text}"


@pytest.mark.parametrize(
  ("memory", "mesh", "said"),
  [
    # 30 GiB of state over fsdp=2: a quarter of it fits beside 4 GiB.
    (
      (30, 0, 4, 0),
      {"fsdp": 2},
      r"18\.2 GiB too much.*30\.0.*fsdp=8 .* in 4, to about 11\.5",
    ),
    (
      (30, 0, 4, 0),
      {"fsdp": 64},
      "fsdp=256, which would do, needs more than these 64",
    ),
    (
      (3, 0, 20, 0),
      {"fsdp": 2},
      r"7\.2 GiB too much.*20\.0 GiB alone.*data.*sequence.*remat",
    ),
  ],
)
def test_what_does_not_fit_names_the_axis_that_helps(
  report, memory, mesh, said
):
  memory = Memory(*(n * 2**30 for n in memory))
  large = dataclasses.replace(
    report, memory=memory, mesh=mesh, num_devices=64, roofline=None
  )
  assert not large.fits
  assert re.search(said, large.advice)
  assert large.advice in render(large)
  with pytest.raises(ValueError, match=r"must all fit, got v5e:2x4 that takes"):
    render_scaling([report, large])


def test_the_axis_that_is_named_helps():
  wide = lambda mesh: build(mesh, width=16384, layers=8, rows=1)
  first = preflight.run(wide, "v5e:2x4", MeshSpec(), compiler="cpu")
  assert not first.fits
  size = int(re.search(r"fsdp=(\d+)", first.advice)[1])
  spec = MeshSpec(fsdp=size)
  second = preflight.run(wide, "v5e:2x4", spec, compiler="cpu")
  assert second.memory.arguments < first.memory.arguments / size * 1.01
  assert second.memory.total < first.memory.total


def test_more_chips_with_as_much_work_each_scale(report):
  reports = preflight.weak_scaling(
    build,
    ["v5e:2x2", "v5e:2x4"],
    lambda topology: MeshSpec(fsdp=4),
    model_flops=model_flops,
    compiler="cpu",
  )
  assert [x.num_devices for x in reports] == [4, 8]
  for overlapped in (True, False):
    kept = preflight.scaling_efficiency(reports, overlapped=overlapped)
    seconds = [
      x.roofline.overlapped if overlapped else x.roofline.apart for x in reports
    ]
    assert kept == {4: 1.0, 8: pytest.approx(seconds[0] / seconds[1])}
  table = render_scaling(reports)
  assert re.search(r"\n +4 +fsdp=4 .*100\.0% \.\. 100\.0%\n", table)
  assert re.search(r"\n +8 +data=2 fsdp=4 ", table)


def test_a_step_is_traced_for_the_chip_it_is_for():
  seen = []

  def ask(mesh):
    def step(x):
      seen.append(jax.default_backend())
      return x

    rows = NamedSharding(mesh, P("data"))
    return step, (jax.ShapeDtypeStruct((8,), jnp.float32, sharding=rows),)

  preflight.run(ask, "v5e:2x4", compiler="cpu")
  with as_if_on("tpu"):
    seen.append(jax.default_backend())
  assert seen == ["cpu", "tpu"]
  assert jax.default_backend() == "cpu"


def test_bad_input_is_said():
  with pytest.raises(ValueError, match="nearest is 'v5e:2x4'"):
    preflight.run(build, "v5e:2x3")
  with pytest.raises(ValueError, match="fsdp=3 = 3 for 8 devices"):
    preflight.run(build, "v5e:2x4", MeshSpec(fsdp=3))
  with pytest.raises(ValueError, match=r"functions of a module.*DEVICES=16"):
    preflight.run(lambda mesh: build(mesh), "v5e:4x4", compiler="cpu")


@pytest.mark.slow
def test_more_devices_than_jax_has_are_those_of_another_process():
  jax.devices()
  found = preflight.run(
    build, "v5e:4x4", MeshSpec(fsdp=4), model_flops=model_flops, compiler="cpu"
  )
  assert found.mesh == {"data": 4, "fsdp": 4}
  assert found.roofline.flops == model_flops(MeshSpec(data=16)) / 16


needs_tpu_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler comes with the extra deepseek-jax[tpu]",
)


@needs_tpu_compiler
@pytest.mark.slow
def test_the_tpu_compiler_reports_on_64_chips():
  found = preflight.run(
    lambda mesh: build(mesh, width=1024, rows=512),
    "v5p:4x4x4",
    MeshSpec(data=4, fsdp=16),
  )
  assert found.compiler.startswith("the TPU compiler (libtpu ")
  assert found.fits
  assert found.roofline.flops == 3 * 2 * 512 * LAYERS * 1024**2
  sent = {(x.kind, x.place) for x in found.roofline.collectives}
  assert ("all-reduce", "data") in sent
  assert any(place == "fsdp" for _, place in sent)


@pytest.mark.parametrize(
  "said",
  [
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of "
    "15.75G hbm. Exceeded hbm capacity by 4.75G.",
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (20.50G) exceeds available HBM (15.75G).",
  ],
)
def test_a_compiler_that_gives_up_is_understood(said):
  error = jax.errors.JaxRuntimeError(said)
  leaf = jax.ShapeDtypeStruct((2**30,), jnp.float32)
  found = preflight_compile.too_large(error, "a compiler", [leaf])
  assert found.memory.total == 20.5 * 2**30
  assert found.memory.arguments == 4 * 2**30
  assert found.room == 15.75 * 2**30
  assert found.text is None
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    preflight_compile.too_large(
      jax.errors.JaxRuntimeError("INTERNAL: no"), "a compiler", [leaf]
    )


@needs_tpu_compiler
@pytest.mark.slow
def test_the_tpu_compiler_reports_on_two_slices():
  found = preflight.run(
    lambda mesh: build(mesh, width=1024, rows=512),
    "v5p:2x2x2*2",
    MeshSpec(replica=2, data=2, fsdp=4),
  )
  assert found.num_devices == 16
  slow = [x for x in found.roofline.collectives if x.place == "replica"]
  # The gradient, cut over all of a slice, once between two; and the loss.
  weights = 4 * LAYERS * 1024**2
  assert sum(x.sent for x in slow) == pytest.approx(weights / 8, rel=0.01)
  assert sum(x.seconds for x in slow) == pytest.approx(
    sum(x.sent for x in slow) / CHIPS["v5p"].slow
  )


@needs_tpu_compiler
@pytest.mark.slow
def test_the_tpu_compiler_says_by_how_much_a_step_does_not_fit():
  large = lambda mesh: build(mesh, width=32768, layers=2, rows=8)
  found = preflight.run(large, "v5e:2x2", MeshSpec())
  assert not found.fits
  assert found.roofline is None
  assert found.memory.arguments == 3 * 2 * 4 * 32768**2 + 4 + 4 * 8 * 32768
  assert found.room == CHIPS["v5e"].hbm
  # The gradient and a copy of the weights: the axis helps, but not enough.
  assert found.memory.temporary >= 2 * 4 * 32768**2
  assert "GiB alone" in found.advice
  assert parse(found.topology).num_devices == 4
