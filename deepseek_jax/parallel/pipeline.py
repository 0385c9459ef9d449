"""Layers on one group of devices after the other: a pipeline."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from deepseek_jax.core.arguments import require_one_of, require_static
from deepseek_jax.core.typing import PyTree
from deepseek_jax.parallel.ambient import axis_size, require_current_mesh
from deepseek_jax.parallel.microbatches import (
  check_rows,
  choose_microbatches,
  cut_batch,
  cut_rows,
  join_rows,
)
from deepseek_jax.parallel.schedule import Schedule
from deepseek_jax.parallel.stage import run_stage

Layer = Callable[..., tuple[PyTree, PyTree]]
"""(parameters, state, x, *shared) -> (x, state), of one layer."""


def storage_order(num_layers: int, repeats: int = 1) -> list[int]:
  """Returns which layer lies at each place of the axis of layers.

  With `repeats` the groups of one stage are neighbours, whatever the number of
  stages: cut over "stage", every device has just its own.

  >>> storage_order(6, repeats=2)
  [0, 3, 1, 4, 2, 5]

  Args:
    num_layers: at least 1.
    repeats: R, groups of layers that a stage holds; divides the layers.

  Raises:
    ValueError: If a number is out of its range, or R does not divide.
  """
  require_static(1, num_layers=num_layers, repeats=repeats)
  check_layers(num_layers, 1, repeats)
  a_round = num_layers // repeats
  return [r * a_round + c for c in range(a_round) for r in range(repeats)]


def pipeline(
  layer: Layer,
  params: PyTree,
  x: PyTree,
  *shared: Any,
  state: PyTree = (),
  microbatches: int | None = None,
  repeats: int = 1,
  remat: bool | str = False,
) -> tuple[PyTree, PyTree]:
  """Applies equal layers in turn, cut over the mesh's axis "stage".

  As `for each layer: x, state = layer(params, state, x, *shared)`, micro-batch
  by micro-batch: while a stage works on one, the next works on the one before,
  see `Schedule`. What is traced for no mesh, or one of a single stage, does the
  same without anybody to wait for. Call it under `jax.jit`. Gradients are those
  of reverse mode.

  The mesh is the current one: that of `jax.set_mesh(mesh)` around the call, or
  of `jax.sharding.use_abstract_mesh(mesh.abstract_mesh)` while tracing. JAX's
  deprecated `with mesh:` makes none current, nor does where arrays lie.

  Between stages travel micro-batches only, one in a tick: no device ever has
  the whole batch, and what comes out is cut over "stage" as well, so that all
  share in what comes behind. All other axes of the mesh work on as without.

  **State** goes on from micro-batch to micro-batch, in their order: a layer
  draws other random numbers for each, and a running mean moves with each; so it
  is in a loop over micro-batches that sums gradients. No gradient flows through
  state. This is right for any state, but its time constants count micro-batches
  and not batches. `batch_parts` tells a layer how many make a batch.

  >>> layer = lambda w, state, x: (jnp.tanh(w * x), state)
  >>> run = lambda w, x: pipeline(layer, w, x, microbatches=2)[0]
  >>> jax.eval_shape(run, jnp.ones(4), jnp.ones((8, 3))).shape
  (8, 3)
  >>> from deepseek_jax.parallel import MeshSpec, make_mesh
  >>> mesh = make_mesh(MeshSpec(data=1, stage=2), jax.devices()[:2])
  >>> with jax.set_mesh(mesh):
  ...   y = jax.jit(run)(jnp.ones(4), jnp.ones((8, 3)))
  >>> tuple(y.sharding.spec)
  ('stage',)

  Args:
    layer: (params, state, x, *shared) -> (x, state). What it gives has the
      types of what it takes.
    params: arrays of all layers, stacked along their first axis in the order of
      `storage_order`; to be cut there over "stage".
    x: arrays whose first axis are the rows of the batch, B.
    *shared: further arguments of every layer. Arrays of B rows are cut with the
      others; all else is handed on as it is.
    state: arrays as `params`, that layers change.
    microbatches: M, parts that the rows are cut into, see `microbatches.py`; a
      multiple of the stages. None for four a stage where that divides the rows.
    repeats: R, groups of layers that a stage holds. More make the bubble
      smaller and the traffic between stages larger: R times.
    remat: whether to keep for the way back only what enters a layer, or with
      repeats a group of layers, and to recompute the rest; "dots" keeps the
      results of products with parameters too. Without, repeats keep copies of
      parameters for every visit.

  Returns:
    What the last layer gives, for all rows, and the new state.

  Raises:
    ValueError: If the layers do not divide over stages and repeats, or the rows
      over micro-batches and the devices that rows are cut over; if arrays are
      missing or differ in their first size; or if parameters lie on a mesh with
      stages and no mesh is current.

  References:
    see `Schedule`.
  """
  require_one_of((False, True, "dots"), remat=remat)
  params, state, x = jax.tree.map(jnp.asarray, (params, state, x))
  rows = _first_size("the rows of a batch", x=x)
  layers = _first_size("layers", params=params)
  if jax.tree.leaves(state):
    _first_size("layers", params=params, state=state)
  require_current_mesh("stage", params=params)
  schedule = _schedule(rows, microbatches, repeats)
  check_layers(layers, schedule.stages, repeats)
  own, whole, join = _sort(shared, rows)

  def apply(params, state, x, own, whole):
    with cut_batch(schedule.microbatches):
      return layer(params, state, x, *join(own, whole))

  stages = schedule.stages
  cut = lambda v: cut_rows(v, stages, schedule.microbatches)
  # Summed over stages outside, where any type can be: within, the compiler for
  # CPUs dies of a sum of bfloat16.
  spread = lambda v: jnp.broadcast_to(v, (stages, *jnp.shape(v)))
  run = functools.partial(run_stage, schedule, apply, remat)
  if stages > 1:
    run = jax.shard_map(
      run, in_specs=P("stage"), out_specs=P("stage"), axis_names={"stage"},
      check_vma=False,
    )  # fmt: skip
  # A stage's number comes as data: what the compiler makes of `axis_index` it
  # cannot always cut over the other axes.
  (x, _), state = run(
    jnp.arange(stages), params, state, jax.tree.map(cut, (x, own)),
    jax.tree.map(spread, whole),
  )  # fmt: skip
  return jax.tree.map(join_rows, x), state


def check_layers(num_layers: int, stages: int, repeats: int) -> None:
  """Raises `ValueError` if layers do not make equal groups."""
  if num_layers % (stages * repeats):
    raise ValueError(
      "the number of layers must be a multiple of stages * repeats = "
      f"{stages} * {repeats} = {stages * repeats}, got {num_layers}."
    )


def _first_size(of: str, **trees: PyTree) -> int:
  """Returns the size of the first axis, which must be that of all arrays."""
  known = None
  for name, tree in trees.items():
    leaves = jax.tree.leaves_with_path(tree)
    if not leaves:
      raise ValueError(
        f"{name} must have arrays whose first axis is that of {of}, got "
        f"{name}={tree!r}."
      )
    for keys, leaf in leaves:
      path = jax.tree_util.keystr(keys, simple=True, separator="/")
      place = f"{name}/{path}" if path else name
      if not leaf.ndim or (known and leaf.shape[0] != known[1]):
        also = f" beside {known[1]} of {known[0]}" if known else ""
        raise ValueError(
          f"all arrays of {' and '.join(trees)} must have as many {of}, got "
          f"shape {leaf.shape} at {place!r}{also}."
        )
      known = known or (place, leaf.shape[0])
  return known[1] if known else 0


def _schedule(rows: int, microbatches: int | None, repeats: int) -> Schedule:
  stages = axis_size("stage")
  if microbatches is None:
    microbatches = choose_microbatches(rows, stages)
  schedule = Schedule(stages=stages, microbatches=microbatches, repeats=repeats)
  check_rows(rows, microbatches)
  return schedule


def _sort(
  shared: Any, rows: int
) -> tuple[list[Array], list[Array], Callable[[list, list], Any]]:
  """Returns the arrays of rows, the other arrays, and what joins all again."""
  arrays = jax.Array | np.ndarray
  leaves, structure = jax.tree.flatten(shared)
  leaves = [jnp.asarray(v) if isinstance(v, arrays) else v for v in leaves]
  is_array = [isinstance(v, jax.Array) for v in leaves]
  is_own = [
    known and v.shape[:1] == (rows,)
    for v, known in zip(leaves, is_array, strict=True)
  ]
  is_whole = [a and not own for a, own in zip(is_array, is_own, strict=True)]

  def join(own, whole):
    own, whole = iter(own), iter(whole)
    kinds = zip(leaves, is_own, is_whole, strict=True)
    return structure.unflatten(
      [next(own) if o else next(whole) if w else v for v, o, w in kinds]
    )

  pick = lambda kind: list(itertools.compress(leaves, kind))
  return pick(is_own), pick(is_whole), join
