"""Laws of meshes: sizes, order, and errors that say what is wrong."""

import types

import jax
import jaxtyping
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel import AXES, MeshSpec, ambient, make_mesh, mesh


def test_the_open_axis_takes_what_the_others_leave():
  spec = MeshSpec(fsdp=4, tensor=2).resolve(32)
  assert spec.sizes == dict.fromkeys(AXES, 1) | {
    "data": 4,
    "fsdp": 4,
    "tensor": 2,
  }
  assert MeshSpec(data=1, fsdp=-1).resolve(8).fsdp == 8


def test_a_mesh_has_every_axis_and_every_device_once():
  made = make_mesh(MeshSpec(stage=2, tensor=2))
  assert made.axis_names == AXES
  assert dict(made.shape) | {"data": 2, "stage": 2, "tensor": 2} == made.shape
  assert {d.id for d in made.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
  ("sizes", "said"),
  [
    ({"fsdp": 3}, r"fsdp=3 = 3 for 8 devices"),
    ({"data": 1, "fsdp": 4}, r"must be the number of devices, got fsdp=4 = 4"),
    ({"data": 2, "fsdp": 8}, r"data=2 \* fsdp=8 = 16 for 8"),
    ({"fsdp": 16}, "fsdp=16 = 16 for 8"),
  ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_named(sizes, said):
  with pytest.raises(ValueError, match=said):
    make_mesh(MeshSpec(**sizes))


@pytest.mark.parametrize(
  ("sizes", "said"),
  [
    ({"tensor": 0}, r"mesh.tensor must be at least 1.*tensor=0"),
    ({"tensor": -2}, "tensor=-2"),
    ({"tensor": True}, "tensor=True"),
    ({"tensor": -1}, "at most one.*data and tensor; data is -1 unless"),
  ],
)
def test_a_size_that_is_none_is_refused(sizes, said):
  with pytest.raises(ValueError, match=said):
    MeshSpec(**sizes)


def test_sizes_come_in_a_spec(monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(
    ValueError, match=r"spec must be .*MeshSpec\(fsdp=8\), go"
  ):
    make_mesh({"fsdp": 8})


def _slices(count, size):
  """Devices as those of `count` slices of TPUs say where they are."""
  return [
    types.SimpleNamespace(
      id=i,
      slice_index=i // size,
      process_index=i // size,
      platform="cpu",
      device_kind="cpu",
    )
    for i in range(count * size)
  ]


def test_only_the_slow_axes_cross_the_slow_network():
  placed = mesh.place_devices(
    MeshSpec(replica=2, fsdp=2, tensor=2).resolve(8), _slices(2, 4)
  )
  at = dict(zip(AXES, placed.shape, strict=True))
  assert (at["replica"], at["fsdp"], at["tensor"]) == (2, 2, 2)
  by_replica = np.moveaxis(placed, AXES.index("replica"), 0).reshape(2, 4)
  assert [{d.slice_index for d in row} for row in by_replica] == [{0}, {1}]
  with pytest.raises(ValueError, match=r"multiple of the 2 groups.*replica=1"):
    mesh.place_devices(MeshSpec(data=1, tensor=8).resolve(8), _slices(2, 4))


def test_without_a_mesh_every_axis_has_one_place():
  assert ambient.axis_size("data", "tensor") == 1
  assert ambient.batch_axes() == ()
  x = jax.numpy.ones((4, 2))
  assert ambient.constrain(x, "data") is x


def test_what_modules_ask_for_is_cut_where_it_fits():
  made = make_mesh(MeshSpec(fsdp=2, tensor=2))
  seen = []

  def step(x):
    seen.append((ambient.axis_size("tensor"), ambient.batch_axes()))
    cut = ambient.constrain(x, ambient.batch_axes(), "tensor")
    # 3 rows do not divide by 4: they stay whole.
    return cut, ambient.constrain(x[:3], ambient.batch_axes(), "tensor")

  with jax.sharding.use_abstract_mesh(made.abstract_mesh):
    x = jax.device_put(np.ones((8, 6)), NamedSharding(made, P()))
    cut, some = jax.jit(step)(x)
  assert seen == [(2, ("data", "fsdp"))]
  assert cut.sharding.shard_shape(cut.shape) == (2, 3)
  assert some.sharding.shard_shape(some.shape) == (3, 3)


def test_a_kernel_may_take_every_axis_that_is_left():
  free = lambda: ambient.free_axes()
  assert free() == ()
  with jax.sharding.use_abstract_mesh(make_mesh(MeshSpec()).abstract_mesh):
    assert free() == AXES
  alone = make_mesh(MeshSpec(), jax.devices()[:1])
  with jax.sharding.use_abstract_mesh(alone.abstract_mesh):
    assert free() == ()
  seen = []

  def stage(x):
    seen.append(free())
    return x

  with jax.sharding.use_abstract_mesh(
    make_mesh(MeshSpec(stage=8)).abstract_mesh
  ):
    jax.jit(
      jax.shard_map(
        stage, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"}
      )
    ).lower(jax.ShapeDtypeStruct((8,), "float32"))
  assert set(seen) == {tuple(name for name in AXES if name != "stage")}


def test_what_is_kept_in_parts_and_wanted_whole_is_gathered():
  made = make_mesh(MeshSpec(data=1, fsdp=4, tensor=2))
  x = jax.device_put(np.ones((8, 6)), NamedSharding(made, P("fsdp", "tensor")))
  with jax.sharding.use_abstract_mesh(made.abstract_mesh):
    whole = jax.jit(ambient.constrain)(x)
    assert ambient.free_axes() == AXES
    assert ambient.fitting_axes(("fsdp", "data"), 8) == ("fsdp",)
    assert ambient.fitting_axes(("fsdp", "tensor"), 4) == ()
  assert whole.sharding.is_fully_replicated
