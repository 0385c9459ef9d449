"""Keeps what is not finite out of an optimizer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import select_tree
from deepseek_jax.core.typing import Count, Flag, PyTree


class SkipNonFiniteState(NamedTuple):
  """State of `skip_non_finite`."""

  skipped: Count  # shape=(), dtype=int32: updates skipped so far
  inner_state: optax.OptState


def skip_non_finite(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Skips the whole update when the gradient is not finite.

  Where the squared norm of the gradient is NaN or infinite, the update is zero
  and the inner state stays as it was, counters included. So is a gradient so
  large (norm above 1.8e19) that its square overflows: it would fill a second
  moment with infinities that never leave it.

  Unlike `optax.apply_if_finite` it never gives in after a number of skips:
  watch `skipped` in the state and stop the run yourself. Inside
  `jax.shard_map` hand it gradients that are equal on all devices, or they may
  not agree on the skip.

  Args:
    inner: Any transform; extra arguments reach it.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  >>> tx = skip_non_finite(optax.adam(0.1))
  >>> state = tx.init(jnp.ones(2))
  >>> updates, state = tx.update(jnp.array([1.0, jnp.nan]), state)
  >>> print(updates, state.skipped)
  [0. 0.] 1
  """
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return SkipNonFiniteState(jnp.zeros((), jnp.int32), inner.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    usable = _has_finite_norm(updates)
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    new_state = SkipNonFiniteState(
      jnp.where(usable, state.skipped, optax.safe_increment(state.skipped)),
      select_tree(usable, inner_state, state.inner_state),
    )
    still = jax.tree.map(jnp.zeros_like, updates)
    return select_tree(usable, updates, still), new_state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _has_finite_norm(tree: PyTree) -> Flag:
  # In float32 whatever the leaves are: float16 squares overflow at 256.
  squares = [
    jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32)))
    for leaf in jax.tree.leaves(tree)
  ]
  return jnp.isfinite(sum(squares, start=jnp.zeros((), jnp.float32)))
