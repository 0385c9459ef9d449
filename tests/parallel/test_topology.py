"""Laws of topologies and their links: names, places, and seconds by hand."""

import math

import pytest

from deepseek_jax.parallel import MeshSpec
from deepseek_jax.parallel.chips import CHIPS
from deepseek_jax.parallel.network import Network
from deepseek_jax.parallel.topology import parse, scales, shapes
from deepseek_jax.parallel.wire import Collective


@pytest.mark.parametrize(
  ("name", "chips", "devices"),
  [
    ("v5p:8x8x16", 1024, 1024),
    ("v5e:16x16", 256, 256),
    ("v6e:4x8", 32, 32),
    ("v4:2x2x1", 4, 8),
    ("v5e:4x4*3", 48, 48),
  ],
)
def test_a_name_says_how_many_chips(name, chips, devices):
  topology = parse(name)
  assert (topology.num_chips, topology.num_devices) == (chips, devices)
  assert topology.name == name
  places = topology.places()
  assert len({(p.slice_index, p.coords, p.core_on_chip) for p in places}) == (
    devices
  )
  assert [p.id for p in places] == list(range(devices))


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("v5p", "must be a chip and sizes.*'v5p'"),
    ("v5p-1024", "must be a chip and sizes"),
    ("v5q:2x2x1", "one of the chips v4, v5e, v5p, v6e.*nearest is 'v5"),
    ("v5p:8x8x15", r"no topology 'v5p:8x8x15'.*'v5p:8x8x16' with 1,024 chips"),
    ("v5e:3x3", r"nearest is 'v5e:2x4' with 8"),
    ("v5p:16x16", r"nearest is 'v5p:4x8x8' with 256"),
    ("v5p:16x8x8", r"nearest is 'v5p:8x8x16'"),
    ("v5e:4x4*0", "no topology"),
  ],
)
def test_an_unknown_topology_names_the_nearest(name, said):
  with pytest.raises(ValueError, match=said):
    parse(name)


def test_every_shape_can_be_named():
  for chip in CHIPS.values():
    known = shapes(chip)
    assert len(set(known)) == len(known)
    for dims in known:
      name = f"{chip.name}:{'x'.join(map(str, dims))}"
      assert parse(name).dims == dims


def test_scales_double_and_go_on_with_slices():
  names = [topology.name for topology in scales(CHIPS["v5p"], 8, 1024)]
  assert names[0] == "v5p:2x2x2"
  assert names[-1] == "v5p:8x8x16"
  assert [parse(name).num_chips for name in names] == [
    2**n for n in range(3, 11)
  ]
  assert scales(CHIPS["v5e"], 512, 512)[0].name == "v5e:16x16*2"
  with pytest.raises(ValueError, match="number of chips that v5e comes in"):
    scales(CHIPS["v5e"], 2, 2)


def _seconds(name, axes, kind="all-gather", sent=1e9, shift=0, **sizes):
  network = Network(parse(name), MeshSpec(**({"data": 1} | sizes)))
  group = math.prod(network.sizes[axis] for axis in axes)
  return network.seconds(Collective(kind, axes, group, shift), sent)


LINK = CHIPS["v5p"].link


@pytest.mark.parametrize(
  ("seconds", "expected"),
  [
    # Rings of four, in both directions: over all three dimensions, over two.
    (_seconds("v5p:4x4x4", ("fsdp",), fsdp=64), 1e9 / (6 * LINK)),
    (_seconds("v5p:4x4x4", ("fsdp",), data=4, fsdp=16), 1e9 / (4 * LINK)),
    (_seconds("v5p:4x4x4", ("data",), data=4, fsdp=16), 1e9 / (2 * LINK)),
    # Two neighbours share one link; four of a side of eight are a line.
    (_seconds("v5p:2x2x2", ("fsdp",), fsdp=8), 1e9 / (3 * LINK)),
    (_seconds("v5e:4x4", ("fsdp",), data=4, fsdp=4), 1e9 / CHIPS["v5e"].link),
    (_seconds("v5e:16x16", ("fsdp",), data=16, fsdp=16),
     1e9 / (2 * CHIPS["v5e"].link)),
    # Both axes of a mesh together have the links of both.
    (_seconds("v5p:4x4x4", ("data", "fsdp"), data=4, fsdp=16),
     1e9 / (6 * LINK)),
    # A quarter of what everybody has crosses the middle of a ring of four
    # either way, over two links.
    (_seconds("v5p:4x4x4", ("expert",), "all-to-all", 0.75e9, data=16,
              expert=4), 1e9 / (2 * LINK)),
    (_seconds("v5p:4x4x4", ("stage",), "collective-permute", shift=1, data=16,
              stage=4), 1e9 / LINK),
    (_seconds("v5p:4x4x4", ("stage",), "collective-permute", shift=-2, data=16,
              stage=4), 2e9 / LINK),
    # Two cores of a chip share its links.
    (_seconds("v4:4x4x4", ("fsdp",), fsdp=128), 2e9 / (6 * CHIPS["v4"].link)),
    # Between slices, over the slow network.
    (_seconds("v5e:4x4*2", ("replica",), replica=2, fsdp=16),
     1e9 / CHIPS["v5e"].slow),
    # Nobody to talk to.
    (_seconds("v5p:2x2x2", (), data=8), 0.0),
  ],
)  # fmt: skip
def test_collectives_take_what_their_links_take(seconds, expected):
  assert seconds == pytest.approx(expected)


def test_groups_with_others_between_them_share_links():
  network = Network(parse("v5e:4x4"), MeshSpec(data=2, fsdp=8))
  network._places[..., 1:] = network._places[..., 1:].copy()
  sides = {axis: network.sides((axis,)) for axis in ("data", "fsdp")}
  assert math.prod(side.size for side in sides["data"]) == 2
  assert math.prod(side.size for side in sides["fsdp"]) == 8
  link = CHIPS["v5e"].link
  # Of one dimension of four, one axis has the near pairs, the other the far.
  links = sorted(s.link for axis in sides for s in sides[axis] if s.size == 2)
  assert links == [link / 2, link]


def test_a_slow_axis_sends_what_a_sum_within_slices_leaves():
  network = Network(parse("v5e:4x4*2"), MeshSpec(replica=2, data=16))
  both = Collective("all-reduce", ("replica", "data"), 32)
  inner = Collective("all-reduce", ("data",), 16)
  slow = network.seconds(both, 1e9) - network.seconds(inner, 1e9)
  assert slow == pytest.approx(1e9 / 2 / 16 / CHIPS["v5e"].slow)
