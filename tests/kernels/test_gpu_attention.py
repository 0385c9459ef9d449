"""Laws of the Hopper kernels: on a GPU, in the interpreter, or in lowering."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from deepseek_jax.kernels.block_sparse_attention import gpu
from deepseek_jax.kernels.block_sparse_attention.problem import (
  Heads,
  Layout,
  usable_ids,
)
from deepseek_jax.kernels.block_sparse_attention.reference import (
  reference,
  visible,
)

slow = pytest.mark.slow

# What XLA must be told of a device that is not there.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
  l2_cache_size: 52428800 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
"""

BASE = dict(heads=1, time=192, group=1, size=64, choices=1, block=64, reach=0,
            is_causal=True, dtype="float16")  # fmt: skip

CASES = {
  "causal": BASE,
  "groups, segments, edges": BASE | dict(
    time=128, group=2, segments=True, span=True, offset=True, dtype="bfloat16",
  ),
  "bidirectional": BASE | dict(is_causal=False, choices=3, heads=2),
  "head size 128": BASE | dict(size=128, group=2, choices=2),
  "block 128": BASE | dict(
    time=512, block=128, choices=2, segments=True, is_causal=False
  ),
  "wide window": BASE | dict(time=384, reach=2, choices=2, span=True),
  "soft both ways": BASE | dict(
    reach=1, time=384, is_causal=False, span=True, offset=True, group=3,
  ),
  "everybody's favourite": BASE | dict(time=320, choices=2, favourite=True),
  "window alone": BASE | dict(choices=0, reach=1),
  "bfloat16": BASE | dict(dtype="bfloat16", choices=2, segments=True),
}  # fmt: skip
FAST = "groups, segments, edges"
cases = pytest.mark.parametrize(
  "case", [pytest.param(c, marks=() if c == FAST else slow) for c in CASES]
)


def make_problem(
  *, heads, time, group, size, choices, block, reach, is_causal, dtype,
  segments=False, span=False, offset=False, favourite=False,
):  # fmt: skip
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  layout = Layout(block=block, reach=reach, is_causal=is_causal, ramp=32.0)
  ids = rng.integers(0, time // block, (heads, time, choices))
  ids = jnp.asarray(ids * (not favourite), jnp.int32)
  part = jnp.arange(time) * 3 // (2 * time)
  part = jnp.where(jnp.arange(time) < time - 9, part, -1)
  problem = Heads(
    q=(normal(heads, time, group, size) * size**-0.5).astype(dtype),
    k=normal(heads, time, size).astype(dtype),
    v=normal(heads, time, size).astype(dtype),
    # Ramps end in other blocks: in the own one, windows see everything.
    span=block / 2 + 20 * normal(heads, time, group) if span else None,
    offset=10 * normal(heads, time, group) if offset else None,
    segments=jnp.tile(part, (heads, 1)) if segments else None,
  )
  usable = lambda one: usable_ids(one, layout, time // block)
  return (
    layout,
    problem,
    jax.vmap(usable)(ids),
    normal(heads, time, group, size),
  )


def value_and_grads(attend, heads, ids, d_out, d_lse=None):
  """Returns out, lse and the gradients of what can have one."""

  def loss(parts):
    out, lse = attend(heads._replace(**parts), ids)
    total = jnp.sum(out.astype(jnp.float32) * d_out)
    if d_lse is not None:
      total += jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) * d_lse)
    return total, (out, lse)

  parts = heads._asdict()
  parts.pop("segments")
  parts = {name: x for name, x in parts.items() if x is not None}
  grads, aux = jax.grad(loss, has_aux=True)(parts)
  return aux, grads


def run(function, *args):
  """Calls on a GPU if there is one, else in the interpreter."""
  if jax.default_backend() == "gpu":
    return jax.jit(function)(*args)
  if not hasattr(plgpu, "force_gpu_interpret_mode"):
    pytest.skip("jax interprets Mosaic GPU kernels from 0.11 or 0.12 on")
  with plgpu.force_gpu_interpret_mode():
    return jax.block_until_ready(jax.jit(function)(*args))


def by_gpu(layout):
  attend = lambda heads, ids: gpu.attend(layout, gpu.Tuning(), heads, ids)
  return lambda *args: value_and_grads(attend, *args)


def by_reference(layout):
  """The dense definition, in float32, one sequence and key-value head a time.

  The log-sum-exp is of windows without segments or soft edges.
  """
  sees = dict(
    block_size=layout.block, window=(layout.reach + 1) * layout.block,
    is_causal=layout.is_causal,
  )  # fmt: skip

  def one(head, ids):
    row = lambda x: None if x is None else x[None]
    key = lambda x: x[None, :, None].astype(jnp.float32)
    q = head.q.astype(jnp.float32)
    out = reference(
      q[None], key(head.k), key(head.v), ids[None, :, None], **sees,
      segment_ids=row(head.segments), span=row(head.span),
      offset=row(head.offset), ramp=layout.ramp, scale=1.0,
    )[0]  # fmt: skip
    remote, near, allowed = visible(ids[None, :, None], **sees)
    seen = ((remote[0, :, 0] | near) & allowed[0])[:, None]
    logits = jnp.einsum("tgh,sh->tgs", q, head.k.astype(jnp.float32))
    return out, jax.nn.logsumexp(logits, -1, where=seen)

  def attend(heads, ids):
    return jax.vmap(one)(heads, ids)

  return lambda *args: value_and_grads(attend, *args)


