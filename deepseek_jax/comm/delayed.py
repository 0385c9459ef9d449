"""Gradients that are exchanged while the next ones are computed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.comm.axes import Axes, AxisName
from deepseek_jax.comm.exchange import finite, leaves
from deepseek_jax.comm.state import PerDevice
from deepseek_jax.core.arguments import require_static
from deepseek_jax.core.typing import Count, PyTree


class DelayedState(NamedTuple):
  """State of `delayed`."""

  count: Count  # shape=(), dtype=int32: steps done
  pending: PerDevice  # not exchanged yet, [1, steps, ...], oldest first
  exchange: optax.OptState


def delayed(
  exchange: optax.GradientTransformation,
  steps: int = 1,
  *,
  axis_name: AxisName = (),
  specs: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Exchanges the gradient of some steps ago.

  Nothing waits for the exchange: it depends on no gradient of this step, so
  that XLA may run it beside forward and backward pass. The price is a gradient
  of parameters that are `steps` updates old, which costs little at small
  learning rates, and that many gradients in memory. The first `steps` updates
  are zero.

  >>> from deepseek_jax.comm import int_all_reduce
  >>> tx = optax.chain(delayed(int_all_reduce("data")), optax.adam(1e-3))

  Args:
    exchange: Such as `int_all_reduce`.
    steps: At least 1.
    axis_name: As given to the exchange; needed where `specs` cut parameters.
    specs: As given to the exchange.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: If `steps` is no integer of at least 1, or `specs` come without
      `axis_name`; and as the exchange.

  References:
    Mitliagkas et al., "Asynchrony begets momentum", 2016,
    https://arxiv.org/abs/1605.09774
  """
  require_static(1, steps=steps)
  if specs is not None and not axis_name:
    raise ValueError(f"axis_name must come with specs, got {axis_name=}.")
  axes = Axes.of(axis_name, specs) if axis_name else None
  exchange = optax.with_extra_args_support(exchange)

  def init_fn(params: PyTree) -> Any:
    inner = exchange.init(params)
    arrays, structure = jax.tree.flatten(params)
    shapes = [x.shape for x in arrays]
    if axes is not None:
      shapes = [leaf.whole(axes) for leaf in leaves(axes, specs, params)]
    stacks = [
      jnp.zeros((1, steps, *shape), x.dtype)
      for x, shape in zip(arrays, shapes, strict=True)
    ]
    pending = PerDevice(structure.unflatten(stacks))
    return DelayedState(jnp.zeros((), jnp.int32), pending, inner)

  def update_fn(
    updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, Any]:
    pending = state.pending.arrays
    oldest = jax.tree.map(lambda x: x[0, 0], pending)
    found, inner = exchange.update(oldest, state.exchange, params, **extra_args)
    # Of the zeros that it is given at first it is to know nothing.
    begun = state.count >= steps
    inner = jax.tree.map(
      lambda new, old: jnp.where(begun, new, old), inner, state.exchange
    )
    push = lambda x, new: jnp.concatenate(
      [x[:, 1:], finite(new).astype(x.dtype)[None, None]], 1
    )
    pending = jax.tree.map(push, pending, updates)
    count = jnp.asarray(optax.safe_increment(state.count))
    return found, DelayedState(count, PerDevice(pending), inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
