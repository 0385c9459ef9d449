"""The classifier of experiments/digits.py by hand: functions over a dict.

What a person would write who wants nothing but speed. It reads the parameter
tree of `models.Classifier`, so that both hold the same arrays; the benchmark
`train_step.py` first holds the two to equal logits.
"""

import jax
import jax.numpy as jnp


def dropout(x, rate, key):
  """Zeroes a fraction of the elements; none without a key."""
  if key is None:
    return x
  return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x, 0) / (
    1 - rate
  )


def linear(params, x):
  """Returns x W + b."""
  bias = params["bias"]
  return x @ params["kernel"] + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def lstm(params, tokens):
  """Returns the hidden states [T, B, H] of tokens [T, B, D]."""
  gates = tokens @ params["input_kernel"]

  def step(state, gates):
    hidden, cell = state
    gates = gates + params["bias"][None] + hidden @ params["recurrent_kernel"]
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return (hidden, cell), hidden

  zero = jnp.zeros((tokens.shape[1], params["recurrent_kernel"].shape[0]))
  return jax.lax.scan(step, (zero, zero), gates)[1]


def attention(params, tokens, heads):
  """Returns multi-head self-attention over tokens [B, T, D]."""
  shape = (*tokens.shape[:2], heads, -1)
  read = jax.nn.dot_product_attention(
    *(
      linear(params[n], tokens).reshape(shape)
      for n in ("query", "key", "value")
    )
  )
  return linear(params["out"], read.reshape(*tokens.shape[:2], -1))


def layer_norm(params, x):
  """Normalizes the last axis."""
  mean = x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
  scale, bias = params["scale"][None, None], params["bias"][None, None]
  return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * scale + bias


def stage(params, x):
  """Returns convolution, ReLU and 2 x 2 max pooling of x [B, H, W, C]."""
  params = params["convolution"]
  x = jax.lax.conv_general_dilated(
    x,
    params["kernel"],
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  x = jax.nn.relu(x + params["bias"][None, None, None])
  return jnp.maximum(
    jnp.maximum(x[:, ::2, ::2], x[:, ::2, 1::2]),
    jnp.maximum(x[:, 1::2, ::2], x[:, 1::2, 1::2]),
  )


def logits(params, images, *, heads, rate, key=None):
  """Returns the digits experiment's logits; drops nothing without a key."""
  keys = [None] * 5 if key is None else jax.random.split(key, 5)
  x = images
  for i in range(2):
    x = dropout(stage(params["inputs"]["stages"][i], x), rate, keys[i])
  x = x.reshape(len(x), -1, x.shape[-1])
  x = lstm(params["features"]["recurrent"][0], x.swapaxes(0, 1)).swapaxes(0, 1)
  x = dropout(x, rate, keys[2])
  block = params["features"]["attention"]
  read = attention(block["attention"], layer_norm(block["norm"], x), heads)
  x = x + dropout(read, rate, keys[3])
  return linear(params["decision"]["linear"], dropout(x[:, -1], rate, keys[4]))
