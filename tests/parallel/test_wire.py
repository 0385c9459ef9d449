"""Bytes on the wire: by hand, for every collective, notation and loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel import MeshSpec, hlo, hlo_loops, make_mesh, wire
from deepseek_jax.parallel.replica_groups import (
  crossed_axes,
  replica_groups,
  source_target_pairs,
)

ROWS = P(("data", "fsdp", "tensor"))
SHARD = 2 * 32 * 4  # bytes of [2, 32] float32, what one of eight devices has.


@pytest.fixture(scope="module")
def mesh():
  return make_mesh(MeshSpec(data=2, fsdp=2, tensor=2))


def _sent(mesh, function, out=ROWS):
  """Bytes that a function of one shard [2, 32] sends."""
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=ROWS, out_specs=out, check_vma=False
  )
  x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
  return wire.wire_bytes(jax.jit(mapped).lower(x).compile(), mesh)


def _psum(axes):
  return lambda x: jax.lax.psum(x, axes)


_swap = lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])


@pytest.mark.parametrize(
  ("function", "kind", "place", "sent"),
  [
    (_psum("data"), "all-reduce", "data", SHARD),
    (_psum(("data", "tensor")), "all-reduce", "data+tensor", 1.5 * SHARD),
    (
      _psum(("data", "fsdp", "tensor")),
      "all-reduce",
      "data+fsdp+tensor",
      1.75 * SHARD,
    ),
    (
      lambda x: jax.lax.all_gather(x, ("fsdp", "tensor"), tiled=True),
      "all-gather",
      "fsdp+tensor",
      3 * SHARD,
    ),
    (
      lambda x: jax.lax.psum_scatter(
        x, "tensor", scatter_dimension=1, tiled=True
      ),
      "reduce-scatter",
      "tensor",
      SHARD / 2,
    ),
    (
      lambda x: jax.lax.all_to_all(x, ("data", "tensor"), 1, 0, tiled=True),
      "all-to-all",
      "data+tensor",
      0.75 * SHARD,
    ),
    (_swap, "collective-permute", "fsdp", SHARD),
    # Half of the devices send nothing: it is the others that count.
    (
      lambda x: jax.lax.ppermute(x, "data", [(0, 1)]),
      "collective-permute",
      "data",
      SHARD,
    ),
  ],
)
def test_a_collective_sends_what_its_ring_does(
  mesh, function, kind, place, sent
):
  out = P(("data", "fsdp")) if kind == "reduce-scatter" else ROWS
  assert _sent(mesh, function, out) == {kind: {place: sent}}


def _scanned(x):
  def body(x, _):
    inner = lambda x, _: (_psum("data")(x) * 0.5, None)
    return _swap(jax.lax.scan(inner, x, None, length=3)[0]), None

  return jax.lax.scan(body, x, None, length=5)[0]


def test_loops_count_as_often_as_they_run(mesh):
  assert _sent(mesh, _scanned) == {
    "all-reduce": {"data": 15 * SHARD},
    "collective-permute": {"fsdp": 5 * SHARD},
  }


def test_a_loop_that_depends_on_data_counts_once_and_is_named(mesh):
  def until(x):
    return jax.lax.while_loop(lambda x: x[0, 0] < 9, _psum("data"), x)

  x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
  mapped = jax.shard_map(
    until, mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False
  )
  found = wire.traffic(jax.jit(mapped).lower(x).compile(), mesh)
  assert dict(found.sent) == {
    wire.Collective("all-reduce", ("data",), 2): SHARD
  }
  assert len(found.open_loops) == 1


def test_of_a_conditional_it_is_the_branch_that_sends_most(mesh):
  def choose(x):
    return jax.lax.cond(x[0, 0] > 0, _psum(("data", "fsdp")), _swap, x)

  assert _sent(mesh, choose) == {"all-reduce": {"data+fsdp": 1.5 * SHARD}}


def _step_bytes(mesh, kernel, rows, out):
  """Bytes of one step of `x @ w` with gradients, placed in this way."""
  put = lambda spec: NamedSharding(mesh, spec)
  w = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=put(kernel))
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=put(rows))

  def step(w, x):
    y = jax.lax.with_sharding_constraint(x @ w, put(out))
    return jax.lax.with_sharding_constraint(y * y, put(out))

  return wire.wire_bytes(jax.jit(step).lower(w, x).compile(), mesh)


def test_fsdp_fetches_the_kernel_whole():
  mesh = make_mesh(MeshSpec(data=1, fsdp=8))
  sent = _step_bytes(mesh, P("fsdp"), P("fsdp"), P("fsdp"))
  assert sent == {"all-gather": {"fsdp": 32 * 64 * 4 * 7 / 8}}


def test_tensor_sums_what_its_contraction_leaves():
  mesh = make_mesh(MeshSpec(data=2, tensor=4))
  sent = _step_bytes(mesh, P("tensor"), P("data", "tensor"), P("data"))
  assert sent == {"all-reduce": {"tensor": 2 * 32 * 64 * 4 * 3 / 4}}


def test_without_a_mesh_places_are_groups_and_it_must_fit(mesh):
  x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
  mapped = jax.shard_map(
    _psum("data"), mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False
  )
  compiled = jax.jit(mapped).lower(x).compile()
  assert wire.wire_bytes(compiled) == {"all-reduce": {"2 devices": SHARD}}
  assert wire.wire_bytes(compiled.as_text()) == wire.wire_bytes(compiled)
  four = make_mesh(devices=jax.devices()[:4])
  with pytest.raises(ValueError, match=r"mesh must.*4 devices .* of 8"):
    wire.wire_bytes(compiled, four)
  with pytest.raises(ValueError, match=r"compiled must be.*'nothing'"):
    wire.wire_bytes("nothing")
  step = lambda x: x
  for found in (step, jax.jit(step), jax.jit(step).lower(x), None, ""):
    with pytest.raises(ValueError, match=r"compiled must be what jax\.jit\(f"):
      wire.wire_bytes(found, four)


PAIRS = [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("{{0,4},{1,5},{2,6},{3,7}}", PAIRS),
    ("[4,2]<=[2,4]T(1,0)", PAIRS),
    ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("[1,8]<=[8]", [list(range(8))]),
    ("{}", [list(range(8))]),
    ("mesh['a'=2,'b'=4] {'a'}", PAIRS),
    ("mesh[a=2,b=1,c=4] {a}", PAIRS),
    ("mesh['a'=2,'b'=4] {'a','b'}", [list(range(8))]),
    ("mesh['a'=8] {'a':(1)2}", PAIRS),
    ("mesh['a'=8] {'a':(2)4}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", PAIRS),
    ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", PAIRS),
  ],
)
def test_every_notation_of_groups_is_read(text, groups):
  tail = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
  assert [group.tolist() for group in replica_groups(tail, 8)] == groups


def test_an_unknown_notation_is_named():
  with pytest.raises(ValueError, match=r"must be a list.*<5 of 8>"):
    replica_groups("replica_groups=<5 of 8>", 8)


def test_every_set_of_axes_is_known_by_its_groups():
  sizes = {"a": 2, "one": 1, "b": 3, "c": 4}
  devices = np.arange(24).reshape(2, 1, 3, 4)
  for axes, order in {
    ("a",): (1, 2, 3, 0),
    ("b",): (0, 1, 3, 2),
    ("a", "c"): (1, 2, 0, 3),
    ("a", "b", "c"): (0, 1, 2, 3),
  }.items():
    size = np.prod([sizes[axis] for axis in axes])
    groups = list(devices.transpose(order).reshape(-1, size))
    assert crossed_axes(groups, sizes) == axes
  pairs = source_target_pairs("source_target_pairs={{0,4}, {4,8}}")
  assert crossed_axes(list(pairs), sizes) == ("b",)


# What the TPU compiler writes: no note of trips, starts and ends apart, and a
# reduce-scatter as a fusion. Its names and layouts are as it prints them.
TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter (input: bf16[64,16]) -> bf16[8,16] {
  %input = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,16]{1,0:T(8,128)(2,1)} all-reduce(%input), \
channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = bf16[8,16]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, \
%zero, %zero), dynamic_slice_sizes={8,16}
}

%gathered (a: bf16[8,16]) -> bf16[64,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[64,16]{1,0} all-gather(%a), \
replica_groups=[1,8]<=[8], dimensions={0}
}

%next (n: s32[], step: s32[]) -> s32[] {
  %n = s32[] parameter(0)
  %step = s32[] parameter(1)
  ROOT %later = s32[] add(%n, %step)
}

%body (s: (s32[], bf16[64,16], s32[], s32[])) -> (s32[], bf16[64,16], \
s32[], s32[]) {
  %s = (s32[]{:T(128)}, bf16[64,16]{1,0:T(8,128)(2,1)S(1)}, s32[], \
/*index=3*/s32[]) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%s), index=0
  %step.1 = s32[] get-tuple-element(%s), index=2
  %end.1 = s32[] get-tuple-element(%s), index=3
  %wrapped = s32[] fusion(%at, %step.1), kind=kLoop, calls=%next
  %x.1 = bf16[64,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s), index=1
  %part = bf16[8,16]{1,0:T(8,128)(2,1)} fusion(%x.1), kind=kCustom, \
calls=%all-reduce-scatter
  %started = ((bf16[8,16]{1,0}), bf16[64,16]{1,0}, u32[]) \
async-start(%part), calls=%gathered
  %whole = bf16[64,16]{1,0} async-done(%started)
  %sent = (bf16[64,16]{1,0}, bf16[64,16]{1,0}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%whole), \
source_target_pairs={{0,1},{1,0},{2,2}}
  %received = bf16[64,16]{1,0} collective-permute-done(%sent)
  ROOT %out = (s32[], bf16[64,16]{1,0}, s32[], s32[]) tuple(%wrapped, \
%received, %step.1, %end.1)
}

%goes_on (s: (s32[], bf16[64,16], s32[], s32[])) -> pred[] {
  %s.1 = (s32[], bf16[64,16]{1,0}, s32[], s32[]) parameter(0)
  %at.1 = s32[] get-tuple-element(%s.1), index=0
  %end.2 = s32[] get-tuple-element(%s.1), index=3
  ROOT %less = pred[]{:T(512)} compare(%at.1, %end.2), direction=LE
}

ENTRY %main (p: bf16[64,16]) -> bf16[64,16] {
  %p = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %first = s32[]{:T(128)} constant(-2)
  %begin = s32[]{:T(128)} copy(%first)
  %three = s32[] constant(3)
  %ten = s32[] constant(10)
  %start = (s32[], bf16[64,16]{1,0}, s32[], s32[]) tuple(%begin, %p, \
%three, %ten)
  %loop = (s32[], bf16[64,16]{1,0}, s32[], s32[]) while(%start), \
condition=%goes_on, body=%body
  ROOT %end = bf16[64,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_a_tpu_writes_is_read():
  mesh = make_mesh(MeshSpec(fsdp=4))
  trips, whole = 5, 64 * 16 * 2  # -2, 1, 4, 7 and 10.
  found = wire.traffic(TPU, mesh)
  everyone = ("data", "fsdp")
  assert found.sent == {
    wire.Collective("reduce-scatter", everyone, 8): trips * whole * 7 / 8,
    wire.Collective("all-gather", everyone, 8): trips * whole * 7 / 8,
    wire.Collective("collective-permute", ("fsdp",), 2, 1): trips * whole,
  }
  assert set(found.calls.values()) == {trips}
  assert found.open_loops == ()


# One of two slices of four; the slow network is the hosts' business.
SLICES = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %within = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %after = token[] after-all()
  %send = (f32[64]{0}, u32[], token[]) send(%within, %after), channel_id=2, \
is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %done = token[] send-done(%send), channel_id=2
  %recv = (f32[64]{0}, u32[], token[]) recv(%after), channel_id=1
  %end = (f32[64]{0}, token[]) recv-done(%recv), channel_id=1
  ROOT %got = f32[64]{0} get-tuple-element(%end), index=0
}
"""


def test_what_goes_to_other_slices_is_read():
  mesh = make_mesh(MeshSpec(replica=2, fsdp=4))
  assert wire.wire_bytes(SLICES, mesh) == {
    "all-reduce": {"fsdp": 2 * 3 / 4 * 256, "replica": 256}
  }
  with pytest.raises(ValueError, match=r"'replica' alone, got 8 devices .* 4"):
    wire.wire_bytes(SLICES, make_mesh(MeshSpec(fsdp=4)))


def test_a_counter_is_not_followed_for_ever(monkeypatch):
  monkeypatch.setattr(hlo_loops, "MAX_TRIPS", 3)
  found = wire.traffic(TPU)
  assert found.open_loops == ("loop",)
  assert set(found.calls.values()) == {1}


def test_types_are_measured_without_their_padding():
  shapes = hlo.parse_shapes("(s4[3]{0:T(8)}, pred[2,<=5], (c64[], token[]))")
  assert [shape.bytes for shape in shapes] == [2, 10, 8, 0]
