"""Laws of placing arrays: nothing is ever whole, and no row goes astray."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import parallel
from deepseek_jax.parallel import MeshSpec, make_mesh

MESH = make_mesh(MeshSpec(fsdp=2, tensor=2))


def _build():
  key = jax.random.key(0)
  return {"kernel": jax.random.normal(key, (8, 6)), "bias": jnp.zeros(6)}


RULES = [("kernel", P("fsdp", "tensor")), ("bias", P())]


def test_sharded_arrays_are_those_of_one_device():
  made = parallel.make_sharded(_build, RULES, MESH)
  assert made["kernel"].sharding == NamedSharding(MESH, P("fsdp", "tensor"))
  shards = {shard.data.shape for shard in made["kernel"].addressable_shards}
  assert shards == {(4, 3)}
  jax.tree.map(np.testing.assert_array_equal, made, jax.jit(_build)())


def test_rules_that_do_not_fit_allocate_nothing():
  built = []

  def build():
    built.append(1)
    return _build()

  with pytest.raises(ValueError, match="'kernel': dimension 1 of size 6"):
    parallel.make_sharded(
      build, [("kernel", P(None, ("fsdp", "data"))), RULES[1]], MESH
    )
  assert built == [1]  # Its shapes only.


def test_rows_are_cut_over_all_axes_of_a_batch_and_tokens_if_asked():
  mesh = make_mesh(MeshSpec(fsdp=2, sequence=2))
  batch = {
    "tokens": np.arange(8 * 6).reshape(8, 6),
    "mask": np.ones(8, bool),
    "image": np.ones((8, 4, 4)),
  }
  put = parallel.put_batch(batch, mesh, tokens=["tokens"])
  specs = {name: x.sharding.spec for name, x in put.items()}
  rows = ("data", "fsdp")
  assert specs == {
    "tokens": P(rows, ("sequence",)),
    "mask": P(rows),
    "image": P(rows),
  }
  jax.tree.map(np.testing.assert_array_equal, put, batch)


@pytest.mark.parametrize(
  ("batch", "said"),
  [
    ({"x": np.ones((6, 4))}, r"batch\['x'\].* multiple of 4 rows.*got 6"),
    ({"x": np.float32(1)}, r"batch\['x'\] must have rows"),
    ({"t": np.ones(8)}, r"batch\['t'\] must be \[B, T, ...\], got .*\(8,\)"),
    ({"t": np.ones((8, 5))}, r"'t'\].shape\[1\] .* 2, the sequence=2 .* got 5"),
  ],
)
def test_a_batch_that_does_not_divide_is_named(batch, said):
  mesh = make_mesh(MeshSpec(fsdp=2, sequence=2))
  with pytest.raises(ValueError, match=said):
    parallel.put_batch(batch, mesh, tokens=["t"])


def test_one_process_needs_every_row_once():
  np.testing.assert_array_equal(parallel.local_rows(8, MESH), np.arange(8))
  with pytest.raises(ValueError, match=r"rows must be divisible by 4.*got 6"):
    parallel.local_rows(6, MESH)


def test_bytes_are_those_that_a_device_holds():
  made = parallel.make_sharded(_build, RULES, MESH)
  held = sum(
    shard.data.nbytes
    for x in jax.tree.leaves(made)
    for shard in x.addressable_shards
    if shard.device == jax.devices()[0]
  )
  assert parallel.device_bytes(made) == held == 4 * (4 * 3 + 6)
  planned = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), made
  )
  assert parallel.device_bytes(planned) == held
  assert parallel.device_bytes({"key": jax.random.key(0)}) == 8
  assert parallel.device_bytes(np.zeros(3, np.int8)) == 3


def test_a_description_has_every_path_and_the_sum():
  made = parallel.make_sharded(_build, RULES, MESH)
  lines = parallel.describe(made).splitlines()
  assert [line.split() for line in lines[1:]] == [
    ["bias", "6", "float32", "-", "24"],
    ["kernel", "8x6", "float32", "fsdp,", "tensor", "48"],
    ["total", "72"],
  ]
