"""Which axes of a mesh can cut which dimensions of an array."""

import math
from collections.abc import Sequence

from jax.sharding import PartitionSpec

FSDP_MIN_SIZE = 2**16
"""Elements below which an array need not be cut: 256 KiB in float32."""

Dims = list[tuple[str, ...]]
"""For every dimension the axes that cut it."""


def as_dims(spec: PartitionSpec) -> Dims:
  """Returns the axes of every dimension that a spec names."""
  return [_names(entry) for entry in spec]


def as_spec(dims: Dims, sizes: dict[str, int]) -> PartitionSpec:
  """Returns the shortest spec that cuts in this way.

  JAX tells specs apart that mean the same, and compiles a step again for them:
  axes of one device and whole dimensions at the end are left out.
  """
  entries: list[str | tuple[str, ...] | None] = []
  for names in dims:
    names = tuple(name for name in names if sizes[name] > 1)
    entries.append(names[0] if len(names) == 1 else names or None)
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def exact(
  dims: Dims, shape: tuple[int, ...], sizes: dict[str, int]
) -> tuple[Dims, list[str]]:
  """Returns the axes, and which dimensions they do not divide."""
  problems = []
  for i, (names, size) in enumerate(zip(dims, shape, strict=True)):
    if size % parts(names, sizes):
      problems.append(_indivisible(i, size, names, sizes))
  return dims, problems


def preferred(
  dims: Dims, shape: tuple[int, ...], sizes: dict[str, int]
) -> tuple[Dims, list[str]]:
  """Returns the axes that fit, and what is wrong if the others must."""
  small = math.prod(shape) < FSDP_MIN_SIZE
  fit: Dims = []
  problems, moved = [], []
  for i, (names, size) in enumerate(zip(dims, shape, strict=True)):
    kept: tuple[str, ...] = ()
    for name in names:
      if size % parts((*kept, name), sizes) == 0:
        kept = (*kept, name)
      elif name == "fsdp":
        moved.append(name)
      elif not small:
        problems.append(_indivisible(i, size, (*kept, name), sizes))
    fit.append(kept)
  return largest(fit, shape, moved, sizes), problems


def largest(
  dims: Dims,
  shape: tuple[int, ...],
  axes: Sequence[str],
  sizes: dict[str, int],
) -> Dims:
  """Returns `dims` with each axis where the parts are longest, if large."""
  dims = list(dims)
  if math.prod(shape) < FSDP_MIN_SIZE:
    return dims
  for name in axes:
    length = lambda i: shape[i] // parts(dims[i], sizes)
    fits = lambda i: shape[i] % parts((*dims[i], name), sizes) == 0  # noqa: B023
    # The last of equals: it is contiguous in memory.
    places = [i for i in reversed(range(len(shape))) if fits(i)]
    if places:
      best = max(places, key=length)
      dims[best] = (*dims[best], name)
  return dims


def parts(names: Sequence[str], sizes: dict[str, int]) -> int:
  """Returns in how many parts these axes cut a dimension."""
  return math.prod(sizes[name] for name in names)


def _names(entry: object) -> tuple[str, ...]:
  if entry is None:
    return ()
  return tuple(entry) if isinstance(entry, tuple | list) else (entry,)  # pyrefly: ignore


def _indivisible(
  i: int, size: int, names: tuple[str, ...], sizes: dict[str, int]
) -> str:
  cut = parts(names, sizes)
  told = " * ".join(f"{name}={sizes[name]}" for name in names)
  common = math.gcd(size, cut)
  return (
    f"dimension {i} of size {size} does not divide over {told}; make it a "
    f"multiple of {cut}, cut it in {common} instead, or leave it whole by a "
    "rule of your own."
  )
