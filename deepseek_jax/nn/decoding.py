"""Dynamic attention of one new token to a cache."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention import window_weight
from deepseek_jax.nn.cache import DecodeCache
from deepseek_jax.nn.lsh import hash_buckets

_FEW = 16  # Buckets that are cut out one by one.
_LEAST = float(jnp.finfo(jnp.float32).min)  # No such key, but open.


def choose_cached_blocks(
  q: Float[Array, "B N H"],
  cache: DecodeCache,
  projections: Float[Array, "rounds H bits"],
  *,
  window: int,
  num_remote: int,
) -> Int[Array, "B K R"]:
  """Returns what `choose_blocks` does for the last token of a cache.

  The same score from the same sums, but of one query: in every round of
  hashing it reads one centroid a block, 1 / `block_size` of the keys.

  Args:
    q: the query of the last token, scaled or not.
    cache: with this token in it.
    projections: that the cache was made with.
    window: tokens, as in `dynamic_attention`.
    num_remote: blocks to choose; fewer where the cache has fewer.
  """
  batch, kv_heads, _, _, blocks, size = cache.total.shape
  q = q.reshape(batch, kv_heads, -1, size)
  scores, count = _bucket_scores(q.astype(jnp.float32), cache, projections)
  scores = jnp.where(count > 0, scores / jnp.maximum(count, 1), _LEAST)
  own = (cache.length - 1) // cache.block_size
  is_open = own - jnp.arange(blocks) >= window // cache.block_size
  scores = jnp.where(is_open, scores.max((2, 3)), -jnp.inf)
  best, ids = jax.lax.top_k(scores, min(num_remote, blocks))
  return jnp.where(best > -jnp.inf, ids, -1)


def _bucket_scores(
  q: Array, cache: DecodeCache, projections: Array
) -> tuple[Array, Array]:
  """Returns q times the sum of its bucket in each block, and the bucket's size.

  Both are [B, K, G, rounds, blocks].
  """
  code = hash_buckets(q, projections)  # [B, K, G, rounds]
  blocks, size = cache.total.shape[-2:]
  if code.size <= _FEW:
    # Read where they lie, one product each: gathering copies them first.
    found = []
    for b, k, g, r in np.ndindex(code.shape):
      start = (b, k, r, code[b, k, g, r])
      cut = lambda x, start=start: jax.lax.dynamic_slice(
        x, start + (0,) * (x.ndim - 4), (1, 1, 1, 1, *x.shape[4:])
      )
      scores = cut(cache.total).reshape(blocks, size) @ q[b, k, g]
      found.append((scores, cut(cache.count).reshape(blocks)))
    stack = lambda rows: jnp.stack(rows).reshape(*code.shape, blocks)
    scores, count = map(stack, zip(*found, strict=True))
    return scores, count
  at = (
    jnp.arange(code.shape[0])[:, None, None, None],
    jnp.arange(code.shape[1])[None, :, None, None],
    jnp.arange(code.shape[3])[None, None, None, :],
    code,
  )
  # As products with a vector, for which nothing has to be transposed.
  total = cache.total[at].reshape(*code.shape[:3], -1, size)
  scores = jnp.matmul(total, q[..., None])[..., 0]
  return scores.reshape(*code.shape, blocks), cache.count[at]


def decode_attention(
  q: Float[Array, "B N H"],
  cache: DecodeCache,
  ids: Int[Array, "B K R"],
  *,
  window: int,
  span: Float[Array, " N"] | None = None,
  offset: Float[Array, " N"] | None = None,
  ramp: int | float = 32.0,
) -> Float[Array, "B N H"]:
  """Attention of the last token to its window and to chosen blocks.

  The last row of `block_sparse_attention`, at the cost of `window` and
  R·`block_size` keys, whatever the cache holds.

  Args:
    q: the query of the last token.
    cache: with this token in it.
    ids: blocks before the window, all different; -1 for none.
    window: tokens, as in `dynamic_attention`.
    span: half width of the window in tokens, per head.
    offset: distance to the middle of the window, per head.
    ramp: tokens over which the window fades.
  """
  batch, kv_heads, _, _, size = cache.k.shape
  q = (q * size**-0.5).reshape(batch, kv_heads, -1, size)
  near, weight = _near(cache, window, span, offset, ramp)
  far = _far(cache, ids)
  k, v = (jnp.concatenate(pair, axis=2) for pair in zip(near, far, strict=True))
  seen = jnp.repeat(ids >= 0, cache.block_size, axis=2)[:, :, None]
  over = lambda x: jnp.broadcast_to(x, (*q.shape[:3], x.shape[-1]))
  weight = jnp.concatenate([over(weight), over(seen.astype(jnp.float32))], -1)
  logits = _dot("bkgh,bkwh->bkgw", q, k)
  logits = jnp.where(weight > 0, logits, -jnp.inf)
  p = weight * jnp.exp(logits - logits.max(-1, keepdims=True))
  # At least its own token is seen: there is something to divide by.
  read = _dot("bkgw,bkwh->bkgh", p, v) / p.sum(-1, keepdims=True)
  return read.astype(q.dtype).reshape(batch, -1, size)


def decode_full_attention(
  q: Float[Array, "B N H"], cache: DecodeCache
) -> Float[Array, "B N H"]:
  """Attention of the last token to all tokens of a cache.

  Its cost grows with what the cache has room for.

  Args:
    q: the query of the last token.
    cache: with this token in it.
  """
  batch, kv_heads, _, _, size = cache.k.shape
  q = (q * size**-0.5).reshape(batch, kv_heads, -1, size)
  logits = _dot("bkgh,bkwh->bkgw", q, _flat(cache.k))
  seen = jnp.arange(cache.capacity) < cache.length
  logits = jnp.where(seen[None, None, None], logits, -jnp.inf)
  read = _dot("bkgw,bkwh->bkgh", jax.nn.softmax(logits), _flat(cache.v))
  return read.astype(q.dtype).reshape(batch, -1, size)


def _far(cache: DecodeCache, ids: Int[Array, "B K R"]):
  """Returns keys and values of chosen blocks, [B, K, R·J, H]."""
  batch, kv_heads, _ = ids.shape
  head = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
  fetch = lambda x: x[*head, jnp.maximum(ids, 0)]
  return _flat(fetch(cache.k)), _flat(fetch(cache.v))


def _near(cache: DecodeCache, window: int, span, offset, ramp):
  """Returns keys and values of the window, and weights [1, K, G, W]."""
  block = cache.block_size
  query = cache.length - 1
  own = query // block
  count = min(window // block, cache.k.shape[2])
  first = jnp.maximum(own - window // block + 1, 0)
  cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, count, axis=2)
  position = (first * block + jnp.arange(count * block))[None, None, None]
  weight = (position <= query).astype(jnp.float32)
  if span is not None:
    heads = lambda x: x.reshape(1, cache.k.shape[1], -1, 1)
    offset = None if offset is None else heads(offset)
    soft = window_weight(query - position, heads(span), offset, ramp)
    weight *= jnp.where(position // block == own, 1.0, soft)
  return (_flat(cut(cache.k)), _flat(cut(cache.v))), weight


def _flat(x: Array) -> Array:
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _dot(spec: str, a: Array, b: Array) -> Array:
  """Products in the type of the cache, sums in float32."""
  return jnp.einsum(
    spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32
  )
