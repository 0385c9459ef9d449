"""Bytes on the wire, read from a compiled program.

What a device sends, if every collective goes around a ring of its n devices:

* all-reduce: 2 (n-1)/n of its array: a reduce-scatter, then an all-gather;
* all-gather: (n-1)/n of what it gives;
* reduce-scatter: (n-1)/n of what it takes;
* all-to-all: (n-1)/n of its array, each part to another device;
* collective-permute: all of its array, if it sends at all, for every receiver;
* collective-broadcast: all of its array.

No algorithm sends less in an all-reduce, gather or scatter (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms", 2009).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from deepseek_jax.parallel import hlo, hlo_loops
from deepseek_jax.parallel.replica_groups import (
  crossed_axes,
  replica_groups,
  source_target_pairs,
)

_SLOW = "replica"
COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
"""Kinds of collectives, as XLA names them."""


@dataclasses.dataclass(frozen=True)
class Collective:
  """Where bytes go.

  Attributes:
    kind: one of `COLLECTIVES`.
    axes: of the mesh, along which its devices lie; empty without a mesh.
    group: how many devices take part together; of a permutation, 2.
    shift: of a permutation along one axis, how many places most of it goes,
      negative for backwards; else 0.
  """

  kind: str
  axes: tuple[str, ...]
  group: int
  shift: int = 0

  @property
  def place(self) -> str:
    """The axes as one word; the size of the group without a mesh."""
    return "+".join(self.axes) or f"{self.group} devices"


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What one run of a program sends.

  Attributes:
    sent: bytes that a device sends, by collective.
    calls: how often each collective is started.
    open_loops: loops that depend on data; each is counted as one trip.
  """

  sent: Mapping[Collective, float]
  calls: Mapping[Collective, int]
  open_loops: tuple[str, ...]


def wire_bytes(
  compiled: Any,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
) -> dict[str, dict[str, float]]:
  """Returns the bytes a device sends, by collective and axes of the mesh.

  Read from the optimized program, so that it is what the compiler made of the
  shardings: loops count as often as they run, of a conditional the branch that
  sends most. Where not all devices send the same, it is the one that sends
  most. A CPU sums bfloat16 as float32 and has no reduce-scatter of its own
  making: there it is an all-reduce.

  >>> import jax
  >>> from jax.sharding import NamedSharding, PartitionSpec
  >>> from deepseek_jax.parallel import make_mesh
  >>> mesh = make_mesh(devices=jax.devices()[:8])
  >>> rows = NamedSharding(mesh, PartitionSpec("data"))
  >>> x = jax.ShapeDtypeStruct((8, 4), "float32", sharding=rows)
  >>> wire_bytes(jax.jit(lambda x: x.sum(0)).lower(x).compile(), mesh)
  {'all-reduce': {'data': 28.0}}

  Args:
    compiled: what `jax.jit(f).lower(...).compile()` gives, or its text.
    mesh: the one it was compiled for; if None, places are called by the number
      of their devices, as in "8 devices".

  Raises:
    ValueError: if `compiled` is no program, or not of so many devices.

  References:
    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
    workstations", 2009, https://doi.org/10.1016/j.jpdc.2008.09.002
  """
  found: dict[str, dict[str, float]] = {}
  for collective, sent in traffic(compiled, mesh).sent.items():
    places = found.setdefault(collective.kind, {})
    places[collective.place] = places.get(collective.place, 0.0) + sent
  return found


def traffic(
  compiled: Any,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
) -> Traffic:
  """Returns what `wire_bytes` does, with counts and groups.

  Args:
    compiled: as there, or a program of `hlo.parse`.
    mesh: as there.

  Raises:
    ValueError: as there.
  """
  is_program = isinstance(compiled, hlo.Program)
  program = compiled if is_program else hlo.parse(compiled)
  sizes = {} if mesh is None else _own_sizes(mesh, program)

  def leaf(one, site):
    found = _sent(one, site, program.num_devices, sizes)
    if found is None or _is_seen(one, site):
      return {}
    collective, sent = found
    return {(collective, "sent"): sent, (collective, "calls"): 1}

  total, open_loops = hlo_loops.count(program, leaf)
  sent = {one: float(n) for (one, what), n in total.items() if what == "sent"}
  calls = {one: int(total[one, "calls"]) for one in sent}
  return Traffic(sent, calls, open_loops)


