"""The chosen blocks: tiles of queries that share a block of keys."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention.dispatch import (
  NOWHERE,
  make_dispatch,
)
from deepseek_jax.kernels.block_sparse_attention.problem import Layout, Tokens
from deepseek_jax.kernels.block_sparse_attention.xla_parts import (
  Above,
  Head,
  Partial,
  Tuning,
  dot,
  finite,
  nonzero,
)

_NOBODY = -2  # The segment of a row without a token; padding has -1.


class Plan(NamedTuple):
  """The tiles of all heads, in steps."""

  block: Int[Array, "B K steps C"]
  token: Int[Array, "B K steps C L"]
  place: Int[Array, "B T K R"]

  @property
  def num_rows(self) -> int:
    """Rows of the tiles of a head; one that nobody fetches if there is none."""
    steps, tiles, length = self.token.shape[2:]
    return max(1, steps * tiles * length)


def make_plan(
  tuning: Tuning, ids: Int[Array, "B T K R"], num_blocks: int
) -> Plan:
  """Returns the tiles that bring tokens to the blocks they named."""
  batch, time, heads, choices = ids.shape
  if not choices:
    none = jnp.zeros((batch, heads, 0, 1), jnp.int32)
    token = jnp.zeros((*none.shape, tuning.rows), jnp.int32)
    return Plan(none, token, jnp.full((batch, time, heads, 1), NOWHERE))
  make = lambda ids: make_dispatch(ids, num_blocks, tuning.rows)
  plan = jax.vmap(jax.vmap(make, 1))(ids)
  tiles = plan.block.shape[2]
  steps = -(-tiles // tuning.tiles)
  more = ((0, 0), (0, 0), (0, -tiles % steps))  # Tiles that have no tokens.
  block = jnp.pad(plan.block, more, mode="edge")
  token = jnp.pad(plan.token, (*more, (0, 0)), constant_values=time)
  shape = (batch, heads, steps, -1)
  token = token.reshape(*shape[:3], block.shape[2] // steps, tuning.rows)
  return Plan(block.reshape(shape), token, jnp.moveaxis(plan.place, 1, 2))


def tiles_forward(
  layout: Layout,
  tuning: Tuning,
  tokens: Tokens,
  plan: Plan,
  head: Head,
  remote: Partial,
) -> Partial:
  """Writes attention of every row of a head to the block of its tile."""

  def step(number, remote):
    for start, tiles in _parts(tuning, plan, head, number):
      logits, _, _, v = _look(layout, tokens, head, tiles)
      top = finite(logits.max(-1, keepdims=True))
      p = jnp.exp(logits - top)
      total = p.sum(-1, keepdims=True)
      out = dot("crj,cjh->crh", p, v) / nonzero(total)
      lse = top + jnp.log(total)
      remote = Partial(
        _put(remote.out, start, out), _put(remote.lse, start, lse)
      )
    return remote

  return _over_tiles(plan, step, remote)


def tiles_backward(
  layout: Layout,
  tuning: Tuning,
  tokens: Tokens,
  plan: Plan,
  above: Above,
  head: Head,
  d_remote: Array,
  grads: Tokens,
) -> tuple[Array, Tokens]:
  """Writes gradients of the queries in tiles, adds those of keys and values."""

  def step(number, carry):
    d_remote, grads = carry
    runs = _Runs.of(plan, head, number, tokens.k.shape[1] // layout.block)
    sums: Any = (0.0, 0.0)
    for start, tiles in _parts(tuning, plan, head, number):
      block, token = tiles
      logits, q, k, v = _look(layout, tokens, head, tiles)
      d_out = head.rows(above.d_out, token)
      lse = head.rows(above.lse, token, jnp.inf)
      p = jnp.exp(logits - lse[..., None])
      d_p = dot("crh,cjh->crj", d_out, v)
      d_logits = p * (d_p - head.rows(above.delta, token)[..., None])
      d_remote = _put(d_remote, start, dot("crj,cjh->crh", d_logits, k))
      d_k = dot("crj,crh->cjh", d_logits, q)
      d_v = dot("crj,crh->cjh", p, d_out)
      part = runs.sums(block, d_k), runs.sums(block, d_v)
      sums = jax.tree.map(jnp.add, sums, part)
    d_k, d_v = (
      runs.add(head, *x) for x in zip((grads.k, grads.v), sums, strict=True)
    )
    return d_remote, grads._replace(k=d_k, v=d_v)

  return _over_tiles(plan, step, (d_remote, grads))


def _over_tiles(plan: Plan, step, carry):
  """Runs over the steps of the tiles of a head; there may be none."""
  steps = plan.block.shape[2]
  return jax.lax.fori_loop(0, steps, step, carry) if steps else carry


def _parts(tuning: Tuning, plan: Plan, head: Head, number: Array):
  """Yields the parts of a step: their first row, their tiles."""
  at = (head.sequence, head.number, number)
  block, token = plan.block[at], plan.token[at]
  tiles, length = token.shape
  for first, count in tuning.cut(tiles):
    part = slice(first, first + count)
    yield (number * tiles + first) * length, (block[part], token[part])


def _put(into: Array, start: Array, rows: Array) -> Array:
  rows = rows.reshape(-1, *into.shape[1:])
  return jax.lax.dynamic_update_slice_in_dim(into, rows, start, 0)


def _look(layout: Layout, tokens: Tokens, head: Head, tiles):
  """Returns logits [C, L·G, J] of tiles, their queries, keys and values."""
  block, token = tiles
  k = head.blocks(tokens.k, block, layout.block)
  v = head.blocks(tokens.v, block, layout.block)
  q = head.rows(tokens.q, token) * layout.scale
  logits = dot("crh,cjh->crj", q, k)
  if tokens.segments is not None:
    of_query = head.rows(tokens.segments, token, _NOBODY)
    of_query = jnp.repeat(of_query, tokens.q.shape[3], axis=1)
    of_key = head.blocks(tokens.segments, block, layout.block)
    seen = of_query[:, :, None] == of_key[:, None, :]
    seen &= of_key[:, None, :] >= 0
    logits = jnp.where(seen, logits, -jnp.inf)
  return logits, q, k, v


class _Runs(NamedTuple):
  """The blocks of the tiles of a step: their numbers rise by 0 or 1."""

  first: Int[Array, ""]
  count: int

  @classmethod
  def of(cls, plan: Plan, head: Head, number: Array, num_blocks: int):
    count = min(plan.block.shape[3], num_blocks)
    first = plan.block[head.sequence, head.number, number, 0]
    return cls(jnp.minimum(first, num_blocks - count), count)

  def sums(self, block: Int[Array, " C"], parts: Float[Array, "C J H"]):
    """Adds up what belongs to a block, by a product with zeros and ones."""
    slot = (block - self.first)[None] == jnp.arange(self.count)[:, None]
    return dot("sc,cjh->sjh", slot.astype(parts.dtype), parts)

  def add(self, head: Head, total: Array, sums: Float[Array, "S J H"]):
    """Adds the sums to those of all keys."""
    start = self.first * sums.shape[1]
    sums = sums.reshape(-1, sums.shape[-1])
    return head.put(total, start, head.cut(total, start, len(sums)) + sums)
