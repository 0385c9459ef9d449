"""Which experts a token goes to, and with what weight."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

Gate = Literal["sigmoid", "softmax"]
"""How the scores of experts are made of logits: each by itself, or together."""

_LEAST = 1e-20  # Of a sum of scores: all of them may be zero.


class Routing(NamedTuple):
  """Where tokens go.

  Attributes:
    chosen: the experts of every token, the best first; none twice.
    weights: of what they return; those of a token add up to 1 (with a single
      expert a token, its score).
    shares: scores of all experts, of every token in sum 1.
    counts: choices by expert, of all tokens on all devices.
  """

  chosen: Int32[Array, "*B k"]
  weights: Float32[Array, "*B k"]
  shares: Float32[Array, "*B E"]
  counts: Int32[Array, " E"]


def route(
  logits: Float[Array, "*B E"],
  top_k: int,
  *,
  gate: Gate = "sigmoid",
  bias: Float32[Array, " E"] | None = None,
) -> Routing:
  """Returns the `top_k` experts of every token, and their weights.

  The experts with the largest scores + bias are chosen; the bias has no part in
  the weights, and no gradient. Where one expert is chosen, its weight is its
  score: divided by itself it would be 1, and the logits never learned.

  >>> print(route(jnp.array([[0.0, 2.0, 1.0]]), 2, gate="softmax").chosen)
  [[1 2]]

  Args:
    logits: of E experts; the computation is in float32.
    top_k: experts of a token, from 1 to E.
    gate: "sigmoid", where experts do not compete for a score, or "softmax".
    bias: added to the scores for the choice alone; nothing if None.

  References:
    DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024,
    https://arxiv.org/abs/2412.19437 (the sigmoid and the bias)
  """
  logits = logits.astype(jnp.float32)
  squash = jax.nn.sigmoid if gate == "sigmoid" else jax.nn.softmax
  scores = squash(logits)
  wanted = scores
  if bias is not None:
    wanted = wanted + bias.reshape((1,) * (logits.ndim - 1) + bias.shape)
  chosen = _largest(jax.lax.stop_gradient(wanted), top_k)
  is_chosen = jax.nn.one_hot(chosen, logits.shape[-1], dtype=bool)
  weights = jnp.where(is_chosen, scores[..., None, :], 0).sum(-1)
  if top_k > 1:
    weights = weights / (weights.sum(-1, keepdims=True) + _LEAST)
  return Routing(
    chosen=chosen,
    weights=weights,
    shares=scores / (scores.sum(-1, keepdims=True) + _LEAST),
    counts=is_chosen.sum(tuple(range(chosen.ndim)), dtype=jnp.int32),
  )


def _largest(scores: Array, count: int) -> Int32[Array, "*B k"]:
  """Returns the places of the largest numbers, of equal ones the first.

  Not `jax.lax.top_k`, before which XLA gathers rows that are cut over devices.
  """
  chosen = []
  for _ in range(count):
    best = jnp.argmax(scores, -1).astype(jnp.int32)
    chosen.append(best)
    is_best = jax.nn.one_hot(best, scores.shape[-1], dtype=bool)
    scores = jnp.where(is_best, -jnp.inf, scores)
  return jnp.stack(chosen, -1)
