"""What tiles and windows have in common, in plain JAX."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Tuning(NamedTuple):
  """How much is done at a time; a static argument, any choice is right.

  Attributes:
    rows: L, tokens in a tile.
    tiles: in a step of their loop, at most.
    blocks: query blocks in a step of the loop over windows; they divide those
      of a sequence.
    parts: of a step, which do not wait for each other.
    together: whether all heads run at once, rather than one after the other.
  """

  rows: int
  tiles: int
  blocks: int
  parts: int
  together: bool

  def cut(self, count: int) -> Iterator[tuple[int, int]]:
    """Yields start and size of the parts of a step."""
    edges = [i * count // self.parts for i in range(self.parts + 1)]
    for start, end in itertools.pairwise(edges):
      if end > start:
        yield start, end - start


class Head(NamedTuple):
  """One head of keys, with the queries that share it: where it lies."""

  sequence: Int[Array, ""]
  number: Int[Array, ""]

  @classmethod
  def of(cls, turn: Array, q: Float[Array, "B T K G H"]) -> "Head":
    """Returns the head of a turn."""
    return cls(turn // q.shape[2], turn % q.shape[2])

  @staticmethod
  def count(q: Float[Array, "B T K G H"]) -> int:
    """Returns how many there are."""
    return q.shape[0] * q.shape[2]

  def cut(self, x: Array, start: Array, size: int) -> Array:
    """Returns the rows of `size` tokens from `start` on."""
    shape = (1, size, 1, *x.shape[3:])
    rows = jax.lax.dynamic_slice(x, self._at(x, start), shape)
    return rows.reshape(size, *x.shape[3:])

  def put(self, x: Array, start: Array, rows: Array) -> Array:
    """Writes the rows of tokens from `start` on."""
    rows = rows.reshape(1, -1, 1, *x.shape[3:]).astype(x.dtype)
    return jax.lax.dynamic_update_slice(x, rows, self._at(x, start))

  def rows(
    self, x: Array, token: Int[Array, "C L"], fill: int | float = 0
  ) -> Array:
    """Returns the rows of tokens of tiles, [C, L·G, ...]."""
    at = (self.sequence, token, self.number)
    x = x.at[at].get(mode="fill", fill_value=fill)
    return x.reshape(token.shape[0], -1, *x.shape[3:])

  def blocks(self, x: Array, block: Int[Array, " C"], size: int) -> Array:
    """Returns blocks, [C, J, ...]."""
    return jax.vmap(lambda block: self.cut(x, block * size, size))(block)

  def _at(self, x: Array, start: Array):
    zero = jnp.zeros_like(start)
    return (self.sequence, start, self.number) + (zero,) * (x.ndim - 3)


class Above(NamedTuple):
  """What the backward pass knows of the result, for a head or all of them."""

  d_out: Float[Array, "*BTK G H"]
  lse: Float[Array, "*BTK G"]
  delta: Float[Array, "*BTK G"]


class Partial(NamedTuple):
  """Attention of rows to all or some of their keys."""

  out: Float[Array, "*rows G H"]
  lse: Float[Array, "*rows G"]

  @classmethod
  def room(cls, q: Array, shape: Any, dtype: Any = jnp.float32) -> "Partial":
    """Returns room for outputs of a shape."""
    # Made of the queries, so that `shard_map` sees that it varies as they do.
    out = jnp.zeros_like(q, dtype, shape=shape)
    return cls(out, jnp.zeros_like(q, jnp.float32, shape=shape[:-1]))


def fetch(x: Array, place: Int[Array, "*rows"], fill: int | float) -> Array:
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
