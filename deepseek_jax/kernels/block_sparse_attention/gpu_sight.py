"""What a row sees of a slab: causality, segments and soft windows."""

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention.gpu_parts import (
  CHUNK,
  MATRIX,
  OF_KEYS,
  OF_ROWS,
  across,
  numbers,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sight:
  """What rows see of the slabs that they visit; static.

  Attributes:
    group: G, rows that are the same token.
    own: slabs in a block.
    is_causal: whether rows, in the order of time, see none of their future.
    ramp: tokens over which a window fades.
  """

  group: int
  own: int
  is_causal: bool
  ramp: float


def look(
  sight: Sight, rows: Any, keys: Any, chunk, slab, logits
) -> tuple[Array, Array | None]:
  """Returns the logits, -inf where a row sees no key, and weights if soft.

  Args:
    sight: what rows see.
    rows: buffers of the chunk.
    keys: buffers of the slab.
    chunk: its number.
    slab: its number.
    logits: of all pairs.
  """
  seen, weight = None, None
  both = lambda a, b: b if a is None else a & b
  if sight.is_causal:
    seen = both(seen, _distance(sight, chunk, slab) >= 0)
  if rows.span is not None:
    weight = _soft(sight, rows, chunk, slab)
    seen = both(seen, weight > 0)
  if rows.segments is not None:
    of_key = numbers(keys.segments, OF_KEYS)
    of_key = lax.broadcast_in_dim(of_key, logits.shape, [1])
    seen = both(seen, across(numbers(rows.segments)) == of_key)
    seen = both(seen, of_key >= 0)
  if seen is not None:
    logits = jnp.where(seen, logits, -jnp.inf)
  return logits, weight


def slope(
  sight: Sight, rows: Any, chunk, slab, weight, d_weight
) -> tuple[Array, Array]:
  """Returns the gradients of span and offset, which act on the ramp alone."""
  slope = jnp.where((weight > 0) & (weight < 1), d_weight, 0.0) / sight.ramp
  away = _away(sight, rows, chunk, slab)
  side = jnp.where(away > 0, slope, jnp.where(away < 0, -slope, 0.0))
  return slope.sum(1), side.sum(1)


def _distance(sight: Sight, chunk, slab) -> Int[Array, "rows keys"]:
  """Returns how many tokens ahead of a key a row is."""
  shape = (CHUNK, CHUNK)
  row = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=OF_ROWS)
  time = lax.div(row + chunk * CHUNK, jnp.int32(sight.group))
  key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
  return across(time) - (key + slab * CHUNK)


def _away(sight: Sight, rows: Any, chunk, slab) -> Float[Array, "rows keys"]:
  """Returns how many tokens a key lies before the middle of a window."""
  away = _distance(sight, chunk, slab).astype(jnp.float32)
  return away if rows.offset is None else away - across(numbers(rows.offset))


def _soft(sight: Sight, rows: Any, chunk, slab):
  """Returns the window's weights; those of the own block are 1."""
  away = _away(sight, rows, chunk, slab)
  away = jnp.maximum(away, -away)
  weight = 1.0 + (across(numbers(rows.span)) - away) / sight.ramp
  weight = jnp.minimum(jnp.maximum(weight, 0.0), 1.0)
  # A chunk lies in one block, as blocks are multiples of it.
  block = lax.div(chunk, jnp.int32(sight.group * sight.own))
  own = block == lax.div(slab, jnp.int32(sight.own))
  return jnp.maximum(weight, own.astype(jnp.float32))
