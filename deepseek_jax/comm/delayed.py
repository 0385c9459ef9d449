"""Gradients that are exchanged while the next ones are computed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.comm.exchange import finite
from deepseek_jax.comm.state import PerDevice
from deepseek_jax.core.arguments import require_static
from deepseek_jax.core.typing import PyTree


class DelayedState(NamedTuple):
  """State of `delayed`."""

  pending: (
    PerDevice  # gradients not exchanged yet, [1, steps, ...], oldest first
  )
  exchange: optax.OptState


def delayed(
  exchange: optax.GradientTransformation, steps: int = 1
) -> optax.GradientTransformationExtraArgs:
  """Exchanges the gradient of some steps ago.

  Nothing waits for the exchange: it depends on no gradient of this step, so
  that XLA may run it beside forward and backward pass. The price is a gradient
  of parameters that are `steps` updates old, which costs little at small
  learning rates, and that many gradients in memory. The first `steps` updates
  are zero.

  >>> tx = optax.chain(delayed(int_all_reduce("data")), optax.adam(1e-3))

  Args:
    exchange: Such as `int_all_reduce`.
    steps: At least 1.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: If `steps` is no integer of at least 1.

  References:
    Mitliagkas et al., "Asynchrony begets momentum", 2016,
    https://arxiv.org/abs/1605.09774
  """
  require_static(1, steps=steps)
  exchange = optax.with_extra_args_support(exchange)

  def init_fn(params: PyTree) -> Any:
    inner = exchange.init(params)
    whole = jax.tree.map(jnp.zeros_like, params)
    stack = lambda x: jnp.zeros((1, steps, *x.shape), x.dtype)
    return DelayedState(PerDevice(jax.tree.map(stack, whole)), inner)

  def update_fn(
    updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, Any]:
    pending = state.pending.arrays
    oldest = jax.tree.map(lambda x: x[0, 0], pending)
    found, inner = exchange.update(oldest, state.exchange, params, **extra_args)
    push = lambda x, new: jnp.concatenate(
      [x[:, 1:], finite(new)[None, None]], 1
    )
    pending = jax.tree.map(push, pending, updates)
    return found, DelayedState(PerDevice(pending), inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
