"""Laws of the roofline: what is counted, and what bounds a step."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel import MeshSpec, hlo, hlo_cost, make_mesh
from deepseek_jax.parallel.chips import CHIPS
from deepseek_jax.parallel.roofline import efficiency, roofline
from deepseek_jax.parallel.topology import parse


def _work(function, *shapes, dtype="float32"):
  arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  compiled = jax.jit(function).lower(*arguments).compile()
  return hlo_cost.work(hlo.parse(compiled))


def _loop(x, w):
  return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]


@pytest.mark.parametrize(
  ("function", "shapes", "flops"),
  [
    (jnp.matmul, ((8, 16), (16, 32)), 2 * 8 * 16 * 32),
    (jnp.matmul, ((3, 8, 16), (3, 16, 4)), 2 * 3 * 8 * 16 * 4),
    (_loop, ((8, 16), (5, 16, 16)), 5 * 2 * 8 * 16 * 16),
    (lambda x: jnp.sin(x) + x, ((64, 64),), 0),
    # Of 10 places 8 have three taps, the others two.
    (
      lambda x, k: jax.lax.conv_general_dilated(x, k, (1,), "SAME"),
      ((2, 3, 10), (5, 3, 3)),
      2 * 2 * 5 * 3 * (8 * 3 + 2 * 2),
    ),
    (
      lambda x, k: jax.lax.conv_general_dilated(x, k, (2,), "VALID"),
      ((2, 3, 11), (5, 3, 3)),
      2 * 2 * 5 * 3 * 5 * 3,
    ),
  ],
)
def test_products_count_as_often_as_they_are_computed(function, shapes, flops):
  assert _work(function, *shapes).total_flops == flops


def test_a_gradient_with_remat_computes_the_forward_pass_twice():
  body = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None))
  loss = lambda x, w: jax.lax.scan(body, x, w)[0].sum()
  work = _work(jax.grad(loss, (0, 1)), (8, 16), (5, 16, 16))
  assert work.total_flops == 4 * 5 * 2 * 8 * 16 * 16


def test_memory_is_what_instructions_take_and_give():
  size = 4 * 256 * 256
  assert _work(lambda x: jnp.sin(x) + 1, (256, 256)).total_bytes == 2 * size
  # A scan reads its layers slice by slice, and writes what it stacks so.
  work = _work(
    lambda x, w: jax.lax.scan(lambda x, w: (x, x + w), x, w)[1],
    (256, 256),
    (50, 256, 256),
  )
  assert 50 * 3 * size <= work.total_bytes <= 50 * 4.1 * size


# As the TPU compiler prints them: fast memory, a prefetch, a product spelled as
# a convolution over heads, kernels that say what they cost or do not, and a
# collective that travels along inside a product.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=4

%product (a: bf16[8,64], b: bf16[4,16,64], c: bf16[4,16,16]) -> \
(bf16[8,4,16], bf16[4,16,16], bf16[4,16,64]) {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,16,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = bf16[4,16,16]{2,1,0:T(8,128)(2,1)} parameter(2)
  %seen = bf16[8,64,1]{1,0,2} bitcast(%a)
  %convolution = bf16[8,4,16]{2,0,1:T(8,128)(2,1)} convolution(%seen, %b), \
window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f
  %all-gather = bf16[4,16,64]{2,1,0} all-gather(%c), channel_id=1, \
replica_groups=[1,4]<=[4], dimensions={2}
  ROOT %tuple = (bf16[8,4,16]{2,0,1}, bf16[4,16,16]{2,1,0}, \
bf16[4,16,64]{2,1,0}) tuple(%convolution, %c, %all-gather)
}

%step (c.1: bf16[4,16,16]) -> bf16[4,16,64] {
  %c.1 = bf16[4,16,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[4,16,64]{2,1,0} all-gather(%c.1), channel_id=1, \
replica_groups=[1,4]<=[4], dimensions={2}
}

ENTRY %main (x: bf16[8,64], w: bf16[4,16,64]) -> f32[8,64] {
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[4,16,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %shard = bf16[4,16,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(2)
  %copy-start = (bf16[4,16,64]{2,1,0:T(8,128)(2,1)S(1)}, \
bf16[4,16,64]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[4,16,64]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %fused = (bf16[8,4,16]{2,0,1}, bf16[4,16,16]{2,1,0}, \
bf16[4,16,64]{2,1,0}) fusion(%x, %copy-done, %shard), kind=kOutput, \
calls=%product
  %more = bf16[4,16,64]{2,1,0} fusion(%shard), kind=kCustom, calls=%step
  %first = bf16[8,4,16]{2,0,1} get-tuple-element(%fused), index=0
  %told = f32[8,64]{1,0:T(8,128)} custom-call(%first), \
custom_call_target="tpu_custom_call", backend_config={"custom_call_config":\
{"body":"","cost_estimate":{"flops":1000,"transcendentals":0,\
"bytes_accessed":500}}}
  ROOT %silent = f32[8,64]{1,0:T(8,128)S(1)} custom-call(%told), \
custom_call_target="tpu_custom_call"
}
"""


