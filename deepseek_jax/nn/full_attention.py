"""What dynamic attention gives when every block is read."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention import api as kernel
from deepseek_jax.kernels.block_sparse_attention import window_weight

_SHORT = 1024  # Tokens up to which stripes are faster than blocks.
_STRIPE = 128  # Rows of one.
_LEAST = -1e30  # Finite, so that a row that sees nothing stays finite.


def full_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  *,
  block_size: int,
  window: int,
  is_causal: bool,
  segment_ids: Int[Array, "B T"] | None = None,
  span: Float[Array, "B T N"] | None = None,
  offset: Float[Array, "B T N"] | None = None,
  ramp: int | float = 32.0,
  implementation: kernel.Implementation | None = None,
) -> Float[Array, "B T N H"]:
  """`dynamic_attention` with as many remote blocks as there are.

  Faster where most blocks would be chosen anyway, as in the first steps of
  training. Without a `span` it computes what `jax.nn.dot_product_attention`
  does, as one window over everything: block by block, in memory linear in T;
  short causal sequences on CPU in stripes of rows, each up to its last key. A
  `span` fades the keys of the window and not those beyond, as if these were
  chosen; that is computed with all T² logits, which are recomputed on the way
  back.

  Args:
    q: queries.
    k: keys.
    v: values.
    block_size: as in `dynamic_attention`, and so are all others.
    window: tokens.
    is_causal: whether tokens see no later ones.
    segment_ids: tokens see their own segment, and nothing a negative one.
    span: half width of the window in tokens.
    offset: distance to the middle of the window.
    ramp: tokens over which the window fades.
    implementation: as in `block_sparse_attention`; where there is a `span`,
      without effect.

  >>> x = jnp.ones((1, 8, 2, 4))
  >>> full_attention(
  ...   x, x, x, block_size=2, window=4, is_causal=True).shape
  (1, 8, 2, 4)
  """
  if span is not None:
    # Recomputed: a switch between levels makes room for what any of its
    # branches keeps for the way back, and this one would keep all weights.
    faded = functools.partial(
      _faded_attention, block_size, window, is_causal, ramp
    )
    return jax.checkpoint(faded)(q, k, v, segment_ids, span, offset)
  batch, time, kv_heads, _ = k.shape
  on_cpu = implementation is None and jax.default_backend() == "cpu"
  if on_cpu and is_causal and time <= _SHORT:
    return _striped_attention(q, k, v, segment_ids)
  everything = -(-time // block_size) * block_size
  return kernel.attend(
    q,
    k,
    v,
    jnp.full((batch, time, kv_heads, 0), -1, jnp.int32),
    kernel.make_layout(block_size, everything, is_causal, ramp),
    segment_ids=segment_ids,
    span=None,
    offset=None,
    scale=None,
    implementation=implementation,
  )


def _striped_attention(
  q: Array, k: Array, v: Array, segment_ids: Array | None
) -> Array:
  """Returns causal attention, rows by rows, all heads of a stripe at once."""
  batch, time, heads, size = q.shape
  q = (q * size**-0.5).reshape(batch, time, k.shape[2], -1, size)
  q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H]
  read = []
  for first in range(0, time, _STRIPE):
    last = min(first + _STRIPE, time)
    seen = jnp.arange(first, last)[:, None] >= jnp.arange(last)[None]
    seen = seen[None, None, None]
    if segment_ids is not None:
      rows, keys = segment_ids[:, first:last, None], segment_ids[:, None, :last]
      seen &= ((rows == keys) & (rows >= 0))[:, None, None]
    logits = jnp.einsum(
      "bkgqh,bkth->bkgqt", q[:, :, :, first:last], k[:, :, :last],
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    logits = jnp.where(seen, logits, _LEAST)
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    p = jnp.exp(logits - peak)
    # Divided last, where there are H numbers a row and not as many as keys.
    total = p.sum(-1, keepdims=True)
    found = jnp.einsum(
      "bkgqt,bkth->bkgqh", p.astype(v.dtype), v[:, :, :last],
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    read.append((found / total).astype(q.dtype))
  out = jnp.concatenate(read, axis=3).transpose(0, 3, 1, 2, 4)
  out = out.reshape(batch, time, heads, size)
  if segment_ids is None:
    return out
  return jnp.where((segment_ids >= 0)[:, :, None, None], out, 0)


def _faded_attention(
  block_size, window, is_causal, ramp, q, k, v, segment_ids, span, offset
):
  """Returns attention to all keys, those of the window weighted."""
  time = jnp.arange(q.shape[1])
  weight = window_weights(time, time, block_size, window, span, offset, ramp)
  bias = jnp.log(jnp.where(weight > 0, weight, 1)).astype(q.dtype)
  mask = weight > 0
  if segment_ids is not None:
    # A padded token may see padding: a softmax over nothing is not finite in
    # every implementation. What it saw is taken away below.
    mask &= segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
  read = jax.nn.dot_product_attention(
    q, k, v, bias=bias, mask=mask, is_causal=is_causal
  )
  if segment_ids is None:
    return read
  return jnp.where((segment_ids >= 0)[:, :, None, None], read, 0)


def window_weights(
  rows: Int[Array, "T"],
  keys: Int[Array, "S"],
  block_size: int,
  window: int,
  span: Float[Array, "B T N"],
  offset: Float[Array, "B T N"] | None,
  ramp: int | float,
) -> Float[Array, "B N T S"]:
  """Returns the weight of every key, 1 outside of the window.

  Args:
    rows: places of tokens in the sequence.
    keys: places of keys.
    block_size: as in `full_attention`, and so are all others.
    window: tokens.
    span: half width of the window in tokens.
    offset: distance to the middle of the window.
    ramp: tokens over which the window fades.
  """
  blocks = (rows // block_size)[:, None], (keys // block_size)[None]
  behind = jnp.abs(blocks[0] - blocks[1])
  faded = (behind > 0) & (behind < window // block_size)
  by_head = lambda x: x.swapaxes(1, 2)[..., None]
  offset = None if offset is None else by_head(offset)
  distance = (rows[:, None] - keys[None])[None, None]
  soft = window_weight(distance, by_head(span), offset, ramp)
  return jnp.where(faded[None, None], soft, 1)
