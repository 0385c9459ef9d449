"""Keeping experts equally busy: by a bias, or by a loss."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from deepseek_jax import parallel

Balance = Literal["bias", "auxiliary", "none"]
"""What sees to it that experts are chosen equally often."""


def moved_bias(
  bias: Float32[Array, " E"], counts: Int32[Array, " E"], rate: int | float
) -> Float32[Array, " E"]:
  """Returns the bias of a choice, raised for experts that were chosen seldom.

  bias + rate·sign(mean count - count), less its mean: only differences count,
  and in float32 the published rule's drift would drown them in a long training.

  >>> print(moved_bias(jnp.zeros(3), jnp.array([4, 1, 1]), 0.3).round(1))
  [-0.4  0.2  0.2]

  References:
    Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts", 2024, https://arxiv.org/abs/2408.15664
  """
  # Whole numbers: a mean in float32 may be off by more than nothing.
  surplus = counts.size * counts - counts.sum()
  moved = bias - rate * jnp.sign(surplus).astype(jnp.float32)
  return moved - moved.mean()


def balance_loss(
  shares: Float32[Array, "*B E"], counts: Int32[Array, " E"]
) -> Float32[Array, ""]:
  """Returns E·sum(share of the choices · mean share of the scores).

  It is 1 where all experts are equal. The gradient is that of the scores.

  >>> print(balance_loss(jnp.array([[0.75, 0.25]]), jnp.array([1, 0])))
  1.5

  References:
    Fedus et al., "Switch Transformers", 2021, https://arxiv.org/abs/2101.03961
  """
  busy = counts / jnp.maximum(counts.sum(), 1)
  mean = shares.mean(tuple(range(shares.ndim - 1)))
  return counts.size * jnp.sum(busy.astype(jnp.float32) * mean)


def with_loss(
  x: Float[Array, "..."], loss: Float32[Array, ""]
) -> Float[Array, "..."]:
  """Returns `x` as it is; on the way back, `loss` is part of the loss.

  For layers that have no way to the loss. What the loss is finally multiplied
  with does not reach it. In a pipeline it is that of a micro-batch, and divided
  by their number, see `parallel.batch_parts`. Where gradients of several
  micro-batches are summed by other means, call it within `parallel.cut_batch`.

  >>> x = jnp.array([2.0, 3.0])
  >>> print(jax.grad(lambda x: 3 * with_loss(x, (x**2).sum()).sum())(x))
  [7. 9.]
  """
  return _with_loss(x, loss / parallel.batch_parts())


@jax.custom_vjp
def _with_loss(x, loss):
  del loss
  return x


def _with_loss_forward(x, loss):
  return x, jnp.ones_like(loss)


def _with_loss_backward(one, grad):
  return grad, one


_with_loss.defvjp(_with_loss_forward, _with_loss_backward)
