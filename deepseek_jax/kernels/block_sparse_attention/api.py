"""Attention to a window and to chosen blocks: one call for all devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention import xla
from deepseek_jax.kernels.block_sparse_attention.checks import (
  check_flag,
  check_heads,
  check_rows,
  check_sizes,
)
from deepseek_jax.kernels.block_sparse_attention.implementations import (
  Implementation,
  choose,
  reasons,
  run,
)
from deepseek_jax.kernels.block_sparse_attention.problem import (
  Layout,
  Tokens,
  usable_ids,
)


def block_sparse_attention(
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
  implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
  """Attention of every token to a window and to blocks that it names.

  One softmax, exact over the union of both sets of keys: y = softmax(q kᵀ ·
  scale) v, for each of N query heads; N / K of them share keys and choices.

  * The window holds `window // block_size` blocks: the own one and those before
    it, and as many after it if not causal. So a causal token sees between
    `window - block_size + 1` and `window` keys. With `span` it fades: outside
    of the own block, a key at distance d (query minus key, in tokens) counts
    with weight clip(1 + (span - |d - offset|) / ramp, 0, 1).
  * Of the named blocks a token sees all keys. Blocks of its window, of its
    future if causal, named twice or outside of the sequence add nothing.

  The cost is that of `window` + R·`block_size` keys a token, whatever T.
  `nn.dynamic_attention` chooses the blocks by hashing. For short sequences
  full attention is faster: `experiments/results/attention.json` has the times.

  Args:
    q: queries of N heads.
    k: keys of K heads; K divides N.
    v: values of K heads.
    block_ids: R block numbers for every token and key-value head, in any
      order; a number outside of the sequence, such as -1, stands for none.
    block_size: keys in a block, at least 1; 64 or 128 suit all devices.
    window: a multiple of `block_size`.
    is_causal: whether tokens see no later ones.
    segment_ids: tokens see each other only if they have the same number; a
      negative one marks padding, which sees nothing and is not seen.
    span: half width of the window in tokens, per token and head; at least 0.
    offset: distance from the query to the middle of the window; 0 if None.
    ramp: tokens over which the window fades, above 0.
    scale: of the logits; 1 / √H if None.
    implementation: "xla" (everywhere), "tpu" (Pallas) or "gpu" (Mosaic GPU,
      Hopper); None takes the fastest that can run here, see `why_not`.

  Returns:
    Outputs in the type of q. Where a token sees no key they are 0.

  Raises:
    ValueError: shapes or types do not fit, or a number is out of its range.
    NotImplementedError: the named implementation cannot do this here.

  >>> x = jnp.ones((1, 8, 2, 4))
  >>> ids = jnp.zeros((1, 8, 2, 1), int)
  >>> block_sparse_attention(x, x, x, ids, block_size=2, window=4).shape
  (1, 8, 2, 4)

  References:
    Yuan et al., "Native Sparse Attention", 2025,
    https://arxiv.org/abs/2502.11089 (blocks chosen per token and group)
    Sukhbaatar et al., "Adaptive Attention Span in Transformers", 2019,
    https://arxiv.org/abs/1905.07799 (the window)
    Dao et al., "FlashAttention", 2022, https://arxiv.org/abs/2205.14135
  """
  layout = make_layout(block_size, window, is_causal, ramp)
  check_heads(q, k, v)
  shape = (*q.shape[:2], k.shape[2], -1)
  check_rows("block_ids", block_ids, shape, jnp.integer)
  by_head = jnp.moveaxis(block_ids, 2, 1)
  ids = usable_ids(by_head, layout, -(-q.shape[1] // block_size))
  ids = jnp.moveaxis(ids, 1, 2)
  return attend(
    q, k, v, ids, layout, segment_ids=segment_ids, span=span, offset=offset,
    scale=scale, implementation=implementation,
  )  # fmt: skip


def why_not(
  q: Array | jax.ShapeDtypeStruct,
  k: Array | jax.ShapeDtypeStruct,
  *,
  block_size: int = 64,
  window: int = 256,
  is_causal: bool = True,
) -> dict[str, str | None]:
  """Says for every implementation why it cannot run here; None if it can.

  `implementation=None` takes the first that can, in this order.

  Args:
    q: queries [B, T, N, H], or their `jax.ShapeDtypeStruct`.
    k: keys [B, T, K, H], likewise.
    block_size: as in `block_sparse_attention`.
    window: as in `block_sparse_attention`.
    is_causal: as in `block_sparse_attention`.

  >>> x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
  >>> why_not(x, x)["xla"] is None
  True
  """
  layout = make_layout(block_size, window, is_causal, 1.0)
  tokens = lambda q, k: _tokens(q, k, k, layout, None, None, None)
  return reasons(layout, jax.eval_shape(tokens, q, k))


def make_layout(
  block_size: int, window: int, is_causal: bool, ramp: int | float
) -> Layout:
  """Returns the layout of checked numbers."""
  check_sizes(block_size, window)
  check_flag(is_causal=is_causal)
  if not ramp > 0:
    raise ValueError(f"ramp must be above 0, got {ramp=}.")
  return Layout(
    block=block_size,
    reach=window // block_size - 1,
    is_causal=is_causal,
    ramp=ramp,
  )


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  ids: Int[Array, "B T K R"],
  layout: Layout,
  *,
  segment_ids: Int[Array, "B T"] | None,
  span: Float[Array, "B T N"] | None,
  offset: Float[Array, "B T N"] | None,
  scale: float | None,
  implementation: Implementation | None,
) -> Float[Array, "B T N H"]:
  """`block_sparse_attention` for `usable_ids`."""
  check_heads(q, k, v)
  q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
  rows = q.shape[:3]
  check_rows("segment_ids", segment_ids, rows[:2], jnp.integer)
  check_rows("span", span, rows, jnp.floating)
  check_rows("offset", offset, rows, jnp.floating)
  if offset is not None and span is None:
    raise ValueError(
      "offset needs span, as it moves a window that fades, got span=None."
    )
  scale = q.shape[3] ** -0.5 if scale is None else scale
  layout = dataclasses.replace(layout, scale=scale)
  tokens = _tokens(q, k, v, layout, segment_ids, span, offset)
  time = q.shape[1]
  ids = _pad_time(ids, tokens.k.shape[1] - time, -1)
  name = choose(layout, tokens, implementation)
  out = run(name, layout, tokens, ids)
  return out.reshape(out.shape[0], -1, *q.shape[2:])[:, :time]


def _tokens(q, k, v, layout: Layout, segment_ids, span, offset) -> Tokens:
  """Returns tokens, so many that they are whole blocks and equal steps."""
  time, kv_heads = q.shape[1], k.shape[2]
  more = xla.padded_blocks(-(-time // layout.block)) * layout.block - time
  if more and segment_ids is None and not layout.is_causal:
    segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
  pad = lambda x, fill=0: _pad_time(x, more, fill)
  if segment_ids is not None:
    shape = (*q.shape[:2], kv_heads)
    segment_ids = jnp.asarray(segment_ids, jnp.int32)  # Padding is negative.
    segment_ids = jnp.broadcast_to(segment_ids[..., None], shape)
  return Tokens(
    q=_grouped(pad(q), kv_heads),
    k=pad(k),
    v=pad(v),
    span=_grouped(pad(span), kv_heads),
    offset=_grouped(pad(offset), kv_heads),
    segments=pad(segment_ids, -1),
  )


def _pad_time(x: Array | None, more: int, fill: int) -> Any:
  if x is None or not more:
    return x
  widths = ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2)
  return jnp.pad(x, widths, constant_values=fill)


def _grouped(x: Array | None, kv_heads: int) -> Any:
  """[B, T, N, ...] to [B, T, K, G, ...]."""
  if x is None:
    return None
  return x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:])