def _own_sizes(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, program: hlo.Program
) -> dict[str, int]:
  """Returns the sizes of the mesh that a program knows.

  The TPU compiler writes a program for one of several slices.
  """
  sizes = dict(mesh.shape)
  slices, rest = divmod(mesh.size, program.num_devices)
  if rest or slices not in (1, sizes.get(_SLOW, 1)):
    raise ValueError(
      "mesh must be the one that the program was compiled for, and slices lie "
      f"along {_SLOW!r} alone, got {mesh.size} devices for a program of "
      f"{program.num_devices}."
    )
  return sizes if slices == 1 else sizes | {_SLOW: 1}


def _sent(
  one: hlo.Instruction,
  site: hlo_loops.Site,
  num_devices: int,
  sizes: Mapping[str, int],
) -> tuple[Collective, float] | None:
  """Returns what an instruction sends, None if it sends nothing."""
  kind = one.opcode.removesuffix("-start")
  size = sum(shape.bytes for shape in site.computation.operand_shapes(one))
  if kind == "send":
    return _sent_to_slices(one, size, sizes)
  if kind not in COLLECTIVES:
    return None
  if kind == "collective-permute":
    return _permuted(source_target_pairs(one.tail), size, sizes)
  groups = replica_groups(one.tail, num_devices)
  n = max(map(len, groups))
  if n == 1:
    return None
  if kind == "all-reduce" and site.fused and _is_scatter(one, site):
    kind = "reduce-scatter"
  return Collective(kind, crossed_axes(groups, sizes), n), _ring(kind, n, size)


def _sent_to_slices(
  one: hlo.Instruction, size: int, sizes: Mapping[str, int]
) -> tuple[Collective, float] | None:
  """Returns what goes through the host to other slices of TPUs."""
  kind = re.search(r'_megascale_transfer_type="(\w+)"', one.tail)
  slices = re.search(r'_megascale_target="\{([^}]*)\}', one.tail)
  if kind is None or slices is None:
    return None
  name = kind[1].lower().replace("_", "-")
  n = len(slices[1].split(","))
  axes = (_SLOW,) if sizes else ()
  return Collective(name, axes, n), _ring(name, n, size)


def _permuted(
  pairs: np.ndarray, size: int, sizes: Mapping[str, int]
) -> tuple[Collective, float] | None:
  """Returns what the busiest device sends, given who sends to whom."""
  pairs = pairs[pairs[:, 0] != pairs[:, 1]]
  if not len(pairs):
    return None
  most = np.unique(pairs[:, 0], return_counts=True)[1].max()
  axes = crossed_axes(list(pairs), sizes)
  shift = 0
  if len(axes) == 1:
    places = np.unravel_index(pairs, tuple(sizes.values()))
    along, length = places[list(sizes).index(axes[0])], sizes[axes[0]]
    shifts, counts = np.unique(
      (along[:, 1] - along[:, 0]) % length, return_counts=True
    )
    shift = int(shifts[counts.argmax()])
    shift -= length if shift > length // 2 else 0
  permutation = Collective("collective-permute", axes, 2, shift)
  return permutation, float(size * most)


def _ring(kind: str, n: int, taken: int) -> float:
  """Returns bytes a device of `n` sends, given how many it takes."""
  part = (n - 1) / n
  if kind == "all-reduce":
    return 2 * part * taken
  if kind == "all-gather":
    return part * taken * n
  if kind == "collective-broadcast":
    return float(taken)
  return part * taken


def _is_seen(one: hlo.Instruction, site: hlo_loops.Site) -> bool:
  """Whether another fusion beside this one has counted the same collective.

  The TPU compiler spreads one over many fusions, to run it while they compute:
  a start, some steps and an end, all of one channel.
  """
  channel = re.search(r"\bchannel_id=(\d+)", one.tail)
  if not site.fused or channel is None:
    return False
  seen = channel[1] in site.notes
  site.notes.add(channel[1])
  return seen


def _is_scatter(one: hlo.Instruction, site: hlo_loops.Site) -> bool:
  """Whether of a fused sum only a slice is used.

  That is how the TPU compiler writes a reduce-scatter.
  """
  users = site.computation.users.get(one.name, [])
  return bool(users) and all(user.opcode == "dynamic-slice" for user in users)
