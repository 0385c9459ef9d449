"""Choosing far blocks in long sequences without scoring all of them.

Scoring every block for every token costs T² / block. Here the sequence is cut
into regions of about √(number of blocks) blocks each. Blocks of the own region
and of those beside it are scored as ever. In the others, longer hash codes cut
the keys of a region into cells of a few keys; a token scores only the cells
that its own codes name and looks at the keys of the best ones. Blocks found far
away and those nearby are taken turn by turn. The work grows as T^1.5. It is for
what it finds: in long sequences the mean of a bucket drowns a single key.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.kernels.block_sparse_attention.dispatch import (
  make_dispatch,
  sort_pairs,
)
from deepseek_jax.nn.lsh import BlockSummary, hash_buckets, hash_projections
from deepseek_jax.nn.selection import (
  Candidates,
  best_blocks,
  fetch_scores,
  keys_that_count,
  score_blocks,
  score_groups,
  segment_ranges,
)

_FILL = 4  # Keys in a cell, on average.
_ROOM = 8  # Keys in a cell, at most: those that are more cannot be found.
_LOOKS = 8  # Cells that a query looks into.
_STEP = 1024  # Tokens that look at a time.


class Regions(NamedTuple):
  """How a sequence is cut.

  Attributes:
    blocks: in a region.
    count: regions.
    bits: signs in the code of a cell.
    rounds: of hashing.
  """

  blocks: int
  count: int
  bits: int
  rounds: int


def region_blocks(num_blocks: int, reach: int) -> int:
  """Returns the number of blocks in a region, a power of 2 above the reach."""
  return 2 ** math.ceil(math.log2(max(math.sqrt(num_blocks), reach + 1)))


class Cells(NamedTuple):
  """Keys by round, region and code, and their mean."""

  member: Int[Array, "rounds cells room"]  # positions of keys
  taken: Bool[Array, "rounds cells room"]
  mean: Float[Array, "rounds cells H"]


def select_long(
  k: Float[Array, "T H"],
  q: Float[Array, "T G H"],
  summary: BlockSummary,
  projections: Float[Array, "rounds H bits"],
  candidates: Candidates,
  num_remote: int,
  *,
  size: int,
  segments: Int[Array, " T"],
) -> Int[Array, "T R"]:
  """Returns the best blocks of every token, like `select_blocks`.

  Args:
    k: keys.
    q: queries that share them.
    summary: of all blocks.
    projections: that the summary was made with.
    candidates: which blocks are open to whom.
    num_remote: R, blocks to choose.
    size: blocks in a region, which divide all; see `region_blocks`.
    segments: of the tokens; keys of another, or of a negative one, are not
      found, and neighbouring blocks are open as in `select_blocks`.
  """
  blocks = summary.count.shape[0]
  tokens = size * candidates.block
  regions = Regions(
    size, blocks // size, math.ceil(math.log2(tokens / _FILL)),
    3 * projections.shape[0],
  )  # fmt: skip
  codes = hash_projections(
    jax.random.key(1), regions.rounds, k.shape[-1], regions.bits
  )
  near = _near(
    q, summary, projections, candidates, regions, num_remote, segments
  )
  counted = keys_that_count(segments, tokens, candidates.is_causal)
  cells = _fill_cells(k, hash_buckets(k, codes), regions, counted)
  far = _far(q, k, cells, codes, candidates, regions, num_remote, segments)
  # Turn by turn, as means and single keys have no common scale.
  ids = jnp.stack([far, near], -1).reshape(len(q), -1)
  late = jnp.where(ids < 0, ids.shape[1], 0) + jnp.arange(ids.shape[1])[None]
  order = jnp.argsort(late, axis=1)[:, :num_remote]
  return jnp.take_along_axis(ids, order, 1)


def _near(q, summary, projections, candidates, regions, num_remote, segments):
  """Chooses among the blocks of the own region and of those beside it."""
  sides = (1, 0 if candidates.is_causal else 1)
  widths = tuple(n * regions.blocks for n in sides)
  pad = lambda x: jnp.pad(x, (widths,) + ((0, 0),) * (x.ndim - 1))
  around = jax.tree.map(
    pad, (summary, *segment_ranges(segments, candidates.block))
  )
  span = regions.blocks * (1 + sum(sides))
  tokens = regions.blocks * candidates.block

  def choose(args):
    number, q, mine = args
    first = number * regions.blocks
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, span)
    summary, low, high = jax.tree.map(cut, around)
    scores = score_blocks(q, summary, projections)
    block = first - widths[0] + jnp.arange(span)
    time = number * tokens + jnp.arange(tokens)
    inside = (block >= 0) & (block < regions.blocks * regions.count)
    open_ = candidates.open(time, block) & inside[None]
    open_ &= (low[None] <= mine[:, None]) & (mine[:, None] <= high[None])
    place, _ = best_blocks(jnp.where(open_, scores, -jnp.inf), num_remote)
    return jnp.where(place >= 0, block[0] + place, -1)

  number = jnp.arange(regions.count)
  parts = q.reshape(regions.count, tokens, *q.shape[1:])
  mine = segments.reshape(regions.count, tokens)
  ids = jax.lax.map(choose, (number, parts, mine))
  return ids.reshape(len(q), -1)


def _fill_cells(k, codes, regions: Regions, valid) -> Cells:
  """Sorts the keys of every region by code, round by round."""
  time = k.shape[0]
  per_region = 2**regions.bits
  count = regions.count * per_region
  region = jnp.arange(time) // (time // regions.count)

  def fill(code):
    cell = jnp.where(valid, region * per_region + code, count)
    cell, key = sort_pairs(cell, count)
    start = jnp.searchsorted(cell, jnp.arange(count + 1))
    at = start[:-1, None] + jnp.arange(_ROOM)[None]
    taken = at < start[1:, None]
    member = jnp.where(taken, key[jnp.minimum(at, time - 1)], 0)
    total = jnp.where(taken[..., None], k[member], 0).astype(jnp.float32)
    number = jnp.maximum(taken.sum(-1, keepdims=True), 1)
    return Cells(member, taken, total.sum(1) / number)

  return jax.lax.map(fill, codes.T)


def _far(q, k, cells, codes, candidates, regions, num_remote, segments):
  """Looks into the cells that the codes of the queries name."""
  time, group, size = q.shape
  rounds, per_region = regions.rounds, 2**regions.bits
  flat = q.reshape(-1, size)
  named = hash_buckets(flat, codes)  # [T·G, rounds]
  plan = make_dispatch(
    named + per_region * jnp.arange(rounds)[None], rounds * per_region, 32
  )
  means = cells.mean.reshape(rounds, regions.count, per_region, size)
  means = means.transpose(0, 2, 3, 1).reshape(-1, size, regions.count)
  empty = ~cells.taken.any(-1).reshape(rounds, regions.count, per_region)
  empty = empty.swapaxes(1, 2).reshape(-1, regions.count)
  scores = score_groups(flat, plan, means, empty)
  tokens = time // regions.count
  low, high = segment_ranges(segments, tokens)
  length = math.gcd(_STEP, time)

  def look(args):
    first, q, named, place, mine = args
    found = fetch_scores(scores, place).reshape(length, group, -1)
    own = (first + jnp.arange(length)) // tokens
    away = own[:, None] - jnp.arange(regions.count)[None]
    open_ = away > 1 if candidates.is_causal else jnp.abs(away) > 1
    open_ &= (low[None] <= mine[:, None]) & (mine[:, None] <= high[None])
    open_ = jnp.tile(open_, (1, rounds))[:, None]
    found = jnp.where(open_, found, -jnp.inf).reshape(length * group, -1)
    cell, best = best_blocks(found, _LOOKS)
    turn, region = cell // regions.count, cell % regions.count
    code = jnp.take_along_axis(named, jnp.maximum(turn, 0), 1)
    at = (jnp.maximum(turn, 0), region * per_region + code)
    member = cells.member[at]
    usable = cells.taken[at] & (best > -jnp.inf)[..., None]
    keys = k[member].reshape(length, group, -1, size)
    worth = jnp.einsum("tgh,tgmh->tgm", q, keys).reshape(length, -1)
    member = member.reshape(length, -1)
    usable = usable.reshape(length, -1)
    usable &= segments[member] == mine[:, None]
    block = member // candidates.block
    return _best_distinct(block, jnp.where(usable, worth, -jnp.inf), num_remote)

  steps = lambda x: x.reshape(time // length, -1, *x.shape[1:])
  first = jnp.arange(0, time, length)
  each = jax.tree.map(steps, (q, named, plan.place, segments))
  ids = jax.lax.map(look, (first, *each))
  return ids.reshape(time, -1)


def _best_distinct(block, worth, count: int):
  """Returns the blocks of the best keys, each once; -1 where none is left."""
  chosen = []
  for _ in range(count):
    place, best = best_blocks(worth, 1)
    id_ = jnp.take_along_axis(block, jnp.maximum(place, 0), 1)
    id_ = jnp.where(best > -jnp.inf, id_, -1)
    worth = jnp.where(block == id_, -jnp.inf, worth)
    chosen.append(id_)
  return jnp.concatenate(chosen, 1)
