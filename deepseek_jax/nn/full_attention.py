"""What dynamic attention gives when every block is read, in one product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention import window_weight


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
) -> Float[Array, "B T N H"]:
  """`dynamic_attention` with as many remote blocks as there are.

  Dense, with T² logits for every head: faster where most blocks would be
  chosen anyway, as in the first steps of training. Only a `span` makes it
  differ from `jax.nn.dot_product_attention`: it fades keys of the window, and
  not those beyond, as if these were chosen.

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

  >>> x = jnp.ones((1, 8, 2, 4))
  >>> full_attention(
  ...   x, x, x, block_size=2, window=4, is_causal=True).shape
  (1, 8, 2, 4)
  """
  mask = bias = None
  if segment_ids is not None:
    # A padded token may see padding: a softmax over nothing is not finite in
    # every implementation. What it saw is taken away below.
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
  if span is not None:
    weight = _window_weights(block_size, window, span, offset, ramp)
    bias = jnp.log(jnp.where(weight > 0, weight, 1)).astype(q.dtype)
    mask = weight > 0 if mask is None else mask & (weight > 0)
  read = jax.nn.dot_product_attention(
    q, k, v, bias=bias, mask=mask, is_causal=is_causal
  )
  if segment_ids is None:
    return read
  return jnp.where((segment_ids >= 0)[:, :, None, None], read, 0)


def _window_weights(block_size, window, span, offset, ramp):
  """Returns the weight of every key, 1 outside of the window."""
  time = jnp.arange(span.shape[1])
  block = time // block_size
  behind = jnp.abs(block[:, None] - block[None, :])
  faded = (behind > 0) & (behind < window // block_size)
  rows = lambda x: x.swapaxes(1, 2)[..., None]
  offset = None if offset is None else rows(offset)
  distance = (time[:, None] - time[None, :])[None, None]
  soft = window_weight(distance, rows(span), offset, ramp)
  return jnp.where(faded, soft, 1)