def check(found, wanted, dtype):
  """Within two roundings of the largest value."""
  assert found.keys() == wanted.keys()
  for name, x in wanted.items():
    scale = float(jnp.abs(x).max())
    limit = 2 * float(jnp.finfo(dtype).eps) * scale
    error = jnp.abs(found[name].astype(jnp.float32) - x).max()
    assert error <= limit, (name, float(error), limit)


@cases
def test_equals_the_reference(case):
  layout, heads, ids, d_out = make_problem(**CASES[case])
  (out, lse), grads = run(by_gpu(layout), heads, ids, d_out)
  (wanted, _), wanted_grads = by_reference(layout)(heads, ids, d_out)
  check({"out": out}, {"out": wanted}, out.dtype)
  check(grads, wanted_grads, out.dtype)
  assert all(grads[x].dtype == getattr(heads, x).dtype for x in grads)
  blind = jnp.zeros(lse.shape, bool)
  if heads.segments is not None:
    blind |= heads.segments[..., None] < 0
  np.testing.assert_array_equal(jnp.isneginf(lse), blind)


@slow
def test_log_sum_exp_and_its_gradient():
  layout, heads, ids, d_out = make_problem(**BASE | dict(choices=2, group=2))
  d_lse = d_out[..., 0]
  found = run(by_gpu(layout), heads, ids, d_out, d_lse)
  wanted = by_reference(layout)(heads, ids, d_out, d_lse)
  np.testing.assert_allclose(found[0][1], wanted[0][1], atol=1e-5)
  check(found[1], wanted[1], heads.q.dtype)


SHAPES = [
  BASE | dict(group=group, size=size, block=block, is_causal=causal,
              dtype=dtype, time=512, choices=2, reach=1, span=soft,
              offset=soft, segments=soft)
  for group, size, block, causal, soft, dtype in (
    (1, 64, 64, True, False, "bfloat16"),
    (4, 128, 128, False, True, "float16"),
    (1, 128, 64, True, True, "bfloat16"),
    (3, 64, 128, False, False, "bfloat16"),
  )
]  # fmt: skip
shapes = pytest.mark.parametrize(
  "shape", [SHAPES[0], *(pytest.param(s, marks=slow) for s in SHAPES[1:])]
)


def lower(shape, **jit):
  layout, *args = make_problem(**shape)
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  traced = jax.jit(by_gpu(layout), **jit).trace(*args)
  return traced.lower(lowering_platforms=("cuda",))


@shapes
def test_lowers_for_cuda_without_a_gpu(shape):
  text = lower(shape).as_text()
  assert text.count("mosaic_gpu") >= 5  # Twice forward, three times backward.


@slow
@pytest.mark.parametrize("shape", SHAPES)
def test_compiles_for_hopper_without_a_gpu(shape):
  """From Mosaic through LLVM and ptxas to machine code of sm_90a."""
  jax.devices()  # Plugins register with the first backend.
  try:
    there = topologies.get_topology_desc(
      "h100", "cuda", target_config=H100, topology="1x1x1"
    )
  except (RuntimeError, NotImplementedError) as error:
    pytest.skip(f"needs the CUDA plugin of jax (jax[cuda12]): {error}")
  sharding = jax.sharding.SingleDeviceSharding(there.devices[0])
  lowered = lower(shape, in_shardings=sharding, out_shardings=sharding)
  assert lowered.compile().memory_analysis().temp_size_in_bytes > 0


@pytest.mark.parametrize(
  ("change", "error", "words"),
  [
    (dict(dtype="float32"), NotImplementedError, "bfloat16.*implementation='x"),
    (dict(size=32), NotImplementedError, "head size.*32.*implementation='xla'"),
    (dict(block=32), NotImplementedError, "block_size.*64.*32"),
  ],
)
def test_says_what_it_cannot_do(change, error, words):
  layout, heads, ids, _ = make_problem(**BASE | change)
  with pytest.raises(error, match=words):
    gpu.attend(layout, gpu.Tuning(), heads, ids)


@pytest.mark.parametrize("tuning", [gpu.Tuning(rows=96), gpu.Tuning(stages=0)])
def test_rejects_impossible_tuning(tuning):
  layout, heads, ids, _ = make_problem(**BASE)
  with pytest.raises(NotImplementedError, match="multiple of 64"):
    gpu.attend(layout, tuning, heads, ids)


@slow
@pytest.mark.parametrize("stages", [1, 3])
def test_stages_change_nothing(stages):
  shape = BASE | dict(time=128, reach=1, choices=0)
  layout, heads, ids, d_out = make_problem(**shape)

  def both(heads, ids, d_out):
    for tuning in (gpu.Tuning(stages=2), gpu.Tuning(stages=stages)):
      attend = lambda *args, t=tuning: gpu.attend(layout, t, *args)
      yield value_and_grads(attend, heads, ids, d_out)

  one, other = run(lambda *args: list(both(*args)), heads, ids, d_out)
  jax.tree.map(np.testing.assert_array_equal, one, other)
