"""Attention over a union of keys, from attention over its parts."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention(
  outputs: Float[Array, "parts *rows H"], lse: Float[Array, "parts *rows"]
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
  """Joins softmaxes over disjoint sets of keys into the one over their union.

  out = Σ exp(lse_i - lse)·out_i, with lse = log Σ exp(lse_i)

  Args:
    outputs: attention outputs over each set of keys.
    lse: log-sum-exp of the logits of each; -inf for a set without keys.

  Returns:
    Output and log-sum-exp over all keys; 0 and -inf where there are none.

  >>> parts = jnp.array([[[1.0]], [[3.0]]])
  >>> out, lse = merge_attention(parts, jnp.zeros((2, 1)))
  >>> print(out, jnp.exp(lse))
  [[2.]] [2.]
  """
  top = jnp.maximum(lse.max(0), jnp.finfo(lse.dtype).min)  # -inf - -inf is NaN.
  weights = jnp.exp(lse - top[None])
  total = weights.sum(0)
  shares = weights / jnp.where(total > 0, total, 1)[None]
  out = (shares[..., None] * outputs).sum(0).astype(outputs.dtype)
  return out, top + jnp.log(total)
