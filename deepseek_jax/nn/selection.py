"""Which far blocks a token should read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.kernels.block_sparse_attention.dispatch import (
  Dispatch,
  make_dispatch,
)
from deepseek_jax.nn.lsh import BlockSummary, hash_buckets

_LEAST = float(jnp.finfo(jnp.float32).min)  # No such key, but open.
_ROWS = 64  # Queries that share a bucket, in one product.
_TILES = 16  # Products in a step.
_PARTS = 8  # Of the sequence: each scores the blocks before its end only.
_PART = 2048  # Tokens in a part, at least.


class Candidates(NamedTuple):
  """Which blocks a token may choose: those beside its window.

  Attributes:
    reach: blocks of the window on a side of the own one.
    block: keys in a block.
    is_causal: whether only blocks of the past are open.
  """

  block: int
  reach: int
  is_causal: bool

  def open(
    self, time: Int[Array, "*T"], blocks: Int[Array, " blocks"]
  ) -> Bool[Array, "*T blocks"]:
    """Says which of the blocks the tokens at some times may choose."""
    own = jnp.expand_dims(time // self.block, -1)
    behind = own - jnp.expand_dims(blocks, range(time.ndim))
    if self.is_causal:
      return behind > self.reach
    return jnp.abs(behind) > self.reach


def select_blocks(
  q: Float[Array, "T G H"],
  summary: BlockSummary,
  projections: Float[Array, "rounds H bits"],
  candidates: Candidates,
  num_remote: int,
  segments: Int[Array, " time"] | None = None,
  first_block: Int[Array, ""] | int = 0,
) -> Int[Array, "T R"]:
  """Returns the best blocks of every token of one key-value head.

  The score of a block is the largest q·c over the rounds of hashing and over
  the G queries of the group, c the mean of the keys of that block which fell
  into the bucket of the query. One key that is like the query stands out
  there, where the mean of the whole block would drown it.

  Args:
    q: queries that share keys, scaled or not.
    summary: of all blocks.
    projections: that the summary was made with.
    candidates: which blocks are open to whom.
    num_remote: R, blocks to choose; fewer where there are fewer in all.
    segments: of all tokens that the summary is of; a block is open to those
      whose number lies between the smallest and the largest in it.
    first_block: of the queries, where they are a part of the tokens.

  Returns:
    Block numbers, best first; -1 where none is left.
  """
  time = q.shape[0]
  blocks = summary.count.shape[0]
  num_remote = min(num_remote, blocks)
  start = first_block * candidates.block
  ranges = None
  if segments is not None:
    ranges = segment_ranges(segments, candidates.block)
    segments = jax.lax.dynamic_slice_in_dim(segments, start, time)
  whole = time == blocks * candidates.block
  parts = _num_parts(blocks, candidates) if whole else 1
  chosen = []
  for part in range(parts):
    first, end = part * blocks // parts, (part + 1) * blocks // parts
    known = end if candidates.is_causal else blocks
    rows = slice(first * candidates.block, end * candidates.block)
    scores = score_blocks(
      q[rows], jax.tree.map(lambda x, n=known: x[:n], summary), projections
    )
    open_ = candidates.open(start + jnp.arange(time)[rows], jnp.arange(known))
    if ranges is not None and segments is not None:
      low, high = (edge[:known] for edge in ranges)
      mine = segments[rows, None]
      open_ &= (low[None] <= mine) & (mine <= high[None])
    scores = jnp.where(open_, scores, -jnp.inf)
    chosen.append(best_blocks(scores, num_remote)[0])
  return jnp.concatenate(chosen)


def _num_parts(blocks: int, candidates: Candidates) -> int:
  if not candidates.is_causal:
    return 1
  return max(1, min(_PARTS, blocks * candidates.block // _PART))


def segment_ranges(segments: Int[Array, " T"], block: int):
  """Returns the smallest and the largest segment of every block."""
  segments = segments.reshape(-1, block)
  padding = segments < 0
  low = jnp.where(padding, jnp.iinfo(segments.dtype).max, segments).min(1)
  return low, segments.max(1)


def keys_that_count(
  segments: Int[Array, "*B T"], size: int, is_causal: bool
) -> Bool[Array, "*B T"]:
  """Says which keys a summary of so many tokens counts: all but padding.

  If causal, only those of the segment that is last among them: tokens that come
  after belong to no earlier one. So what a document chooses does not hang on
  what else is in the block where it begins.
  """
  parts = segments.reshape(*segments.shape[:-1], -1, size)
  real = parts >= 0
  if is_causal:
    number = jnp.broadcast_to(jnp.arange(size), parts.shape)
    place = jnp.where(real, number, -1).argmax(-1, keepdims=True)
    real &= parts == jnp.take_along_axis(parts, place, -1)
  return real.reshape(segments.shape)


def score_blocks(
  q: Float[Array, "T G H"],
  summary: BlockSummary,
  projections: Float[Array, "rounds H bits"],
) -> Float[Array, "T blocks"]:
  """Returns the scores of all blocks, from queries that share a bucket.

  A bucket of a round is to the pairs of (query, round) what a block of keys is
  to attention: they are dispatched in the same way.
  """
  time, group, size = q.shape
  rounds, buckets = summary.count.shape[1:]
  flat = q.reshape(-1, size)
  codes = hash_buckets(flat, projections)
  codes += buckets * jnp.arange(rounds)[None]
  plan = make_dispatch(codes, rounds * buckets, _ROWS)
  # [rounds, buckets, H, blocks]
  keys = jnp.moveaxis(summary.centroids(), 0, -1)
  keys = keys.reshape(rounds * buckets, size, -1)
  empty = (summary.count == 0).reshape(-1, rounds * buckets).T
  scores = score_groups(flat, plan, keys, empty)
  return (
    fetch_scores(scores, plan.place).reshape(time, group * rounds, -1).max(1)
  )


def score_groups(
  q: Float[Array, "rows H"],
  plan: Dispatch,
  keys: Float[Array, "groups H keys"],
  empty: Bool[Array, "groups keys"],
) -> Float[Array, "tiles L keys"]:
  """Returns the products of dispatched queries with the keys of their group.

  `empty` marks what is no key: its score is the least there is.
  """

  def step(tile):
    group, token = tile
    # Where a tile has no token any other may stand: nobody fetches its scores.
    rows = q.at[token].get(mode="clip").astype(jnp.float32)
    return jnp.where(empty[group], _LEAST, rows @ keys[group])

  return jax.lax.map(step, (plan.block, plan.token), batch_size=_TILES)


def fetch_scores(
  scores: Float[Array, "tiles L keys"], place: Int[Array, "T rounds"]
) -> Float[Array, "T rounds keys"]:
  """Returns what the queries got in every round."""
  return scores.reshape(-1, scores.shape[-1])[place]


def best_blocks(
  scores: Float[Array, "T blocks"], count: int
) -> tuple[Int[Array, "T R"], Float[Array, "T R"]]:
  """Returns places and values of the largest scores; place -1 for -inf.

  A few passes over the scores take less time than a partial sort on CPU.
  """
  if count > 8:
    best, place = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    more = ((0, 0), (0, count - place.shape[-1]))
    best = jnp.pad(best, more, constant_values=-jnp.inf)
    return jnp.where(best > -jnp.inf, jnp.pad(place, more), -1), best
  number = jnp.arange(scores.shape[-1])[None]
  places, values = [], []
  for _ in range(count):
    best = scores.max(-1, keepdims=True)
    place = jnp.where(scores == best, number, number.size)
    place = place.min(-1, keepdims=True)
    scores = jnp.where(number == place, -jnp.inf, scores)
    places.append(jnp.where(best > -jnp.inf, place, -1))
    values.append(best)
  places, values = (jnp.concatenate(x, -1) for x in (places, values))
  return places.astype(jnp.int32), values
