"""The language model by hand: functions over a dict.

What a person would write who wants nothing but speed. It reads the parameter
tree of `models.LanguageModel`, so that both hold the same arrays; the benchmark
`language_model.py` first holds the two to equal losses.
"""

import math

import jax
import jax.numpy as jnp
import optax


def rms_norm(params, x):
  """Returns x over its root mean square, scaled."""
  mean = jnp.square(x).mean(-1, keepdims=True)
  return x * jax.lax.rsqrt(mean + 1e-6) * params["scale"][None, None]


def rotate(x):
  """Turns the halves of x [B, T, N, H] against each other by position."""
  half = x.shape[-1] // 2
  frequency = 10_000.0 ** (-jnp.arange(half) / half)
  angle = jnp.arange(x.shape[1])[:, None] * frequency[None]
  cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def library_attention(q, k, v, same):
  """Returns what JAX's own attention reads; `same` [B, 1, T, T] or None."""
  return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True)


def softmax_attention(q, k, v, same):
  """Returns the same from two products and a softmax."""
  _, time, _, size = q.shape
  seen = jnp.tril(jnp.ones((time, time), bool))[None, None]
  seen = seen if same is None else seen & same
  logits = jnp.einsum("bqnh,bknh->bnqk", q * size**-0.5, k)
  p = jax.nn.softmax(jnp.where(seen, logits, -1e30))
  return jnp.einsum("bnqk,bknh->bqnh", p, v)


def layer(params, x, same, heads, attend):
  """Returns x + attention(norm(x)), then x + feed-forward(norm(x))."""
  read = params["attention"]
  normed = rms_norm(params["attention_norm"], x)
  q, k, v = (
    (normed @ read[name]["kernel"]).reshape(*x.shape[:2], heads, -1)
    for name in ("query", "key", "value")
  )
  found = attend(rotate(q), rotate(k), v, same)
  x = x + found.reshape(*x.shape[:2], -1) @ read["out"]["kernel"]
  think = params["feed_forward"]
  normed = rms_norm(params["feed_forward_norm"], x)
  gate = jax.nn.silu(normed @ think["gate"]["kernel"])
  inward = normed @ think["inward"].T  # A row for each unit.
  return x + (gate * inward) @ think["outward"]["kernel"]


def logits(params, tokens, *, heads, separator, attend):
  """Returns for each token the logits of the one after it."""
  table = params["embedding"]["embedding"]
  same = None
  if separator is not None:
    number = jnp.cumsum(tokens == separator, axis=1)
    same = (number[:, :, None] == number[:, None, :])[:, None]
  x = table[tokens] * math.sqrt(table.shape[1])
  layers = params["layers"]["layers"]
  for i in range(len(layers)):
    x = layer(layers[i], x, same, heads, attend)
  return rms_norm(params["norm"], x) @ table.T


def cross_entropies(logits, targets):
  """Returns the cross entropy of every token, in nats."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def loss(params, tokens, targets, *, heads, separator, attend):
  """Returns the loss that a step takes the gradient of."""
  found = logits(
    params, tokens, heads=heads, separator=separator, attend=attend
  )
  return cross_entropies(found, targets).mean()
