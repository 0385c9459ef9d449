"""The windows: every query block with the blocks around it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout
from deepseek_jax.kernels.block_sparse_attention.window import window_weight
from deepseek_jax.kernels.block_sparse_attention.xla_parts import (
  Above,
  Partial,
  Tuning,
  dot,
  fetch,
  finite,
  in_blocks,
  nonzero,
)

_NOWHERE = -2  # The segment of what lies beside a sequence; padding has -1.


def windows_forward(
  layout: Layout, tuning: Tuning, head: Heads, place, remote: Partial
):
  """Returns attention and log-sum-exp over windows and tiles."""
  time, group, size = head.q.shape
  band = _Band.of(layout, tuning, head)

  def step(_, args):
    number, (rows, place) = args
    logits, weight, (_, v) = band.look(number, rows)
    far = fetch(remote.lse, place, -jnp.inf)  # [C·J, R, G]
    far = far.swapaxes(1, 2).reshape(*logits.shape[:2], -1)
    top = jnp.max(logits, -1, keepdims=True)
    top = jnp.maximum(top, jnp.max(far, -1, keepdims=True, initial=-jnp.inf))
    top = finite(top)
    p = weight * jnp.exp(logits - top)
    share = jnp.exp(far - top)
    total = p.sum(-1, keepdims=True) + share.sum(-1, keepdims=True)
    share = share.reshape(-1, group, far.shape[-1])
    fetched = fetch(remote.out, place, 0)
    out = jnp.einsum("tgr,trgh->tgh", share, fetched)
    out = out.reshape(*logits.shape[:2], size) + dot("crw,cwh->crh", p, v)
    return None, (out / nonzero(total), top + jnp.log(total))

  _, (out, lse) = jax.lax.scan(step, None, band.steps((head, place)))
  return out.reshape(time, group, size), lse.reshape(time, group)


def windows_backward(
  layout: Layout,
  tuning: Tuning,
  head: Heads,
  place,
  above: Above,
  d_remote: Array,
) -> Heads:
  """Returns all gradients but those of keys and values in tiles."""
  time, group, size = head.q.shape
  band = _Band.of(layout, tuning, head)

  def step(d_kv, args):
    number, (rows, place, above) = args
    logits, weight, (k, v) = band.look(number, rows)
    fold = lambda x: x.reshape(*logits.shape[:2], *x.shape[2:])
    q, d_out = fold(rows.q), fold(above.d_out)
    open_p = jnp.exp(logits - fold(above.lse)[..., None])
    d_weight = dot("crh,cwh->crw", d_out, v) - fold(above.delta)[..., None]
    d_weight = open_p * d_weight
    p, d_logits = weight * open_p, weight * d_weight
    d_q = dot("crw,cwh->crh", d_logits, k).reshape(rows.q.shape)
    d_q += fetch(d_remote, place, 0).sum(1)
    d_k = dot("crw,crh->cwh", d_logits, q)
    d_v = dot("crw,crh->cwh", p, d_out)
    d_kv = band.add(d_kv, number, jnp.concatenate([d_k, d_v], -1))
    return d_kv, (d_q, band.edges(rows, weight, d_weight))

  # Made of the keys, so that `shard_map` sees that it varies as they do.
  shape = (band.k.shape[0], layout.block, 2 * size)
  empty = jnp.zeros_like(band.k, jnp.float32, shape=shape)
  xs = band.steps((head, place, above))
  d_kv, (d_q, d_edges) = jax.lax.scan(step, empty, xs)
  d_kv = d_kv[layout.reach :][: time // layout.block].reshape(time, 2 * size)
  shape = (time, group)
  d_span, d_offset = jax.tree.map(lambda d: d.reshape(shape), d_edges)
  return Heads(
    q=d_q.reshape(*shape, size),
    k=d_kv[:, :size],
    v=d_kv[:, size:],
    span=d_span,
    offset=d_offset,
    segments=None,
  )


class _Band(NamedTuple):
  """Keys and values in blocks, with room at both ends for a whole window."""

  layout: Layout
  chunk: int
  k: Float[Array, "blocks J H"]
  v: Float[Array, "blocks J H"]
  segments: Int[Array, "blocks J"]

  @classmethod
  def of(cls, layout: Layout, tuning: Tuning, head: Heads):
    segments = head.segments
    if segments is None:
      segments = jnp.zeros(head.k.shape[0], jnp.int32)
    ends = (layout.reach, layout.ahead)

    def pad(x, fill):
      x = in_blocks(x, layout.block)
      widths = (ends,) + ((0, 0),) * (x.ndim - 1)
      return jnp.pad(x, widths, constant_values=fill)

    return cls(
      layout, tuning.blocks, pad(head.k, 0), pad(head.v, 0),
      pad(segments, _NOWHERE),
    )  # fmt: skip

  def steps(self, tree: Any):
    """Cuts arrays over tokens into numbered steps of C blocks."""
    length = self.chunk * self.layout.block
    cut = lambda x: x.reshape(x.shape[0] // length, length, *x.shape[1:])
    tree = jax.tree.map(cut, tree)
    count = jax.tree.leaves(tree)[0].shape[0]
    return jnp.arange(count), tree

  def look(self, number, rows: Heads):
    """Returns logits and weights [C, J·G, W], and the keys and values seen."""
    chunk, block = self.chunk, self.layout.block
    k, v, segments = (self._windows(x, number) for x in self[2:])
    q = rows.q.reshape(chunk, -1, rows.q.shape[-1])
    logits = dot("crh,cwh->crw", q, k)
    own = 0 if rows.segments is None else rows.segments.reshape(chunk, block, 1)
    seen = (segments[:, None] == own) & (segments[:, None] >= 0)
    distance = self._distance()
    if self.layout.is_causal:
      seen &= (distance >= 0)[None]
    shape = (chunk, block, -1, k.shape[1])
    weight = 1.0
    if rows.span is not None:
      weight = self._soft(distance, rows)
      seen = seen[:, :, None] & (weight > 0)
      weight = weight.reshape(logits.shape)
    else:
      seen = seen[:, :, None]
    logits = jnp.where(seen, logits.reshape(shape), -jnp.inf)
    return logits.reshape(q.shape[:2] + k.shape[1:2]), weight, (k, v)

  def add(self, total, number, parts):
    """Adds gradients of windows [C, W, D] to those of all blocks."""
    chunk, block, band = self.chunk, self.layout.block, self.layout.band
    parts = parts.reshape(chunk, band, block, -1)
    place = number * chunk
    window = jax.lax.dynamic_slice_in_dim(total, place, chunk + band - 1)
    for i in range(band):
      window = window.at[i : i + chunk].add(parts[:, i])
    return jax.lax.dynamic_update_slice_in_dim(total, window, place, 0)

  def edges(self, rows: Heads, weight, d_weight):
    """Returns the gradients of span and offset, which act on the ramp alone."""
    if rows.span is None:
      return None, None
    chunk, block = self.chunk, self.layout.block
    on_ramp = (weight > 0) & (weight < 1)
    slope = jnp.where(on_ramp, d_weight, 0) / self.layout.ramp
    slope = slope.reshape(chunk * block, -1, slope.shape[-1])
    d_span = slope.sum(-1)
    if rows.offset is None:
      return d_span, None
    away = (
      jnp.tile(self._distance(), (chunk, 1))[:, None] - rows.offset[..., None]
    )
    return d_span, (slope * jnp.sign(away)).sum(-1)

  def _windows(self, x, number):
    """Returns the windows [C, W, ...] of the blocks of a step."""
    chunk, band = self.chunk, self.layout.band
    x = jax.lax.dynamic_slice_in_dim(x, number * chunk, chunk + band - 1)
    x = jnp.stack([x[i : i + chunk] for i in range(band)], 1)
    return x.reshape(chunk, -1, *x.shape[3:])

  def _distance(self) -> Int[Array, "J W"]:
    block, band = self.layout.block, self.layout.band
    key = jnp.arange(band * block) - self.layout.reach * block
    return jnp.arange(block)[:, None] - key[None]

  def _soft(self, distance, rows: Heads):
    """Returns the weights of the keys of windows, [C, J, G, W]."""
    block = self.layout.block
    shape = (self.chunk, block, -1, 1)
    span, offset = jax.tree.map(
      lambda x: x.reshape(shape), (rows.span, rows.offset)
    )
    distance = distance[None, :, None]
    key = jnp.arange(block)[None, :, None, None] - distance
    own = (key >= 0) & (key < block)
    soft = window_weight(distance, span, offset, self.layout.ramp)
    return jnp.where(own, 1.0, soft)