def test_what_a_tpu_computes_and_moves_is_read():
  work = hlo_cost.work(hlo.parse(TPU))
  products = 2 * 8 * 4 * 16 * 64
  assert work.flops == {"main/fused": products, "main/told": 1000}
  assert work.bytes == {
    "main/copy-start": 4 * 16 * 64 * 2,
    "main/fused": 8 * 64 * 2 + 8 * 4 * 16 * 2,
    "main/told": 500,
    "main/silent": 8 * 64 * 4,
  }
  assert work.unknown == ("silent",)
  found = roofline(TPU, parse("v5e:2x2"), MeshSpec(fsdp=4, data=1))
  (gathered,) = found.collectives
  assert (gathered.kind, gathered.calls) == ("all-gather", 1)
  assert gathered.sent == 4 * 16 * 64 * 2 * 3 / 4
  assert found.unknown == ("silent",)


def _compiled(mesh):
  put = lambda *dims: NamedSharding(mesh, P(*dims))
  shape = lambda place, *dims: jax.ShapeDtypeStruct(
    dims, jnp.float32, sharding=place
  )

  def step(x, w):
    return jax.lax.with_sharding_constraint(x @ w, put("fsdp"))

  x, w = shape(put("fsdp"), 512, 256), shape(put("fsdp"), 256, 128)
  return jax.jit(step).lower(x, w).compile()


def test_bounds_hold_what_they_say():
  spec = MeshSpec(fsdp=8)
  compiled = _compiled(make_mesh(spec, jax.devices()[:8]))
  chip, topology = CHIPS["v5e"], parse("v5e:2x4")
  model_flops = 2 * 512 * 256 * 128
  found = roofline(compiled, topology, spec, model_flops=model_flops)
  assert found.products == pytest.approx(model_flops / 8 / chip.flops)
  (gathered,) = found.collectives
  assert gathered.sent == 256 * 128 * 4 * 7 / 8
  # A line of four and one of two: a link of each.
  assert gathered.seconds == pytest.approx(gathered.sent / (2 * chip.link))
  assert found.network == gathered.seconds
  assert found.overlapped == max(found.products, found.memory, found.network)
  assert found.limit == "network"
  assert found.apart == found.in_turn + found.network
  assert max(found.products, found.memory) <= found.in_turn
  assert found.in_turn <= found.products + found.memory
  for overlapped, seconds in ((True, found.overlapped), (False, found.apart)):
    assert found.utilization(overlapped=overlapped) == pytest.approx(
      model_flops / 8 / chip.flops / seconds
    )
  silent = roofline(compiled, topology, spec)
  assert silent.utilization(overlapped=True) is None


def test_what_does_not_fit_together_is_refused():
  compiled = _compiled(make_mesh(MeshSpec(fsdp=8), jax.devices()[:8]))
  with pytest.raises(ValueError, match="16 devices for a program of 8"):
    roofline(compiled, parse("v5e:4x4"), MeshSpec(fsdp=8))
  with pytest.raises(ValueError, match="fsdp=3 = 3 for 8 devices"):
    roofline(compiled, parse("v5e:2x4"), MeshSpec(fsdp=3))


def test_permutations_there_and_back_share_no_links():
  spec = MeshSpec(fsdp=4, data=1)
  mesh = make_mesh(spec, jax.devices()[:4])

  def exchange(ways):
    def both(x):
      y = [
        jax.lax.ppermute(x * (k + 1), "fsdp", [(i, (i + k) % 4)
        for i in range(4)]) for k in ways
      ]  # fmt: skip
      return sum(y)

    mapped = jax.shard_map(
      both, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp")
    )
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    compiled = jax.jit(mapped).lower(x).compile()
    return roofline(compiled, parse("v5e:2x2"), spec).network

  there = exchange([1])
  assert exchange([1, -1]) == pytest.approx(there)
  assert there > 0


def test_efficiency_is_speed_against_the_fewest():
  assert efficiency({8: 2.0, 16: 2.5, 32: 4.0}, {8: 1, 16: 1, 32: 2}) == {
    8: 1.0,
    16: 0.8,
    32: 1.0,
  }
