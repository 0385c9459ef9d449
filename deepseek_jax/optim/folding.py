"""Every parameter as a matrix, or a stack of matrices.

Whitening is about matrices; kernels of convolutions and attention have more
axes. Folding them in the right place is what makes whitening work on them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType
from jaxtyping import Array

from deepseek_jax.core import require_in
from deepseek_jax.core.typing import PyTree


class MatrixShape(NamedTuple):
  """A parameter seen as `stack` matrices of `rows` times `columns`."""

  stack: int
  rows: int
  columns: int


def matrix_shape(shape: tuple[int, ...], stacked: int = 0) -> MatrixShape:
  """Returns the squarest matrix that a shape folds into.

  The axes are cut into two groups, rows and columns, where the shorter of both
  sides becomes longest: there whitening has most to do. This gives
  height·width·in by out for a convolution, features by heads·size for a query,
  heads·size by features for the output of attention. A tie goes to the later
  cut.

  Args:
    shape: The shape of a parameter.
    stacked: How many leading axes count matrices of their own, as in layers
      that a scan runs over, or experts; 0 to all.

  Returns:
    The sizes. Without two axes to cut between, there is a single column.

  Raises:
    ValueError: If the shape has fewer axes than are stacked.

  >>> matrix_shape((3, 3, 16, 32))
  MatrixShape(stack=1, rows=144, columns=32)
  >>> matrix_shape((64, 4, 16))
  MatrixShape(stack=1, rows=64, columns=64)
  >>> matrix_shape((12, 64, 256), stacked=1)
  MatrixShape(stack=12, rows=64, columns=256)
  """
  require_in(f"[0, {len(shape)}]", stacked=stacked)
  axes = shape[stacked:]
  sides = [
    (math.prod(axes[:cut]), math.prod(axes[cut:]))
    for cut in range(len(axes) - 1, 0, -1)
  ]
  alone = (math.prod(axes), 1)
  rows, columns = max(sides, key=min, default=alone)
  return MatrixShape(math.prod(shape[:stacked]), rows, columns)


def without_axis_types(
  function: Callable[..., Any], like: PyTree, *arguments: PyTree
) -> Any:
  """Calls a function whose arrays are sharded as XLA sees fit.

  Under a mesh with explicit axis types every matrix product would have to say
  how its result is sharded. Within here none has to, and the results get the
  shardings of `like`.

  Args:
    function: Takes the arguments.
    like: Arrays of the types that the function returns.
    *arguments: Any pytrees of arrays.

  Returns:
    What the function returns.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if AxisType.Explicit not in mesh.axis_types:
    return function(*arguments)
  shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, like)
  free = jax.sharding.auto_axes(function, out_sharding=shardings)
  return free(*arguments)


def fold(leaf: Array, shape: MatrixShape) -> Array:
  """Returns a parameter as a stack of matrices [stack, rows, columns]."""
  return leaf.reshape(shape)
