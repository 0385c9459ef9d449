"""How long collectives take on a torus of links.

A group of devices is looked up in the torus. If it fills a box of it, each of
the box's dimensions carries a share of the bytes at once: at the speed of two
links where it is a ring, of one where it is a line; devices of the group that
have others between them share the links with these. A group that fills no box
gets one link. Compilers may do worse, and none does better.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from deepseek_jax.parallel.mesh import MeshSpec, place_devices
from deepseek_jax.parallel.topology import Topology
from deepseek_jax.parallel.wire import Collective

_ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Side:
  """One dimension of the box that a group fills.

  Attributes:
    size: devices of the group along it.
    link: bytes a second over one of its links, as far as the group has it.
    links: links that a device sends over at once.
  """

  size: int
  link: float
  links: int = 1

  @property
  def bandwidth(self) -> float:
    """Bytes a second that a device can send along it."""
    return self.link * self.links


class Network:
  """The links between the devices of a mesh.

  >>> from deepseek_jax.parallel.topology import parse
  >>> network = Network(parse("v5p:4x4x4"), MeshSpec(data=4, fsdp=16))
  >>> [side.size for side in network.sides(("fsdp",))]
  [4, 4]

  Args:
    topology: where the devices are.
    spec: the mesh, with sizes that fit it.

  Raises:
    ValueError: if they do not.
  """

  def __init__(self, topology: Topology, spec: MeshSpec):
    self.topology = topology
    spec = spec.resolve(topology.num_devices)
    self.sizes = spec.sizes
    self.mesh = jax.sharding.AbstractMesh(
      tuple(spec.sizes.values()), tuple(spec.sizes)
    )
    placed = place_devices(spec, topology.places())
    places = [(d.slice_index, *d.coords) for d in placed.flat]
    self._places = np.array(places).reshape(*placed.shape, -1)

  def seconds(self, collective: Collective, sent: int | float) -> float:
    """Returns how long a device takes to send so many bytes.

    All devices do the same at the same time, each group of them for itself.

    Args:
      collective: what they do, and along which axes.
      sent: bytes of `wire.Traffic.sent`.
    """
    slices, place = self._group(collective.axes)
    if slices == 1:
      return self._within(collective, place, sent)
    # Between slices goes what is left after a sum within them.
    inner = max(1, len(place) // slices)
    part = (slices - 1) / slices / inner
    within = self._within(collective, place[:inner], sent)
    between = sent * (1.0 if inner == 1 else part)
    chip = self.topology.chip
    return within + between * chip.cores / chip.slow

  def sides(self, axes: Sequence[str]) -> list[Side]:
    """Returns the box that the devices along these axes of a mesh fill."""
    slices, place = self._group(axes)
    return self._box(place[: max(1, len(place) // slices)])

  def _group(self, axes: Sequence[str]) -> tuple[int, np.ndarray]:
    """Returns the slices and the places of one group, those by slice."""
    where = tuple(slice(None) if name in axes else 0 for name in self.sizes)
    found = self._places[where].reshape(-1, self._places.shape[-1])
    found = found[np.argsort(found[:, 0], kind="stable")]
    return len(np.unique(found[:, 0])), found[:, 1:]

  def _within(
    self, collective: Collective, place: np.ndarray, sent: int | float
  ) -> float:
    sides = self._box(place)
    if not sides:
      return 0.0
    if collective.kind in _ALL_TO_ALL:
      # Half of the bytes cross the middle of every side.
      whole = sent * collective.group / (collective.group - 1)
      return max(whole * side.size / 4 / side.bandwidth for side in sides)
    if collective.kind == "collective-permute":
      # All pass over the same links, as far as they go.
      return sent * max(1, abs(collective.shift)) / sides[0].link
    return sent / sum(side.bandwidth for side in sides)

  @property
  def _link(self) -> float:
    return self.topology.chip.link / self.topology.chip.cores

  def _box(self, place: np.ndarray) -> list[Side]:
    sides, filled = [], 1
    for dim, size in enumerate(self.topology.dims):
      at = np.unique(place[:, dim])
      if len(at) == 1:
        continue
      gap = int(np.diff(at).max())
      ring = self.topology.is_ring(dim) and gap * len(at) == size
      links = 2 if ring and len(at) > 2 else 1
      sides.append(Side(len(at), self._link / gap, links))
      filled *= len(at)
    devices = len(np.unique(place, axis=0))
    if filled == devices:
      return sides
    return [Side(devices, self._link)]
