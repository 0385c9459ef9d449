"""What the TPU kernels have in common.

Keys lie along sublanes and queries along lanes: logits are [J, L]. A maximum or
a sum over keys then crosses no lanes, what belongs to a query is a dense row
[1, L] in registers and in memory, and of the five products of the backward pass
only dQ transposes an operand, the small one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

VMEM_BYTES = 16 * 2**20  # What a compiler grants a kernel unless told.
_LANES = 128


class Tuning(NamedTuple):
  """How much is done at a time; a static argument, any choice is right.

  Attributes:
    rows: tokens in a tile.
    blocks: C, blocks in a cell of the windows' grid; C·J of about 128 fill
      the matrix unit. The divisor it shares with the number of blocks counts.
    heads: heads that run at once; the divisor it shares with their number
      counts. Fewer take less memory, and their tables less scalar memory.
    interpret: whether to interpret the kernels, which runs on CPU.
  """

  rows: int = 128
  blocks: int = 1
  heads: int = 8
  interpret: bool = False


class Rows(NamedTuple):
  """What belongs to the queries of N tiles or cells, with L lanes in each.

  The rank-4 arrays with a 1 are rows of lanes; inside a kernel all are
  references without the leading axes.
  """

  q: Any  # [P, N, L, H]
  segments: Any = None  # [P, N, 1, L]
  span: Any = None
  offset: Any = None
  d_out: Any = None  # [P, N, L, H]
  lse: Any = None  # [P, N, 1, L]
  delta: Any = None


class Keys(NamedTuple):
  """What belongs to the keys of N blocks or cells, with J keys in each."""

  k: Any  # [P, N, J, H]
  v: Any
  segments: Any = None  # [P, N, 1, J]


def as_rows(x: Array | None, lanes: int) -> Array | None:
  """Cuts [P, tokens, G] into rows of lanes, [P, N, 1, lanes]."""
  return None if x is None else x.reshape(x.shape[0], -1, 1, lanes)


def as_cells(x: Array, lanes: int) -> Array:
  """Cuts [P, tokens, ..., H] into [P, N, lanes, H]."""
  return x.reshape(x.shape[0], -1, lanes, x.shape[-1])


def specs(tree: Any, index: Callable[..., tuple]) -> Any:
  """Returns block specs: one member of the second axis at a time.

  Args:
    tree: arrays [P, N, ...] or their shapes.
    index: from places in the grid, and tables, to (head, member).
  """
  one = lambda x: pl.BlockSpec(
    (None, None, *x.shape[2:]), lambda *at: (*index(*at), 0, 0)
  )
  return jax.tree.map(one, tree)


def dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
  """Contracts an axis of each, in the narrower of both types.

  Sums are float32, and products of float32 exact: the matrix unit would round
  its operands to bfloat16 if it were not told.
  """
  dtype = min(a.dtype, b.dtype, key=lambda d: d.itemsize)
  exact = jax.lax.Precision.HIGHEST
  fast = jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    a.astype(dtype),
    b.astype(dtype),
    (((axes[0],), (axes[1],)), ((), ())),
    precision=exact if dtype == jnp.float32 else fast,
    preferred_element_type=jnp.float32,
  )


def same_segment(of_key: Array, of_query: Array) -> Array:
  """Returns whether keys [1, J] and queries [1, L] see each other, [J, L]."""
  of_key = _column(of_key)
  return (of_key == of_query) & (of_key >= 0)


def _column(row: Array) -> Array:
  """Turns [1, J] into [J, 1], of which memory would hold 128 copies."""
  shape = (row.shape[1],) * 2
  down, across = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1))
  return jnp.sum(jnp.where(down == across, row, 0), 1, keepdims=True)


def log_sum(top: Array, total: Array) -> Array:
  """Returns the log-sum-exp; of nothing it is -inf."""
  some = total > 0
  return jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), -jnp.inf)


def vmem_bytes(keys: int, lanes: int, head: int) -> int:
  """Returns an upper estimate of the fast memory of a backward kernel."""
  pad = lambda n: -(-n // _LANES) * _LANES
  weights = 6 * keys * pad(lanes)  # Logits, p, their gradients, masks.
  of_query = 8 * lanes * pad(head)  # q, d_out and dQ, in two buffers; dQᵀ.
  of_key = 10 * keys * pad(head)
  return 4 * (weights + of_query + of_key)


def cost(dots: int, pairs: int, rows: Rows, keys: Keys, moved: int) -> Any:
  """Returns what a kernel costs, for the compiler and for `parallel.preflight`.

  Args:
    dots: products of a cell of queries with one of keys.
    pairs: of such cells that meet, of all heads.
    rows: what belongs to the queries.
    keys: what belongs to the keys.
    moved: bytes between the large and the fast memory.
  """
  lanes, size = rows.q.shape[2:]
  weights = pairs * lanes * keys.k.shape[2]
  return pl.CostEstimate(
    flops=2 * dots * weights * size,
    transcendentals=weights,
    bytes_accessed=moved,
  )


def byte_count(tree: Any) -> int:
  """Returns the bytes of all arrays of a tree, or of their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def in_turns(size: int, run: Callable, tree: Any) -> Any:
  """Runs on at most `size` members of the leading axis at a time."""
  total = jax.tree.leaves(tree)[0].shape[0]
  size = math.gcd(total, size)
  if size == total:
    return run(tree)
  # Counted, not -1: where nothing is chosen, arrays are empty.
  split = lambda x: x.reshape(total // size, size, *x.shape[1:])
  join = lambda x: x.reshape(total, *x.shape[2:])
  return jax.tree.map(join, jax.lax.map(run, jax.tree.map(split, tree)))
