"""Laws of the TPU kernels: interpreted on CPU, and compiled for TPUs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from deepseek_jax.kernels.block_sparse_attention import tpu
from deepseek_jax.kernels.block_sparse_attention.problem import (
  Heads,
  Layout,
  usable_ids,
)
from deepseek_jax.kernels.block_sparse_attention.reference import reference
from deepseek_jax.kernels.block_sparse_attention.tpu_parts import (
  Tuning,
  in_turns,
)

slow = pytest.mark.slow
BLOCK, TIME, KV_HEADS, CHOICES, SIZE = 16, 96, 2, 2, 16


@pytest.fixture(autouse=True)
def promotion():
  """The plan of the tiles promotes ranks."""
  with jax.numpy_rank_promotion("allow"):
    yield


def by_kv_head(x):
  """[1, T, K·G, ...] to [K, T, G, ...]."""
  x = x.reshape(TIME, KV_HEADS, -1, *x.shape[3:])
  return x.swapaxes(0, 1)


def attend(layout, tuning, arrays, ids, segments):
  one = lambda x: None if x is None else by_kv_head(x)
  q = arrays["q"] * jnp.asarray(SIZE**-0.5, arrays["q"].dtype)
  heads = Heads(
    one(q), one(arrays["k"])[:, :, 0], one(arrays["v"])[:, :, 0],
    one(arrays.get("span")), one(arrays.get("offset")),
    None if segments is None else jnp.repeat(segments, KV_HEADS, axis=0),
  )  # fmt: skip
  ids = usable_ids(by_kv_head(ids)[:, :, 0], layout, TIME // BLOCK)
  out, lse = tpu.attend(layout, tuning, heads, ids)
  return out.swapaxes(0, 1).reshape(1, TIME, -1, SIZE), lse


def problem(group=1, dtype="float32", segments=False, edges=0, seed=0):
  """Returns arrays to differentiate by, chosen blocks, and segments."""
  rng = np.random.default_rng(seed)
  heads = KV_HEADS * group
  normal = lambda n: jnp.asarray(rng.normal(size=(1, TIME, n, SIZE)), dtype)
  arrays = {"q": normal(heads), "k": normal(KV_HEADS), "v": normal(KV_HEADS)}
  uniform = lambda low, high: jnp.asarray(
    rng.uniform(low, high, (1, TIME, heads)), jnp.float32
  )
  if edges >= 1:
    arrays["span"] = uniform(0, 32)
  if edges >= 2:
    arrays["offset"] = uniform(-8, 16)
  # Too small and too great numbers, and blocks of the window, among them.
  ids = rng.integers(-1, TIME // BLOCK + 1, (1, TIME, KV_HEADS, CHOICES))
  number = np.where(np.arange(TIME) < 90, np.arange(TIME) // 40, -1)[None]
  return arrays, jnp.asarray(ids), jnp.asarray(number) if segments else None


def errors(is_causal, cells, **kwargs):
  """Returns the largest errors of the output and of each gradient."""
  arrays, ids, segments = problem(**kwargs)
  layout = Layout(block=BLOCK, reach=1, is_causal=is_causal, ramp=12.0)
  # As many heads at once as blocks in a cell: one takes turns, two do not.
  tuning = Tuning(rows=16, blocks=cells, heads=cells, interpret=True)
  weights = np.random.default_rng(1).normal(size=arrays["q"].shape)

  def ours(arrays):
    out = attend(layout, tuning, arrays, ids, segments)[0]
    return jnp.sum(out.astype(jnp.float32) * weights), out

  def meant(arrays):
    out = reference(
      **arrays, block_ids=ids, block_size=BLOCK, window=2 * BLOCK,
      is_causal=is_causal, segment_ids=segments, ramp=12.0,
    )  # fmt: skip
    return jnp.sum(out * weights), out

  run = lambda f: jax.jit(jax.value_and_grad(f, has_aux=True))
  (_, out), grads = run(ours)(arrays)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
  (_, wanted), wanted_grads = run(meant)(exact)
  error = lambda a, b: float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)))
  return error(out, wanted), jax.tree.map(error, grads, wanted_grads)


# What is causal, cells, group, type, segments, edges of the window.
FEW = [(True, 2, 2, "float32", True, 2), (False, 1, 1, "bfloat16", False, 0)]
# Cells alternate, as they have little to do with the rest.
ALL = [
  (causal, 1 + (group + edges) % 2, group, dtype, segments, edges)
  for causal, group, dtype, segments, edges in itertools.product(
    (True, False), (1, 2), ("float32", "bfloat16"), (True, False), (0, 1, 2)
  )
  if dtype == "float32" or edges == group
]
CASES = [*FEW, *(pytest.param(*c, marks=slow) for c in ALL if c not in FEW)]


@pytest.mark.parametrize(
  ("is_causal", "cells", "group", "dtype", "segments", "edges"), CASES
)
def test_kernels_mean_what_the_reference_means(
  is_causal, cells, group, dtype, segments, edges
):
  out, grads = errors(
    is_causal, cells, group=group, dtype=dtype, segments=segments, edges=edges
  )
  # Of bfloat16 numbers up to about 4, which have 8 bits.
  assert out <= (2e-6 if dtype == "float32" else 2**-6)
  assert max(grads.values()) <= (1e-5 if dtype == "float32" else 2**-4)


def run_heads(tuning, heads, ids, is_causal=True):
  layout = Layout(block=BLOCK, reach=0, is_causal=is_causal, ramp=1.0)
  run = functools.partial(tpu.attend, layout, tuning)
  return jax.jit(run)(heads, ids)


def some_heads(**kwargs):
  arrays, ids, _ = problem(**kwargs)
  q, k, v = (by_kv_head(arrays[name]) for name in "qkv")
  ids = by_kv_head(ids)[:, :, 0]
  ids = jnp.where(ids < 1, ids, -1)  # The first block, which is past to most.
  ids = ids.at[:, :BLOCK].set(-1).at[..., 1].set(-1)
  heads = Heads(q, k[:, :, 0], v[:, :, 0], None, None, None)
  return heads, ids


def test_padding_sees_nothing_and_gets_no_gradient():
  heads, ids = some_heads()
  segments = jnp.zeros(heads.k.shape[:2], jnp.int32).at[:, 40:].set(-1)
  heads = heads._replace(segments=segments)
  tuning = Tuning(rows=16, interpret=True)

  def total(q):
    out, lse = run_heads(tuning, heads._replace(q=q), ids)
    return jnp.sum(out**2), (out, lse)

  grad, (out, lse) = jax.grad(total, has_aux=True)(heads.q)
  assert not out[:, 40:].any()
  assert jnp.isneginf(lse[:, 40:]).all()
  assert jnp.isfinite(lse[:, :40]).all()
  assert not grad[:, 40:].any()
  assert jnp.isfinite(grad).all()


def test_turns_take_empty_arrays_along():
  x = jnp.arange(12).reshape(6, 2), jnp.zeros((6, 0))
  doubled, empty = in_turns(2, lambda tree: (2 * tree[0], tree[1]), x)
  np.testing.assert_array_equal(doubled, 2 * x[0])
  assert empty.shape == (6, 0)


def test_no_choices_leave_the_window():
  heads, ids = some_heads()
  tuning = Tuning(rows=16, heads=1, interpret=True)
  none = run_heads(tuning, heads, ids[:, :, :0])
  useless = run_heads(tuning, heads, jnp.full_like(ids, -1))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6), none, useless
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dtype="float16"), "q must be float32 or bfloat16 .* got float16"),
    (dict(block=12), "multiples of 8 .* got 12 and 16"),
    (dict(block=8, dtype="bfloat16"), "multiples of 16 .* got 8 and 16"),
    (dict(block=1024), "16 MiB .* got 1024 and 1.* smaller block_size"),
  ],
)  # fmt: skip
def test_what_the_kernels_cannot_do_is_said(change, message):
  wanted = dict(block=16, dtype="float32") | change
  block, dtype = wanted["block"], wanted["dtype"]
  shape = lambda *s: jax.ShapeDtypeStruct((1, 2 * block, *s), dtype)
  heads = Heads(shape(1, 64), shape(64), shape(64), None, None, None)
  ids = jax.ShapeDtypeStruct((1, 2 * block, 1), jnp.int32)
  layout = Layout(block=block, reach=0, is_causal=True, ramp=1.0)
  run = functools.partial(tpu.attend, layout, Tuning(rows=16))
  with pytest.raises(NotImplementedError, match=message) as error:
    jax.eval_shape(run, heads, ids)
  assert "use implementation='xla'" in str(error.value)


@pytest.mark.parametrize(
  ("group", "window", "cell"), [(1, 256, 128), (1, 8192, 512), (4, 8192, 256)]
)
def test_cells_of_long_windows_are_as_large_as_fits(group, window, cell):
  shape = lambda *s: jax.ShapeDtypeStruct((1, 8192, *s), "bfloat16")
  heads = Heads(shape(group, 128), shape(128), shape(128), None, None, None)
  layout = Layout(block=64, reach=window // 64 - 1, is_causal=True, ramp=1.0)
  tuning = tpu.tuning(layout, heads)
  assert tuning.blocks * 64 == cell
  assert tpu.why_not(layout, tuning, heads) is None


def _cost(function, *arguments):
  """Returns the summed estimates of all kernels, flops and bytes."""
  found = []

  def look(jaxpr):
    for one in jaxpr.eqns:
      if one.primitive.name == "pallas_call":
        found.append(one.params["cost_estimate"])
      else:
        for value in one.params.values():
          inner = getattr(value, "jaxpr", value)
          if hasattr(inner, "eqns"):
            look(inner)

  look(jax.make_jaxpr(function)(*arguments).jaxpr)
  return sum(x.flops for x in found), sum(x.bytes_accessed for x in found)


def test_kernels_say_what_they_cost():
  heads, ids = some_heads()
  layout = Layout(block=BLOCK, reach=5, is_causal=True, ramp=1.0)
  run = lambda heads: tpu.attend(layout, Tuning(), heads, ids[:, :, :0])[0]
  flops, moved = _cost(run, heads)
  # Of six cells every one meets itself and those before it.
  pairs, wide = KV_HEADS * 6 * 7 // 2, BLOCK * SIZE * 4
  assert flops == pairs * 2 * (2 * BLOCK * BLOCK * SIZE)
  own = KV_HEADS * 6 * (wide + wide + BLOCK * 4)  # q, out and its lse.
  assert moved == own + pairs * 2 * wide
  grad = lambda heads: jax.grad(lambda q: run(heads._replace(q=q)).sum())
  both, _ = _cost(lambda heads: grad(heads)(heads.q), heads)
  assert both == flops // 2 * (2 + 3 + 4)


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
  """Returns a function from the name of a TPU to a device to compile for."""
  pytest.importorskip(
    "libtpu", reason="the TPU compiler comes with the extra deepseek-jax[tpu]"
  )
  with pytest.MonkeyPatch.context() as patch:
    # Else it asks a metadata server which TPU this is.
    patch.setenv("TPU_SKIP_MDS_QUERY", "1")
    # One process may hold a chip; any number may compile for one.
    patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    yield lambda chip: topologies.get_topology_desc(
      TOPOLOGIES[chip], "tpu"
    ).devices[0]


@slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("size", "block", "group"), [
  (64, 64, 1), (64, 64, 4), (64, 128, 4), (128, 64, 1), (128, 128, 1),
  (128, 128, 4), (80, 48, 3),
])  # fmt: skip
def test_kernels_compile_for_tpus(compiler, chip, dtype, size, block, group):
  # The kernels do not depend on the length; the sort of the plan, which takes
  # most of the time to compile, does.
  heads, time, choices = 1, 4 * block, 2
  place = jax.sharding.SingleDeviceSharding(compiler(chip))
  shape = lambda dtype, *s: jax.ShapeDtypeStruct(
    (heads, time, *s), dtype, sharding=place
  )
  q = shape(dtype, group, size)
  edge = shape(jnp.float32, group)
  problem = Heads(
    q, shape(dtype, size), shape(dtype, size), edge, edge, shape(jnp.int32)
  )
  layout = Layout(block=block, reach=1, is_causal=True, ramp=32.0)
  attend = functools.partial(tpu.attend, layout, tpu.tuning(layout, problem))

  def forward_and_backward(heads, ids, d_out):
    inner = lambda *x: attend(Heads(*x, heads.segments), ids)[0]
    out, pull = jax.vjp(inner, *heads[:5])
    return out, pull(d_out)

  run = jax.jit(forward_and_backward).lower(
    problem, shape(jnp.int32, choices), q
  )
  text = run.compile().as_text()
  for kernel in ("forward_kernel", "backward_kernel", "windows_forward_kernel",
                 "windows_query_kernel", "windows_key_kernel"):  # fmt: skip
    assert kernel in text
