"""Attention on whatever part of rows, heads and tokens a device has.

Under a mesh (see `parallel`) attention runs inside `jax.shard_map`: rows are
cut over the axes of a batch, heads over "tensor", tokens over "sequence".
Kernels, which the compiler cannot cut, see the arrays of one device. Without a
mesh, all of it is one part.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from deepseek_jax import parallel
from deepseek_jax.kernels.block_sparse_attention import api as kernel
from deepseek_jax.nn.dynamic_attention import Selection, dynamic_attention
from deepseek_jax.nn.full_attention import full_attention
from deepseek_jax.nn.gathered_attention import gathered_attention
from deepseek_jax.nn.sequence_sharding import sharded_dynamic_attention


def mesh_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  *,
  num_remote: int | None,
  selection: Selection,
  projections: Float[Array, "rounds H bits"],
  two_level: bool | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  span: Float[Array, "B T N"] | None = None,
  offset: Float[Array, "B T N"] | None = None,
  implementation: kernel.Implementation | None = None,
  **shared: Any,
) -> Float[Array, "B T N H"]:
  """Returns `dynamic_attention`, or `full_attention` for no number of blocks.

  The same numbers on any mesh, but for rounding. Rows that do not divide over
  their axes are worked on whole, by all; so are heads, unless "tensor" divides
  those of keys and values: query heads that share keys choose blocks together.
  Full attention repeats keys and values until it does.

  Of a sequence that is cut, dynamic attention fetches the blocks that its
  tokens chose, and full attention all keys and values, once.

  Args:
    q: queries.
    k: keys.
    v: values.
    num_remote: far blocks that a token chooses; None for all.
    selection: as in `dynamic_attention`, and so are all others.
    projections: the same on all devices.
    two_level: never, where the sequence is cut.
    segment_ids: tokens see their own segment.
    span: half width of the window.
    offset: distance to its middle.
    implementation: of the kernel; full attention to a cut sequence has none.
    **shared: `block_size`, `window`, `is_causal` and `ramp`.

  Raises:
    ValueError: a sequence does not divide over "sequence", or not into whole
      blocks, or its windows reach beyond the next device; or arguments do not
      fit.

  >>> x = jnp.ones((1, 8, 2, 4))
  >>> mesh_attention(
  ...   x, x, x, num_remote=None, selection="none", block_size=2, window=2,
  ...   is_causal=True, projections=jnp.zeros((1, 4, 0))).shape
  (1, 8, 2, 4)
  """
  edges = {"segment_ids": segment_ids, "span": span, "offset": offset}
  if num_remote is None:
    whole = functools.partial(
      full_attention, implementation=implementation, **shared
    )
    in_parts = functools.partial(gathered_attention, **shared)
    k, v = _enough_heads(q, k, v)
    return _on_mesh(whole, in_parts, q, k, v, edges)
  shared |= {
    "num_remote": num_remote,
    "selection": selection,
    "implementation": implementation,
  }
  whole = functools.partial(dynamic_attention, two_level=two_level, **shared)
  in_parts = functools.partial(sharded_dynamic_attention, **shared)
  if two_level and parallel.axis_size("sequence") > 1:
    raise ValueError(
      "two_level must not be True where a sequence is cut over devices, which "
      "score all blocks, got two_level=True with "
      f"sequence={parallel.axis_size('sequence')}."
    )
  return _on_mesh(
    whole, in_parts, q, k, v, edges | {"projections": projections}
  )


def _enough_heads(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """Returns keys and values that divide over "tensor", if repeating helps."""
  heads, kv_heads = q.shape[2], k.shape[2]
  enough = math.lcm(kv_heads, parallel.axis_size("tensor"))
  if heads % enough:
    return k, v
  repeat = lambda x: jnp.repeat(x, enough // kv_heads, axis=2)
  return (k, v) if enough == kv_heads else (repeat(k), repeat(v))


def _on_mesh(
  whole: Any,
  in_parts: Any,
  q: Array,
  k: Array,
  v: Array,
  others: Mapping[str, Array | None],
) -> Array:
  """Calls either on parts of arrays, as the mesh cuts them."""
  free = parallel.free_axes()
  others = {name: x for name, x in others.items() if x is not None}
  if not free:
    return whole(q, k, v, **others)
  batch, time, kv_heads, _ = k.shape
  sequence = parallel.axis_size("sequence")
  if time % sequence:
    raise ValueError(
      f"tokens must divide over the sequence={sequence} of the mesh, got "
      f"{time} of them."
    )
  cut = (
    parallel.fitting_axes(parallel.BATCH_AXES, batch),
    parallel.fitting_axes("sequence", time),
    parallel.fitting_axes("tensor", kv_heads),
  )
  rows = PartitionSpec(*(axes or None for axes in cut))
  by_name = {
    "segment_ids": PartitionSpec(*rows[:2]),
    "span": rows,
    "offset": rows,
    "projections": PartitionSpec(),
  }
  if jax.default_backend() == "cpu":
    # XLA cannot compile sums over them in bfloat16 there, nor needs to: it cuts
    # what it runs itself.
    free = tuple(name for axes in cut for name in axes)
  function = functools.partial(in_parts, axis_name="sequence")
  local = function if cut[1] else whole
  if not free:
    return local(q, k, v, **others)
  # All axes are taken, also those that cut nothing: a kernel knows of none.
  return jax.shard_map(
    lambda q, k, v, others: local(q, k, v, **others),
    in_specs=(rows, rows, rows, {name: by_name[name] for name in others}),
    out_specs=rows,
    axis_names=set(free),
    # Loops of the kernels begin with constants, which vary over no device.
    check_vma=False,
  )(q, k, v, others)
