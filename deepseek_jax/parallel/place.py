"""Arrays onto a mesh: what a model keeps, and what a step is given."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core import tree as tree_lib
from deepseek_jax.core.typing import PyTree
from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.parallel.rules import Rules, shardings


def make_sharded(
  build: Callable[[], PyTree], rules: Rules, mesh: Mesh
) -> PyTree:
  """Returns what `build` returns, no device ever holding the whole of it.

  Use it for arrays that are too large for one device. The values are those of
  `jax.jit(build)()`, random ones too.

  >>> from deepseek_jax.parallel import DEFAULT, MeshSpec, make_mesh
  >>> zeros = lambda: {"kernel": jax.numpy.zeros((512, 256))}
  >>> made = make_sharded(zeros, DEFAULT, make_mesh(MeshSpec(data=1, fsdp=-1)))
  >>> made["kernel"].sharding.shard_shape((512, 256))
  (64, 256)

  Args:
    build: A function of no arguments that can be jitted, of a tree of arrays.
    rules: As in `specs`.
    mesh: What to place them on.

  Raises:
    ValueError: As `specs`; nothing is allocated then.
  """
  wanted = shardings(jax.eval_shape(build), rules, mesh)
  return jax.jit(build, out_shardings=wanted)()


def put_batch(
  batch: Mapping[str, Any], mesh: Mesh, *, tokens: Collection[str] = ()
) -> dict[str, jax.Array]:
  """Returns global arrays made of the rows that every process holds.

  Rows are cut over `BATCH_AXES`. Each process gives those of `local_rows`, and
  no row leaves it.

  >>> from deepseek_jax.parallel import make_mesh
  >>> x = np.zeros((16, 3), np.float32)
  >>> put_batch({"x": x}, make_mesh())["x"].sharding.shard_shape((16, 3))
  (2, 3)

  Args:
    batch: This process's rows by name.
    mesh: What to place them on.
    tokens: Names of arrays [B, T, ...] that are cut over "sequence" too.

  Raises:
    ValueError: If rows or tokens do not divide over their axes.
  """
  rows = _present(BATCH_AXES, mesh)
  return {
    name: _put(
      name, np.asarray(x), mesh, (rows, *_token_axes(name, mesh, tokens))
    )
    for name, x in batch.items()
  }


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
  """Returns the numbers of the rows of a global batch that this process needs.

  Processes that hold other parts of the same rows, as with "tensor" across
  machines, get the same numbers.

  >>> from deepseek_jax.parallel import make_mesh
  >>> local_rows(8, make_mesh())
  array([0, 1, 2, 3, 4, 5, 6, 7])

  Args:
    rows: Number of rows of the global batch.
    mesh: What they are placed on.

  Raises:
    ValueError: If they do not divide over the mesh.
  """
  sharding = _row_sharding(mesh)
  _check_divides("rows", rows, _present(BATCH_AXES, mesh), mesh)
  places = sharding.addressable_devices_indices_map((rows,)).values()
  found = [np.arange(rows)[place] for place in places if place is not None]
  return np.unique(np.concatenate(found))


def device_bytes(tree: PyTree) -> int:
  """Returns the bytes that one device holds of a tree.

  Nothing is allocated for it: shapes with shardings do.

  >>> from deepseek_jax.parallel import make_mesh
  >>> half = NamedSharding(make_mesh(), PartitionSpec("data"))
  >>> device_bytes(jax.ShapeDtypeStruct((16, 4), np.float32, sharding=half))
  32

  Args:
    tree: Arrays or `jax.ShapeDtypeStruct`s; those without a sharding count
      whole.
  """
  return sum(map(_leaf_bytes, jax.tree.leaves(tree)))


def describe(tree: PyTree) -> str:
  """Returns a table of what lies where, and what of it one device holds.

  >>> from deepseek_jax.parallel import make_mesh
  >>> half = NamedSharding(make_mesh(), PartitionSpec("data"))
  >>> x = jax.ShapeDtypeStruct((16, 4), np.float32, sharding=half)
  >>> print(describe({"kernel": x}))
  path    shape  type     cut over  bytes a device
  kernel  16x4   float32  data, -               32
  total                                         32

  Args:
    tree: As in `device_bytes`.
  """
  paths = tree_lib.leaf_paths(tree)
  rows = [("path", "shape", "type", "cut over", "bytes a device")]
  for path, leaf in zip(paths, jax.tree.leaves(tree), strict=True):
    rows.append(
      (
        path,
        "x".join(map(str, leaf.shape)) or "-",
        str(leaf.dtype),
        _cut(leaf),
        f"{_leaf_bytes(leaf):,}",
      )
    )
  rows.append(("total", "", "", "", f"{device_bytes(tree):,}"))
  *left, last = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(
      [
        *(f"{x:{n}}" for x, n in zip(row, left, strict=False)),
        f"{row[-1]:>{last}}",
      ]
    )
    for row in rows
  )


def _cut(leaf: Any) -> str:
  """Returns the axes of every dimension, "-" for a whole one."""
  spec = getattr(getattr(leaf, "sharding", None), "spec", PartitionSpec())
  names = [
    name if isinstance(name, str) else "+".join(name or ()) or "-"
    for name in spec
  ]
  if not names:
    return "-"
  return ", ".join([*names, *["-"] * (len(leaf.shape) - len(names))])


def _leaf_bytes(leaf: Any) -> int:
  shape = leaf.shape
  if getattr(leaf, "sharding", None) is not None:
    shape = leaf.sharding.shard_shape(shape)
  return math.prod(shape) * leaf.dtype.itemsize


def _present(names: tuple[str, ...], mesh: Mesh) -> tuple[str, ...]:
  return tuple(name for name in names if mesh.shape.get(name, 1) > 1)


def _row_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(_present(BATCH_AXES, mesh)))


def _token_axes(
  name: str, mesh: Mesh, tokens: Collection[str]
) -> tuple[tuple[str, ...], ...]:
  axes = _present(("sequence",), mesh)
  return (axes,) if name in tokens and axes else ()


def _put(
  name: str, x: np.ndarray, mesh: Mesh, dims: tuple[tuple[str, ...], ...]
) -> jax.Array:
  if not x.ndim:
    raise ValueError(f"batch[{name!r}] must have rows, got a number.")
  spec = PartitionSpec(*(names or None for names in dims))
  sharding = NamedSharding(mesh, spec)
  if x.ndim < len(dims):
    raise ValueError(f"batch[{name!r}] must be [B, T, ...], got {x.shape=}.")
  # All processes together; each has its part of the rows, and whole tokens.
  shape = (_global_rows(name, len(x), mesh), *x.shape[1:])
  for i, names in enumerate(dims):
    _check_divides(f"batch[{name!r}].shape[{i}]", shape[i], names, mesh)
  return jax.make_array_from_process_local_data(sharding, x, shape)


def _global_rows(name: str, rows: int, mesh: Mesh) -> int:
  parts = math.prod(mesh.shape[axis] for axis in _present(BATCH_AXES, mesh))
  mine = len(local_rows(parts, mesh))
  if rows % mine:
    raise ValueError(
      f"batch[{name!r}] must have a multiple of {mine} rows, one for each part "
      f"of a batch that this process's devices hold, got {rows}."
    )
  return rows // mine * parts


def _check_divides(
  what: str, size: int, names: tuple[str, ...], mesh: Mesh
) -> None:
  parts = math.prod(mesh.shape[name] for name in names)
  if size % parts:
    told = " * ".join(f"{name}={mesh.shape[name]}" for name in names)
    raise ValueError(
      f"{what} must be divisible by {parts}, the {told} of the mesh, got "
      f"{size}."
    )
