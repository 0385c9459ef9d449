"""Meshes: the axes that this library knows, their sizes, their order."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("replica", "stage", "data", "fsdp", "expert", "sequence", "tensor")
"""All axes of a mesh, the slowest network first."""

BATCH_AXES = ("replica", "data", "fsdp", "expert")
"""Axes that the rows of a batch are cut over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
  """How many devices each way of sharing work gets.

  Their product is the number of devices; at most one may be -1, which takes
  what the others leave.

  >>> MeshSpec(fsdp=4).resolve(8)
  MeshSpec(replica=1, stage=1, data=2, fsdp=4, expert=1, sequence=1, tensor=1)

  Attributes:
    replica: Copies of everything behind a slow network, such as slices of TPUs
      or machines; each sees rows of its own.
    stage: Groups of layers, one after the other: a pipeline.
    data: Copies of everything; each sees rows of its own.
    fsdp: Parts of every parameter and of its optimizer's state; each device
      sees rows of its own and fetches the parameters that it needs.
    expert: Groups of experts of a mixture; each device sees rows of its own.
    sequence: Parts of every row, for long ones.
    tensor: Parts of every matrix product: heads and hidden units.

  Raises:
    ValueError: If a size is neither positive nor -1, or two are -1.
  """

  replica: int = 1
  stage: int = 1
  data: int = -1
  fsdp: int = 1
  expert: int = 1
  sequence: int = 1
  tensor: int = 1

  def __post_init__(self):
    """Checks the sizes."""
    for name, size in self.sizes.items():
      whole = isinstance(size, int) and not isinstance(size, bool)
      if not whole or (size < 1 and size != -1):
        raise ValueError(
          f"mesh.{name} must be at least 1, or -1 for what the others leave, "
          f"got {name}={size!r}."
        )
    if len(self._open) > 1:
      raise ValueError(
        "at most one axis of a mesh may be -1, got -1 for "
        f"{' and '.join(self._open)}; data is -1 unless you set it."
      )

  @property
  def sizes(self) -> dict[str, int]:
    """Size by axis, in the order of `AXES`."""
    return {name: getattr(self, name) for name in AXES}

  @property
  def _open(self) -> list[str]:
    return [name for name, size in self.sizes.items() if size == -1]

  def resolve(self, num_devices: int) -> "MeshSpec":
    """Returns the same mesh with every size known.

    Args:
      num_devices: How many devices there are, at least 1.

    Raises:
      ValueError: If the sizes do not multiply to the number of devices.
    """
    known = math.prod(size for size in self.sizes.values() if size != -1)
    if not self.fits(num_devices):
      told = [f"{k}={n}" for k, n in self.sizes.items() if n not in (1, -1)]
      rule = "must divide" if self._open else "must be"
      raise ValueError(
        f"the sizes of the mesh's axes, multiplied, {rule} the number of "
        f"devices, got {' * '.join(told) or '1'} = {known} for {num_devices} "
        "devices."
      )
    rest = num_devices // known
    return dataclasses.replace(self, **dict.fromkeys(self._open, rest))

  def fits(self, num_devices: int) -> bool:
    """Says whether so many devices can be shared out in this way.

    >>> MeshSpec(fsdp=4).fits(8), MeshSpec(fsdp=4).fits(6)
    (True, False)
    """
    known = math.prod(size for size in self.sizes.values() if size != -1)
    rest = num_devices % known if self._open else num_devices - known
    return num_devices >= known and rest == 0


def make_mesh(
  spec: MeshSpec | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
  """Returns a mesh with all of `AXES`, those of size 1 too.

  Neighbours in the last axes, which talk the most, are neighbours in the
  network. Where devices come in groups behind a slow network (slices of TPUs),
  it is `replica`, and if that is not enough `data`, `stage` or `fsdp` in this
  order, that crosses it.

  >>> dict(make_mesh(MeshSpec(tensor=4), jax.devices()[:8]).shape)["data"]
  2

  Args:
    spec: Sizes; all devices are along "data" if None.
    devices: Which devices; all there are if None.

  Raises:
    ValueError: If the sizes do not fit the devices, no axis can cross the slow
      network, or `spec` is no `MeshSpec`.
  """
  if not (spec is None or isinstance(spec, MeshSpec)):
    raise ValueError(
      "spec must be a MeshSpec or None, such as MeshSpec(fsdp=8), got "
      f"{spec!r}."
    )
  devices = jax.devices() if devices is None else list(devices)
  spec = (spec or MeshSpec()).resolve(len(devices))
  placed = place_devices(spec, devices)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def place_devices(spec: MeshSpec, devices: Sequence[Any]) -> np.ndarray:
  """Returns the devices in an array with the axes of a resolved spec."""
  sizes = list(spec.sizes.values())
  groups = {getattr(device, "slice_index", 0) for device in devices}
  if len(groups) == 1:
    return _place_group(sizes, devices)
  slow = _slow_sizes(spec, len(groups))
  fast = [n // s for n, s in zip(sizes, slow, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(fast, slow, devices)


def _slow_sizes(spec: MeshSpec, groups: int) -> list[int]:
  """Returns how many places of each axis lie in different groups."""
  slow = dict.fromkeys(AXES, 1)
  left = groups
  for name in ("replica", "data", "stage", "fsdp"):
    slow[name] = math.gcd(left, spec.sizes[name])
    left //= slow[name]
  if left > 1:
    raise ValueError(
      f"replica must be a multiple of the {groups} groups of devices that a "
      f"slow network joins, got replica={spec.replica}; only replica, data, "
      "stage and fsdp may cross it."
    )
  return list(slow.values())


def _place_group(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
  try:
    return mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  except (AssertionError, NotImplementedError, ValueError):
    # A shape that the physical network knows nothing of: in order, then.
    return np.asarray(devices, dtype=object).reshape(sizes)
