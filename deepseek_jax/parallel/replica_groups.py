"""Who talks to whom: groups of devices as XLA writes them, and their axes.

Devices are numbered in the order of the mesh's `devices.flat`, whatever their
own numbers are.
"""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

_EXPLICIT = r"\{(?:\{[\d,\s]*\},?\s*)*\}"
_IOTA = r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
_MESH = r"mesh\[[^\]]*\](?:, device_ids=\(.*?\)+)? \{[^}]*\}"
_GROUPS = re.compile(rf"\breplica_groups=({_EXPLICIT}|{_IOTA}|{_MESH})")
_PAIRS = re.compile(rf"\bsource_target_pairs=({_EXPLICIT})")


def replica_groups(tail: str, num_devices: int) -> list[np.ndarray]:
  """Returns the groups of devices that an instruction's attributes name.

  Four notations are known: `{{0,1},{2,3}}`; `[2,2]<=[4]` and
  `[2,2]<=[2,2]T(1,0)`, which is `arange(4).reshape(2, 2).T.reshape(2, 2)`;
  `mesh['a'=2,'b'=2] {'a'}`, the devices that differ along "a" only; and `{}`,
  which is all.

  >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
  [array([0, 2]), array([1, 3])]
  >>> replica_groups("replica_groups=mesh['a'=2,'b'=2] {'b'}", 4)
  [array([0, 1]), array([2, 3])]

  Args:
    tail: attributes, as text.
    num_devices: how many there are.

  Raises:
    ValueError: if there are groups in a notation that is not known.
  """
  match = _GROUPS.search(tail)
  if match is None:
    if "replica_groups=" in tail:
      begin = tail.index("replica_groups=")
      raise ValueError(
        "replica_groups must be a list, an iota or a mesh, got "
        f"{tail[begin : begin + 80]!r}."
      )
    return [np.arange(num_devices)]
  text = match[1]
  if text.startswith("mesh"):
    return list(_mesh_groups(text, num_devices))
  if text.startswith("["):
    return list(_iota(text))
  groups = [np.array(group) for group in _lists(text) if group]
  return groups or [np.arange(num_devices)]


def source_target_pairs(tail: str) -> np.ndarray:
  """Returns who sends to whom in a permutation, [pairs, 2].

  >>> source_target_pairs("source_target_pairs={{0,1},{1,0}}").tolist()
  [[0, 1], [1, 0]]
  """
  match = _PAIRS.search(tail)
  pairs = _lists(match[1]) if match else []
  return np.array(pairs, int).reshape(-1, 2)


def crossed_axes(
  groups: list[np.ndarray], sizes: Mapping[str, int]
) -> tuple[str, ...]:
  """Returns the axes of a mesh along which members of a group differ.

  For groups that a set of axes forms it is that set; for parts of them, as two
  neighbours on an axis of eight, it is the axes that they lie on.

  >>> crossed_axes([np.array([0, 2]), np.array([1, 3])], {"a": 2, "b": 2})
  ('a',)

  Args:
    groups: devices that talk to each other.
    sizes: of the mesh's axes, in order; without any, none is crossed.
  """
  if not sizes:
    return ()
  shape = tuple(sizes.values())
  crossed = np.zeros(len(shape), bool)
  for group in groups:
    places = np.stack(np.unravel_index(group, shape))
    crossed |= (places != places[:, :1]).any(1)
  return tuple(name for name, yes in zip(sizes, crossed, strict=True) if yes)


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
  return [_numbers(inner) for inner in re.findall(r"\{([\d,\s]*)\}", text)]


def _iota(text: str) -> np.ndarray:
  """Returns `[shape]<=[dims]T(order)` as an array."""
  shape, _, source = text.partition("<=")
  dims, _, order = source.partition("T")
  axes = _numbers(order) or None
  dims = _numbers(dims)
  iota = np.arange(math.prod(dims)).reshape(dims).transpose(axes)
  return iota.reshape(_numbers(shape))


def _mesh_groups(text: str, num_devices: int) -> np.ndarray:
  """Returns groups of `mesh['a'=2,'b'=4], device_ids=(...) {'a','b':(1)2}`.

  `'b':(1)2` is the part of size 2 of "b" that has 1 before it: "b" is then cut
  in [1, 2, 2].
  """
  begin, end = text.index("["), text.index("]")
  pairs = [pair.rsplit("=", 1) for pair in text[begin + 1 : end].split(",")]
  sizes = {name.strip().strip("'\""): int(size) for name, size in pairs}
  ids = re.search(r"device_ids=\((.*)\) \{", text)
  order = _device_ids(ids[1]) if ids else np.arange(num_devices)
  asked = re.findall(
    r"['\"]?([\w.\-]+)['\"]?(?::\((\d+)\)(\d+))?", text[text.rindex("{") :]
  )
  dims, grouped = _cut(sizes, asked)
  ids = order.reshape(dims)
  rest = [axis for axis in range(len(dims)) if axis not in grouped]
  together = math.prod(dims[axis] for axis in grouped)
  return ids.transpose(*rest, *grouped).reshape(-1, together)


def _cut(
  sizes: Mapping[str, int], asked: list[tuple[str, str, str]]
) -> tuple[list[int], list[int]]:
  """Returns the mesh's dimensions, cut as asked, and which are grouped."""
  cuts = {name: {1, size} for name, size in sizes.items()}
  for name, before, size in asked:
    if before:
      cuts[name] |= {int(before), int(before) * int(size)}
  dims, at = [], {}
  for name, size in sizes.items():
    edges = sorted(cuts[name]) if size > 1 else [1, 1]
    for low, high in itertools.pairwise(edges):
      at[name, low] = len(dims)
      dims.append(high // low)
  grouped = []
  for name, before, size in asked:
    low, high = (
      (int(before), int(before) * int(size)) if before else (1, sizes[name])
    )
    inner = [k for k in at if k[0] == name and low <= k[1] < max(high, 2)]
    grouped += [at[key] for key in inner]
  return dims, grouped


def _device_ids(text: str) -> np.ndarray:
  """Returns `[2,4]T(1,0)` or `3,1,2,0` as one row of devices."""
  if text.startswith("["):
    dims = text.partition("T")[0]
    return _iota(f"[{math.prod(_numbers(dims))}]<={text}")
  return np.array(_numbers(text))
