"""Named sets of chips, such as "v5p:8x8x16", and where in them a chip lies."""

import dataclasses
import difflib
import itertools
import math
import re
import types
from collections.abc import Iterable, Sequence
from typing import Any

from deepseek_jax.parallel.chips import CHIPS, Chip

_NAME = re.compile(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?")
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
_LARGEST = {"v4": 4096, "v5p": 8960}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips that a fast network joins, and slices of them that a slow one does.

  Attributes:
    chip: what they are.
    dims: of the torus; of one slice.
    slices: how many of these there are.
  """

  chip: Chip
  dims: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """What `parse` reads."""
    more = f"*{self.slices}" if self.slices > 1 else ""
    return f"{self.chip.name}:{'x'.join(map(str, self.dims))}{more}"

  @property
  def num_chips(self) -> int:
    """Chips of all slices."""
    return math.prod(self.dims) * self.slices

  @property
  def num_devices(self) -> int:
    """Devices that they are to JAX."""
    return self.num_chips * self.chip.cores

  def is_ring(self, dim: int) -> bool:
    """Whether the chips along a dimension are a ring, not a line."""
    return self.dims[dim] % self.chip.ring == 0

  def places(self) -> list[Any]:
    """Returns stand-ins for its devices, which say where they lie.

    They are enough for `make_mesh` to order them as it would the devices.
    """
    dims = (*self.dims, 1, 1)[:3]
    # The first coordinate counts fastest, as the devices' own numbers do.
    coords = [c[::-1] for c in itertools.product(*map(range, dims[::-1]))]
    found = itertools.product(
      range(self.slices), coords, range(self.chip.cores)
    )
    return [
      types.SimpleNamespace(
        id=number,
        platform="tpu",
        device_kind=self.chip.kind,
        coords=place,
        core_on_chip=core,
        slice_index=index,
        process_index=number // 4,
      )
      for number, (index, place, core) in enumerate(found)
    ]


def parse(name: str) -> Topology:
  """Returns the chips that a name stands for.

  >>> parse("v5p:8x8x16").num_chips
  1024
  >>> parse("v5e:16x16*4").slices
  4

  Args:
    name: of a chip, ":", and the sizes of its torus; then "*" and how many such
      slices a slow network joins, if there are several.

  Raises:
    ValueError: if there is no such topology; the nearest is named.
  """
  match = _NAME.fullmatch(name)
  if match is None:
    raise ValueError(
      "topology must be a chip and sizes, such as 'v5p:8x8x16' or "
      f"'v5e:16x16*4' for four slices, got {name!r}."
    )
  if match[1] not in CHIPS:
    near = difflib.get_close_matches(match[1], CHIPS, 1, 0.0)[0]
    raise ValueError(
      f"topology must be of one of the chips {', '.join(CHIPS)}, got {name!r}; "
      f"the nearest is {near!r}."
    )
  chip = CHIPS[match[1]]
  dims = tuple(map(int, match[2].split("x")))
  slices = int(match[3] or 1)
  known = shapes(chip)
  if dims not in known or slices < 1:
    near = _nearest(dims, known)
    raise ValueError(
      f"there is no topology {name!r}; the nearest is "
      f"'{chip.name}:{'x'.join(map(str, near))}' with {math.prod(near):,} "
      "chips."
    )
  return Topology(chip, dims, slices)


def shapes(chip: Chip) -> list[tuple[int, ...]]:
  """Returns the sizes of a torus that a chip comes in.

  >>> shapes(CHIPS["v5e"])[0]
  (2, 2)
  """
  if chip.dims == 2:
    return [tuple(map(int, shape.split("x"))) for shape in _FLAT]
  small = [tuple(map(int, shape.split("x"))) for shape in _SMALL]
  most = _LARGEST[chip.name]
  sides = range(4, most // 16 + 1, 4)
  large = itertools.takewhile(lambda x: x**3 <= most, sides)
  cubes = [
    (a, b, c)
    for a in large
    for b in itertools.takewhile(lambda b, a=a: a * b * b <= most, sides)
    if b >= a
    for c in sides
    if b <= c <= most // (a * b)
  ]
  return small + [dims for dims in cubes if _is_cubic(dims)]


def scales(chip: Chip, fewest: int, most: int) -> list[Topology]:
  """Returns for each power of two from `fewest` to `most` a topology.

  The most cubic one of so many chips; more than the largest torus are slices.

  >>> [t.name for t in scales(CHIPS["v5p"], 8, 32)]
  ['v5p:2x2x2', 'v5p:2x2x4', 'v5p:2x4x4']

  Args:
    chip: of which.
    fewest: chips of the first, a power of two.
    most: chips of the last.
  """
  found = []
  count = fewest
  while count <= most:
    found.append(_of_size(chip, count))
    count *= 2
  return found


def _of_size(chip: Chip, count: int) -> Topology:
  known = shapes(chip)
  slices = 1
  while True:
    fitting = [x for x in known if math.prod(x) * slices == count]
    if fitting:
      return Topology(chip, min(fitting, key=sum), slices)
    slices *= 2
    if slices > count:
      raise ValueError(
        f"fewest must be a number of chips that {chip.name} comes in, got "
        f"{count}."
      )


def _is_cubic(dims: Sequence[int]) -> bool:
  # Longer ones exist in a pod, but nobody lends them.
  return dims[-1] <= 4 * dims[0]


def _nearest(
  dims: tuple[int, ...], known: Iterable[tuple[int, ...]]
) -> tuple[int, ...]:
  """Returns the sizes of the most alike number of chips, then of sides."""
  count = max(1, math.prod(dims))

  def distance(other: tuple[int, ...]) -> tuple[float, int]:
    size = abs(math.log(math.prod(other) / count))
    pairs = itertools.zip_longest(sorted(dims), sorted(other), fillvalue=1)
    return size, sum(abs(a - b) for a, b in pairs)

  return min(known, key=distance)
