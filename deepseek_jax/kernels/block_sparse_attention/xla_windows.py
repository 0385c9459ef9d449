"""The windows: every query block with the blocks around it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.kernels.block_sparse_attention.problem import Layout, Tokens
from deepseek_jax.kernels.block_sparse_attention.window import window_weight
from deepseek_jax.kernels.block_sparse_attention.xla_parts import (
  Above,
  Head,
  Partial,
  Tuning,
  dot,
  fetch,
  finite,
  nonzero,
)
from deepseek_jax.kernels.block_sparse_attention.xla_tiles import Plan

_NOWHERE = -2  # The segment of what lies beside a sequence; padding has -1.


def windows_forward(
  layout: Layout,
  tuning: Tuning,
  tokens: Tokens,
  plan: Plan,
  head: Head,
  remote: Partial,
  into: Partial,
) -> Partial:
  """Writes attention and log-sum-exp of a head, over windows and tiles."""

  def step(number, into):
    for start, count in tuning.cut(tuning.blocks):
      block = number * tuning.blocks + start
      view = _View.of(layout, tokens, head, block, count)
      logits, place = view.logits, view.rows(plan.place)
      fold = lambda x, like=logits: x.reshape(*like.shape[:2], -1)
      lse = [fold(x) for x in _far(remote.lse, place, -jnp.inf)]
      top = jnp.max(logits, -1, keepdims=True)
      top = finite(functools.reduce(jnp.maximum, lse, top))
      p = view.weight * jnp.exp(logits - top)
      share = [jnp.exp(x - top) for x in lse]
      total = p.sum(-1, keepdims=True) + sum(share)
      out = dot("crw,cwh->crh", p, view.v)
      for x, weight in zip(_far(remote.out, place, 0), share, strict=True):
        out += weight * fold(x)
      into = Partial(
        view.put(into.out, out / nonzero(total)),
        view.put(into.lse, top + jnp.log(total)),
      )
    return into

  return _over_blocks(layout, tuning, tokens, step, into)


def windows_backward(
  layout: Layout,
  tuning: Tuning,
  tokens: Tokens,
  plan: Plan,
  above: Above,
  head: Head,
  d_remote: Array,
  grads: Tokens,
) -> Tokens:
  """Writes all gradients of a head, adds those of keys and values."""

  def step(number, grads):
    first = number * tuning.blocks
    sums = _Sums.of(layout, tokens.k, tuning.blocks)
    for start, count in tuning.cut(tuning.blocks):
      view = _View.of(layout, tokens, head, first + start, count)
      d_out = view.folded(above.d_out)
      open_p = jnp.exp(view.logits - view.folded(above.lse)[..., None])
      d_weight = dot("crh,cwh->crw", d_out, view.v)
      d_weight = open_p * (d_weight - view.folded(above.delta)[..., None])
      p, d_logits = view.weight * open_p, view.weight * d_weight
      d_q = dot("crw,cwh->crh", d_logits, view.k)
      d_q = d_q.reshape(-1, *tokens.q.shape[3:])
      d_q += sum(_far(d_remote, view.rows(plan.place), 0))
      d_k = dot("crw,crh->cwh", d_logits, view.q)
      d_v = dot("crw,crh->cwh", p, d_out)
      sums = sums.add(start, d_k, d_v)
      d_span, d_offset = view.edges(d_weight)
      grads = grads._replace(
        q=view.put(grads.q, d_q * layout.scale),
        span=view.put(grads.span, d_span),
        offset=view.put(grads.offset, d_offset),
      )
    d_k, d_v = sums.onto(head, first, grads.k, grads.v)
    return grads._replace(k=d_k, v=d_v)

  return _over_blocks(layout, tuning, tokens, step, grads)


def _far(
  x: Array, place: Int[Array, "rows R"], fill: int | float
) -> list[Array]:
  """Returns what the rows got from the tiles of each choice."""
  # One by one: sums over a short axis are slow on CPU.
  return [fetch(x, place[:, i], fill) for i in range(place.shape[1])]


def _over_blocks(layout: Layout, tuning: Tuning, tokens: Tokens, step, carry):
  """Runs over the query blocks of a head."""
  blocks = tokens.k.shape[1] // layout.block
  return jax.lax.fori_loop(0, blocks // tuning.blocks, step, carry)


class _View(NamedTuple):
  """What C query blocks of a head see: W keys each."""

  layout: Layout
  tokens: Tokens
  head: Head
  block: Int[Array, ""]
  count: int
  q: Float[Array, "C JG H"]
  k: Float[Array, "C W H"]
  v: Float[Array, "C W H"]
  weight: Float[Array, "C JG W"] | float
  logits: Float[Array, "C JG W"]

  @classmethod
  def of(cls, layout, tokens: Tokens, head: Head, block: Array, count: int):
    seen = block + jnp.arange(count)[:, None] - layout.reach
    seen += jnp.arange(layout.band)[None]

    blocks = tokens.k.shape[1] // layout.block
    # What lies beside is hidden, but 0 times NaN would show: take a near one.
    near = jnp.clip(seen, 0, blocks - 1).reshape(-1)

    def gather(x):
      x = head.blocks(x, near, layout.block)
      return x.reshape(count, -1, *x.shape[2:])

    k, v = gather(tokens.k), gather(tokens.v)
    view = cls(layout, tokens, head, block, count, k, k, v, 1.0, k)
    q = view.folded(tokens.q) * layout.scale
    logits = dot("crh,cwh->crw", q, k)
    inside = (seen >= 0) & (seen < blocks)
    inside = jnp.repeat(inside, layout.block, axis=1)
    of_key = 0 if tokens.segments is None else gather(tokens.segments)
    visible = view._visible(jnp.where(inside, of_key, _NOWHERE))
    weight = view._soft()
    if weight is not None:
      visible &= weight > 0
      weight = weight.reshape(logits.shape)
    grouped = logits.reshape(count, layout.block, -1, k.shape[1])
    logits = jnp.where(visible, grouped, -jnp.inf).reshape(logits.shape)
    return view._replace(
      q=q, logits=logits, weight=1.0 if weight is None else weight
    )

  def rows(self, x: Array) -> Array:
    """Returns the rows of the query blocks, [C·J, ...]."""
    block = self.layout.block
    return self.head.cut(x, self.block * block, self.count * block)

  def folded(self, x: Array) -> Array:
    """Returns the rows of the query blocks, [C, J·G, ...]."""
    rows = self.rows(x)
    return rows.reshape(self.count, -1, *rows.shape[2:])

  def put(self, x: Any, rows: Any) -> Any:
    """Writes the rows of the query blocks, if there are any to write."""
    if x is None:
      return None
    return self.head.put(x, self.block * self.layout.block, rows)

  def edges(self, d_weight):
    """Returns the gradients of span and offset, which act on the ramp alone."""
    if self.tokens.span is None:
      return None, None
    on_ramp = (self.weight > 0) & (self.weight < 1)
    slope = jnp.where(on_ramp, d_weight, 0) / self.layout.ramp
    shape = (self.count * self.layout.block, -1, slope.shape[-1])
    slope = slope.reshape(shape)
    d_span = slope.sum(-1)
    if self.tokens.offset is None:
      return d_span, None
    away = jnp.tile(self._distance(), (self.count, 1))[:, None]
    away -= self.rows(self.tokens.offset)[..., None]
    return d_span, (slope * jnp.sign(away)).sum(-1)

  def _visible(self, of_key: Int[Array, "C W"]) -> Bool[Array, "C J 1 W"]:
    """Says which keys exist, share the segment and are not in the future."""
    of_key = of_key[:, None, None]
    own = 0
    if self.tokens.segments is not None:
      own = self.folded(self.tokens.segments)[..., None, None]
    visible = (of_key == own) & (of_key >= 0)
    if self.layout.is_causal:
      visible &= (self._distance() >= 0)[None, :, None]
    return jnp.broadcast_to(
      visible, (self.count, self.layout.block, 1, of_key.shape[-1])
    )

  def _distance(self) -> Int[Array, "J W"]:
    block, band = self.layout.block, self.layout.band
    key = jnp.arange(band * block) - self.layout.reach * block
    return jnp.arange(block)[:, None] - key[None]

  def _soft(self) -> Float[Array, "C J G W"] | None:
    """Returns the weights of the keys of windows."""
    if self.tokens.span is None:
      return None
    block = self.layout.block
    shape = (self.count, block, -1, 1)
    span, offset = jax.tree.map(
      lambda x: self.rows(x).reshape(shape),
      (self.tokens.span, self.tokens.offset),
    )
    distance = self._distance()[None, :, None]
    key = jnp.arange(block)[None, :, None, None] - distance
    own = (key >= 0) & (key < block)
    soft = window_weight(distance, span, offset, self.layout.ramp)
    return jnp.where(own, 1.0, soft)


class _Sums(NamedTuple):
  """Gradients of the keys that the query blocks of a step see.

  With room beside, as what lies beside a sequence moves in: nothing to add.
  """

  layout: Layout
  k: Float[Array, "blocks J H"]
  v: Float[Array, "blocks J H"]

  @classmethod
  def of(cls, layout: Layout, k: Float[Array, "B T K H"], count: int):
    blocks = layout.ahead + count + layout.band - 1 + layout.reach
    shape = (blocks, layout.block, k.shape[-1])
    empty = jnp.zeros_like(k, jnp.float32, shape=shape)
    return cls(layout, empty, empty)

  def add(self, start: int, d_k: Array, d_v: Array):
    """Adds those of windows, [C, W, H], from a query block on."""

    def add(total, parts):
      parts = parts.reshape(len(parts), self.layout.band, *total.shape[1:])
      for i in range(self.layout.band):
        first = self.layout.ahead + start + i
        total = total.at[first : first + len(parts)].add(parts[:, i])
      return total

    return self._replace(k=add(self.k, d_k), v=add(self.v, d_v))

  def onto(self, head: Head, block: Array, *totals: Float[Array, "B T K H"]):
    """Adds them to those of all keys; `block` is the first query block."""
    layout = self.layout
    blocks = totals[0].shape[1] // layout.block
    count = min(len(self.k) - layout.ahead - layout.reach, blocks)
    first = block - layout.reach
    start = jnp.clip(first, 0, blocks - count)
    move = layout.ahead + start - first

    def add(total, sums):
      sums = jax.lax.dynamic_slice_in_dim(sums, move, count)
      sums = sums.reshape(-1, sums.shape[-1])
      at = start * layout.block
      return head.put(total, at, head.cut(total, at, len(sums)) + sums)

    return add(totals[0], self.k), add(totals[1], self.v)
