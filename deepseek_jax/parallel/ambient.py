"""The mesh that is being traced for, as modules see it.

A step is traced under `jax.sharding.use_abstract_mesh(mesh.abstract_mesh)`, or
called under `jax.set_mesh(mesh)`; `with mesh:` makes no mesh current.
Modules never hold a mesh: they ask here for the sizes of its axes, and get 1
where there is none, so that the same code runs on one device.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from deepseek_jax.core.typing import PyTree
from deepseek_jax.parallel.mesh import BATCH_AXES

Axes = str | Sequence[str] | None
"""What one dimension is cut over."""


def axis_size(*names: str) -> int:
  """Returns how many parts these axes of the mesh make, 1 where there is none.

  Axes that the surrounding `jax.shard_map` has already taken count as 1.

  >>> axis_size("tensor")
  1
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = _free(mesh)
  return math.prod(mesh.shape[name] for name in names if name in free)


def batch_axes() -> tuple[str, ...]:
  """Returns the axes of more than one device that rows are cut over."""
  return tuple(name for name in BATCH_AXES if axis_size(name) > 1)


def fitting_axes(axes: Axes, size: int) -> tuple[str, ...]:
  """Returns those of the axes that have more than one device, if they fit.

  >>> fitting_axes(("data", "fsdp"), 8)
  ()

  Args:
    axes: What a dimension is to be cut over.
    size: Of the dimension; if the axes do not divide it, none fits.
  """
  if axes is None:
    return ()
  axes = (axes,) if isinstance(axes, str) else axes
  axes = tuple(name for name in axes if axis_size(name) > 1)
  return axes if size % axis_size(*axes) == 0 else ()


def free_axes() -> tuple[str, ...]:
  """Returns the axes that nobody has taken yet; none on a single device.

  Code that the compiler cannot cut, such as a kernel, takes all of them with
  `jax.shard_map`: a TPU's is refused while any is left, be it of one device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = _free(mesh)
  several = math.prod(mesh.shape.values()) > 1
  return tuple(name for name in mesh.axis_names if several and name in free)


def constrain(x: Array, *dims: Axes) -> Array:
  """Returns `x`, told to lie over the mesh in this way.

  An axis that the mesh has not, or that does not divide its dimension, leaves
  that dimension whole: this says what is wanted, and errors are for rules. What
  is wanted whole is gathered, such as a parameter that is kept in parts.

  >>> constrain(jax.numpy.ones((4, 2)), "data", None).shape
  (4, 2)

  Args:
    x: Any array.
    *dims: For each dimension the axis or axes to cut it over; those left out
      are whole.
  """
  if not any(axis_size(name) > 1 for name in free_axes()):
    return x
  fitting = [fitting_axes(axes, size) for axes, size in zip(dims, x.shape)]  # noqa: B905
  spec = PartitionSpec(*(axes or None for axes in fitting))
  return jax.lax.with_sharding_constraint(x, spec)


def require_current_mesh(axis: str, **trees: PyTree) -> None:
  """Refuses arrays that lie on a mesh while none is current.

  Nobody asks where arrays lie: what should share the work over an axis would
  silently do all of it on every device.

  Args:
    axis: Only meshes with several devices along it matter.
    **trees: Arrays, traced or not.

  Raises:
    ValueError: Naming the argument.
  """
  if not jax.sharding.get_abstract_mesh().empty:
    return
  for name, tree in trees.items():
    for leaf in jax.tree.leaves(tree):
      # Types know their mesh while a function is traced, too.
      mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
      size = 1 if mesh is None else dict(mesh.shape).get(axis, 1)
      if size > 1:
        raise ValueError(
          f"{name} must not lie on a mesh while none is current, got a mesh "
          f"with {axis}={size}: call it within jax.set_mesh(mesh)."
        )


def _free(mesh: jax.sharding.AbstractMesh) -> set[str]:
  """Returns the axes that the compiler still decides over."""
  kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
  return {name for name, kind in kinds if kind == AxisType.Auto}
