"""What tiles and windows have in common, in plain JAX."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Tuning(NamedTuple):
  """How much is done at a time; a static argument, any choice is right.

  Attributes:
    rows: L, tokens in a tile.
    tiles: C, tiles in a step of their loop.
    blocks: C, query blocks in a step of the loop over windows, which divides
      their number.
    together: whether all heads run at once, rather than one after the other.
  """

  rows: int
  tiles: int
  blocks: int
  together: bool


class Above(NamedTuple):
  """What the backward pass knows of the result."""

  d_out: Float[Array, "*P T G H"]
  lse: Float[Array, "*P T G"]
  delta: Float[Array, "*P T G"]


class Partial(NamedTuple):
  """Attention of the rows of all tiles to the blocks of their tiles."""

  out: Float[Array, "ML G H"]
  lse: Float[Array, "ML G"]


def in_blocks(x: Array, block: int) -> Array:
  """Cuts the first axis into blocks."""
  return x.reshape(-1, block, *x.shape[1:])


def rows(x: Array, token: Int[Array, "C L"], fill: int | float = 0) -> Array:
  """Returns the rows of tiles, [C, L·G, ...]."""
  x = x.at[token].get(mode="fill", fill_value=fill)
  return x.reshape(token.shape[0], -1, *x.shape[3:])


def fetch(x: Array, place: Int[Array, "rows R"], fill: int | float) -> Array:
  """Returns what tokens got from the tiles of their choices."""
  return x.at[place].get(mode="fill", fill_value=fill)


def dot(spec: str, a: Array, b: Array) -> Array:
  """Products in the narrower of both types, sums in float32."""
  dtype = min(a.dtype, b.dtype, key=lambda d: d.itemsize)
  return jnp.einsum(
    spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
  )


def finite(top: Array) -> Array:
  """Returns a maximum that may be subtracted from -inf."""
  return jnp.maximum(top, jnp.finfo(top.dtype).min)


def nonzero(total: Array) -> Array:
  """Returns a sum that may divide; of nothing it is 1."""
  return jnp.where(total > 0, total, 1)
