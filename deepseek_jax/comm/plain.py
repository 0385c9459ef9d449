"""Gradient averages that are not compressed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from deepseek_jax.comm.axes import Axes, AxisName
from deepseek_jax.comm.exchange import leaves, mean, plain_bytes
from deepseek_jax.comm.state import ExchangeState
from deepseek_jax.core.typing import PyTree


class PlainState(NamedTuple):
  """State of `float_all_reduce`."""

  sent_bytes: Float32[Array, ""]  # by a device, in the latest


def float_all_reduce(
  axis_name: AxisName,
) -> optax.GradientTransformationExtraArgs:
  """Averages gradients over devices as they are, in one all-reduce.

  What others are compared with. It reports its bytes as they do.

  Args:
    axis_name: The mesh axis, or axes, over which the batch is split.

  Returns:
    An `optax.GradientTransformationExtraArgs`, for use inside `jax.shard_map`.

  Raises:
    ValueError: At `update`, outside of a `shard_map` with these axes.
  """
  axes = Axes.of(axis_name)

  def init_fn(params: PyTree) -> Any:
    leaves(axes, None, params)  # As every exchange, it refuses some.
    return PlainState(jnp.zeros((), jnp.float32))

  def update_fn(
    updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, Any]:
    del state, params, extra_args
    grads, structure = jax.tree.flatten(updates)
    parts = leaves(axes, None, updates)
    found = [mean(x, part, axes) for x, part in zip(grads, parts, strict=True)]
    sent = sum(plain_bytes(part, axes) for part in parts)
    return structure.unflatten(found), PlainState(
      jnp.asarray(sent, jnp.float32)
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sum_sent(state: Any) -> Array:
  """Returns what the exchanges in a state sent in their latest."""
  kinds = ExchangeState | PlainState
  is_one = lambda x: isinstance(x, kinds)
  nodes = jax.tree.leaves(state, is_leaf=is_one)
  sent = [x.sent_bytes for x in nodes if is_one(x)]
  return jnp.asarray(sum(sent), jnp.float32)
