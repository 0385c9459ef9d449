"""Attention on a mesh is attention on one device, gradients and all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import nn, parallel
from deepseek_jax.nn.mesh_attention import mesh_attention
from deepseek_jax.parallel import MeshSpec

SIZES = {"block_size": 4, "window": 8, "is_causal": True, "ramp": 4.0}
# What these tests would take most of their time for is LLVM's work.
HASTE = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
PROJECTIONS = nn.hash_projections(jax.random.key(7), 2, 8, 2)
FULL = {"num_remote": None, "selection": "none"}
DYNAMIC = {"num_remote": 2, "selection": "lsh"}


def _arrays(
  batch=4, time=32, heads=4, kv_heads=2, dtype=jnp.float32, edges=True
):
  key = functools.partial(jax.random.fold_in, jax.random.key(0))
  make = lambda i, n: jax.random.normal(key(i), (batch, time, n, 8), dtype)
  arrays = {"q": make(0, heads), "k": make(1, kv_heads), "v": make(2, kv_heads)}
  if edges:
    rows = (batch, time, heads)
    arrays["span"] = 8 * jax.random.uniform(key(3), rows)
    arrays["offset"] = 4 * jax.random.uniform(key(4), rows)
  return arrays


def _segments(batch=4, time=32):
  """Documents that begin anywhere, and padding at the end of a row."""
  begins = jax.random.bernoulli(jax.random.key(5), 0.1, (batch, time))
  return jnp.cumsum(begins, axis=1).at[0, -5:].set(-1)


def _value_and_grad(arrays, **options):
  def loss(arrays):
    out = mesh_attention(**arrays, projections=PROJECTIONS, **options)
    return jnp.sum(jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out), out

  run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=HASTE)
  (_, out), grads = run(arrays)
  return out, grads


def _on(spec, arrays, **options):
  mesh = parallel.make_mesh(spec)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    arrays = jax.device_put(arrays, NamedSharding(mesh, P()))
    return _value_and_grad(arrays, **options)


def _assert_equal(spec, arrays, rtol=1e-5, **options):
  one = _value_and_grad(arrays, **options)
  many = _on(spec, arrays, **options)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol)


ALL = MeshSpec(data=2, sequence=2, tensor=2)


def test_rows_heads_and_tokens_may_all_be_cut():
  _assert_equal(ALL, _arrays(), **FULL, **SIZES, segment_ids=_segments())


@pytest.mark.slow
def test_query_heads_that_share_keys_choose_blocks_together():
  # "tensor" does not divide the heads of keys: heads are whole.
  arrays = _arrays(kv_heads=1)
  _assert_equal(ALL, arrays, **DYNAMIC, **SIZES, segment_ids=_segments())


@pytest.mark.parametrize(
  ("spec", "sizes"),
  [
    (MeshSpec(fsdp=8, data=1), {"batch": 4}),  # Rows that do not divide.
    (MeshSpec(tensor=4), {"kv_heads": 1}),  # Keys and values repeat.
    (MeshSpec(tensor=8), {"kv_heads": 2}),  # Heads that do not divide.
    (MeshSpec(stage=4), {}),  # An axis that cuts nothing.
  ],
)
def test_what_does_not_divide_is_whole(spec, sizes):
  _assert_equal(spec, _arrays(edges=False, **sizes), **FULL, **SIZES)


def test_tokens_may_see_what_comes_after_them():
  sizes = SIZES | {"is_causal": False}
  segments = _segments()
  arrays = _arrays(edges=False)
  _assert_equal(ALL, arrays, **FULL, **sizes, segment_ids=segments)


def test_many_rows_are_read_in_stripes():
  arrays = _arrays(batch=1, time=300, heads=1, kv_heads=1, edges=False)
  _assert_equal(MeshSpec(sequence=2), arrays, **FULL, **SIZES)


def test_bfloat16_is_near():
  arrays = _arrays(dtype=jnp.bfloat16, edges=False)
  for spec in (ALL, MeshSpec(fsdp=8, data=1)):
    _assert_equal(spec, arrays, rtol=0.05, **FULL, **SIZES)


def test_inside_of_a_pipeline_other_axes_are_still_cut():
  mesh = parallel.make_mesh(MeshSpec(data=1, stage=2, sequence=2, tensor=2))
  arrays = _arrays(edges=False)

  def stages(arrays):
    one = lambda arrays: mesh_attention(
      **arrays, projections=PROJECTIONS, **FULL, **SIZES
    )
    taken = jax.shard_map(
      one, in_specs=P(), out_specs=P(), axis_names={"stage"}, check_vma=False
    )
    return taken(arrays)

  expected = mesh_attention(**arrays, projections=PROJECTIONS, **FULL, **SIZES)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    arrays = jax.device_put(arrays, NamedSharding(mesh, P()))
    found = jax.jit(stages)(arrays)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("sizes", "options", "said"),
  [
    ({"time": 30}, FULL, "divide over the sequence=4 .* got 30"),
    ({"time": 24}, DYNAMIC, "must be whole blocks.* 6 tokens.*block_size=4"),
    (
      {"time": 32},
      DYNAMIC | {"window": 16},
      "no farther than the next device.*window=16 with 8 tokens",
    ),
    ({"time": 32}, DYNAMIC | {"two_level": True}, "two_level=True.*sequence=4"),
  ],
)
def test_a_sequence_that_cannot_be_cut_is_named(sizes, options, said):
  with pytest.raises(ValueError, match=said):
    _on(
      MeshSpec(sequence=4), _arrays(edges=False, **sizes), **(SIZES | options)
    )
