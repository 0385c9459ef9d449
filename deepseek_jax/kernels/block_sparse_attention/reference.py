"""What block-sparse attention means, in dense arithmetic."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.kernels.block_sparse_attention.window import window_weight


def visible(
  block_ids: Int[Array, "B T K R"],
  *,
  block_size: int,
  window: int,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Bool[Array, "B T K T"], Bool[Array, "T T"], Bool[Array, "#B T T"]]:
  """Says which keys a token may see as remote, as near, and at all."""
  time = jnp.arange(block_ids.shape[1])
  block = time // block_size
  behind = block[:, None] - block[None, :]  # in blocks, from query to key
  near = jnp.abs(behind) < window // block_size
  of_key = block[None, None, None, :, None]
  remote = (block_ids[..., None, :] == of_key).any(-1)
  allowed = jnp.ones((1, time.size, time.size), bool)
  if is_causal:
    allowed &= (time[:, None] >= time[None, :])[None]
  if segment_ids is not None:
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    allowed &= same & (segment_ids >= 0)[:, :, None]
  return remote & ~near[None, :, None], near, allowed


def reference(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  block_ids: Int[Array, "B T K R"],
  *,
  block_size: int = 64,
  window: int = 256,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
  span: Float[Array, "B T N"] | None = None,
  offset: Float[Array, "B T N"] | None = None,
  ramp: int | float = 32.0,
  scale: float | None = None,
) -> Float[Array, "B T N H"]:
  """`block_sparse_attention`, dense: its meaning, and what it is tested by."""
  group = q.shape[2] // k.shape[2]
  remote, near, allowed = visible(
    block_ids, block_size=block_size, window=window, is_causal=is_causal,
    segment_ids=segment_ids,
  )  # fmt: skip
  time = jnp.arange(q.shape[1])
  distance = time[:, None] - time[None, :]
  weight = near[None, None]
  if span is not None:
    own = time[:, None] // block_size == time[None, :] // block_size
    offset = jnp.zeros_like(span) if offset is None else offset
    rows = lambda x: x.swapaxes(1, 2)[..., None]
    distance = distance[None, None]
    soft = window_weight(distance, rows(span), rows(offset), ramp)
    weight = jnp.where(own[None, None], 1.0, soft) * weight
  weight = weight + jnp.repeat(remote, group, axis=2).swapaxes(1, 2)
  weight = weight * allowed[:, None]
  q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
  logits = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, group, 2))
  logits = jnp.where(weight > 0, logits, -jnp.inf)
  top = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(q.dtype).min)
  p = weight * jnp.exp(logits - top)
  total = p.sum(-1, keepdims=True)
  p = p / jnp.where(total > 0, total, 1)
  return jnp.einsum("bnts,bsnh->btnh", p, jnp.repeat(v, group, 2))
