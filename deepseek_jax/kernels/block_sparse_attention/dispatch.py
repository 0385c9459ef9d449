"""Which queries meet which block of keys, as tiles of equal shape.

Every token names the blocks that it wants. Sorted by block, the (token, block)
pairs become tiles of `rows` tokens that share one block of keys: dense matrix
products, as a mixture of experts makes them of its routed tokens. A block
nobody wants has one empty tile, so that the blocks of consecutive tiles never
skip a number: a backward pass can add up the gradients of a block tile by tile.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

NOWHERE = 2**31 - 1  # Beyond all rows, whatever a tile list is padded to.


class Dispatch(NamedTuple):
  """The plan of one sequence and key-value head, or of many stacked.

  With M tiles of `rows` tokens each:
  """

  block: Int[Array, "*batch M"]  # of every tile; rises by 0 or 1
  token: Int[Array, "*batch M rows"]  # of every row; T where it is empty
  # Where a pair lies, tile·rows + row; NOWHERE for none.
  place: Int[Array, "*batch T R"]


def num_tiles(pairs: int, num_blocks: int, rows: int) -> int:
  """Returns how many tiles are enough, whatever the choice."""
  return pairs // rows + num_blocks


def make_dispatch(
  block_ids: Int[Array, "T R"], num_blocks: int, rows: int
) -> Dispatch:
  """Sorts the pairs of one sequence and key-value head into tiles.

  Args:
    block_ids: the blocks that a token wants, all different; what is not in
      [0, num_blocks) stands for none.
    num_blocks: number of key blocks, at least 1.
    rows: tokens in a tile, at least 1.
  """
  time, choices = block_ids.shape
  pairs = time * choices
  if not pairs:
    empty = jnp.full((num_blocks, rows), time)
    return Dispatch(jnp.arange(num_blocks), empty, block_ids)
  ids = block_ids.reshape(pairs)
  ids = jnp.where((ids >= 0) & (ids < num_blocks), ids, num_blocks)
  ids, pair = sort_pairs(ids, num_blocks)
  # Pairs of block b are those from start[b] up to start[b + 1].
  start = jnp.searchsorted(ids, jnp.arange(num_blocks + 1))
  tiles = jnp.maximum(1, -(-jnp.diff(start) // rows))
  first = jnp.concatenate([jnp.zeros(1, tiles.dtype), jnp.cumsum(tiles)])
  count = num_tiles(pairs, num_blocks, rows)
  tile = jnp.arange(count)
  block = jnp.searchsorted(first, tile, side="right") - 1
  block = jnp.minimum(block, num_blocks - 1)  # Tiles that are left over.
  source = (start[block] + (tile - first[block]) * rows)[:, None]
  source = source + jnp.arange(rows)[None]
  token = pair.at[source].get(mode="fill", fill_value=0) // choices
  token = jnp.where(source < start[block + 1][:, None], token, time)
  place = first[ids] * rows + jnp.arange(pairs) - start[ids]
  place = jnp.where(ids < num_blocks, place, NOWHERE)
  place = jnp.zeros(pairs, jnp.int32).at[pair].set(place, unique_indices=True)
  return Dispatch(
    block.astype(jnp.int32), token.astype(jnp.int32), place.reshape(time, -1)
  )


def sort_pairs(ids: Int[Array, " pairs"], num_blocks: int):
  """Returns the ids in order, and the pair that each belongs to.

  The ids are from 0 to `num_blocks`; pairs of one id keep their order.
  """
  pairs = ids.size
  if (num_blocks + 1) * pairs < 2**31:
    # One sort of numbers: on CPU five times as fast as a sort of pairs.
    key = jnp.sort(ids * pairs + jnp.arange(pairs))
    return key // pairs, key % pairs
  pair = jnp.argsort(ids, stable=True)
  return ids[pair], pair
