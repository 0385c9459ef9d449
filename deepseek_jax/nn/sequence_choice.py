"""Which far blocks tokens read, in a sequence that is cut over devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention import api as kernel
from deepseek_jax.kernels.block_sparse_attention.checks import (
  check_heads,
  check_rows,
)
from deepseek_jax.kernels.block_sparse_attention.problem import Layout
from deepseek_jax.nn.dynamic_attention import (
  Selection,
  check_choice,
  choice_projections,
  over_heads,
)
from deepseek_jax.nn.lsh import summarize_blocks
from deepseek_jax.nn.selection import (
  Candidates,
  keys_that_count,
  select_blocks,
)
from deepseek_jax.nn.sequence_exchange import Parts, plan_requests


class ShardedChoice(NamedTuple):
  """The far blocks that the tokens of a device read.

  Attributes:
    ids: block numbers in the whole sequence, best first; -1 for none, and for
      a choice that was dropped.
    dropped: share of the choices of all devices that was dropped, 0 to 1.
  """

  ids: Int[Array, "B T K R"]
  dropped: Float[Array, ""]


def choose_sharded_blocks(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  *,
  axis_name: str,
  capacity: int | None = None,
  block_size: int = 64,
  window: int = 256,
  num_remote: int = 4,
  num_hashes: int = 4,
  hash_bits: int = 3,
  selection: Selection = "lsh",
  projections: Float[Array, "rounds H bits"] | None = None,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
) -> ShardedChoice:
  """Returns what `sharded_dynamic_attention` reads, and how much it drops.

  Call it on a few batches to find a capacity that drops little. Without one,
  the ids are those of `choose_blocks` for the whole sequence.

  Args:
    q: queries of the own tokens.
    k: keys of the own tokens.
    axis_name: as in `sharded_dynamic_attention`, and so are all others.
    capacity: blocks that a device may ask another for.
    block_size: keys in a block.
    window: tokens.
    num_remote: blocks to choose.
    num_hashes: rounds of hashing.
    hash_bits: signs in a hash.
    selection: "lsh", "mean" or "none".
    projections: see `hash_projections`.
    is_causal: whether tokens see no later ones.
    segment_ids: of the own tokens.

  Raises:
    ValueError: shapes do not fit, or a number is out of its range.
    NameError: no axis of that name is mapped here.
  """
  layout = kernel.make_layout(block_size, window, is_causal, 1.0)
  parts = cut_sequence(k, layout, axis_name, capacity)
  segments = whole_segments(parts, k, segment_ids)
  ids = choose_from_all(
    parts, q, k, segments, num_remote=num_remote, num_hashes=num_hashes,
    hash_bits=hash_bits, selection=selection, projections=projections,
  )  # fmt: skip
  is_there = plan_requests(parts, ids).places(ids) >= 0
  total = lambda x: jax.lax.psum(x.sum(dtype=jnp.float32), axis_name)
  dropped = total((ids >= 0) & ~is_there) / jnp.maximum(total(ids >= 0), 1)
  ids = jnp.where(is_there, ids, -1)
  ids = ids.reshape(k.shape[0], k.shape[2], *ids.shape[1:])
  return ShardedChoice(jnp.moveaxis(ids, 1, 2), dropped)


def cut_sequence(
  k: Any, layout: Layout, axis_name: str, capacity: int | None
) -> Parts:
  """Returns how the sequence is cut whose local part has keys k.

  Raises:
    ValueError: it cannot be cut like that.
  """
  check_heads(k, k, k)
  time = k.shape[1]
  blocks = time // layout.block
  if not time or time % layout.block:
    raise ValueError(
      "the tokens of a device must be whole blocks, as they are summarized and "
      f"sent by block, got {time} tokens with block_size={layout.block}."
    )
  if layout.reach > blocks:
    raise ValueError(
      "window must reach no farther than the next device, got "
      f"window={(layout.reach + 1) * layout.block} with {time} tokens on a "
      f"device; try window={(blocks + 1) * layout.block}, or fewer devices."
    )
  if capacity is None:
    capacity = blocks
  if (
    isinstance(capacity, bool)
    or not isinstance(capacity, int)
    or (capacity < 1)
  ):
    raise ValueError(
      "capacity must be a whole number of at least 1, or None, got "
      f"{capacity=!r}."
    )
  return Parts(
    axis_name, jax.lax.axis_size(axis_name), blocks, min(capacity, blocks),
    layout,
  )  # fmt: skip


def whole_segments(
  parts: Parts, k: Float[Array, "B T K H"], segment_ids: Any
) -> Int[Array, "P time"]:
  """Returns the segments of the whole sequence, head by head."""
  batch, time, kv_heads, _ = k.shape
  check_rows("segment_ids", segment_ids, (batch, time), jnp.integer)
  if segment_ids is None:
    return jnp.zeros((batch * kv_heads, parts.devices * time), jnp.int32)
  # Four bytes a token: cheaper to have than to ask for.
  segments = jax.lax.all_gather(
    segment_ids, parts.axis_name, axis=1, tiled=True
  )
  return jnp.repeat(segments, kv_heads, axis=0)


def choose_from_all(
  parts: Parts,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  segments: Int[Array, "P time"],
  *,
  num_remote: int,
  num_hashes: int,
  hash_bits: int,
  selection: Selection,
  projections: Float[Array, "rounds H bits"] | None,
) -> Int[Array, "P T R"]:
  """Returns the blocks that own tokens choose from the whole sequence."""
  check_heads(q, k, k)
  check_choice(selection, num_remote, num_hashes, hash_bits)
  time, kv_heads, size = k.shape[1:]
  if selection == "none" or num_remote == 0:
    return jnp.full((k.shape[0] * kv_heads, time, 0), -1, jnp.int32)
  projections = choice_projections(
    selection, projections, num_hashes, size, hash_bits
  )
  block, first = parts.layout.block, parts.me * parts.blocks
  candidates = Candidates(block, parts.layout.reach, parts.layout.is_causal)
  q, k = jax.lax.stop_gradient((q, k))
  mine = jax.lax.dynamic_slice_in_dim(segments, first * block, time, axis=1)
  summarize = lambda x: summarize_blocks(x[0], projections, block, x[1])
  counted = keys_that_count(mine, block, candidates.is_causal)
  summary = over_heads(summarize, (by_head(k, kv_heads)[:, :, 0], counted))
  summary = jax.lax.all_gather(summary, parts.axis_name, axis=1, tiled=True)

  def select(args):
    q, summary, segments = args
    return select_blocks(
      q, summary, projections, candidates, num_remote, segments, first
    )

  return over_heads(select, (by_head(q, kv_heads), summary, segments))


def by_head(
  x: Float[Array, "B T N ..."], kv_heads: int
) -> Float[Array, "P T G ..."]:
  """Makes a row of every key-value head, with the heads that share it."""
  batch, time, heads, *rest = x.shape
  x = x.reshape(batch, time, kv_heads, heads // kv_heads, *rest)
  return jnp.moveaxis(x, 2, 1).reshape(batch * kv_heads, time, -1, *rest)
