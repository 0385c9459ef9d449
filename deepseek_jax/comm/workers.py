"""Workers that step for themselves between exchanges."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.comm.exchange import finite
from deepseek_jax.comm.state import find
from deepseek_jax.core.typing import PyTree


class Workers(NamedTuple):
  """Parameters and optimizer of one worker, inside `PerDevice`."""

  params: PyTree  # [1, ...]
  inner: optax.OptState  # [1, ...]


def start(inner: optax.GradientTransformation, params: PyTree) -> Workers:
  """Returns a worker that has done nothing."""
  return stacked(Workers(params, inner.init(params)))


def stacked(tree: PyTree) -> Any:
  """Returns the arrays with a leading axis of one."""
  return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def single(tree: PyTree) -> Any:
  """Returns the arrays without it."""
  return jax.tree.map(lambda x: x[0], tree)


def step(
  inner: optax.GradientTransformationExtraArgs,
  worker: Workers,
  grads: PyTree,
  works: jax.Array | bool,
  extra_args: dict[str, Any],
) -> Workers:
  """Returns a worker after a step of its own, if it works."""
  params, state = single(worker)
  grads = jax.tree.map(finite, grads)
  updates, moved = inner.update(grads, state, params, **extra_args)
  after = Workers(optax.apply_updates(params, updates), moved)
  if works is not True:
    after = jax.tree.map(
      lambda new, old: jnp.where(works, new, old), after, Workers(params, state)
    )
  return stacked(after)


def local_params(state: PyTree, params: PyTree) -> PyTree:
  """Returns the parameters at which a device takes its gradient.

  Between exchanges of `diloco` and `asynchronous` those of this device, which
  are part of their state; of other transforms `params`. Call it inside
  `jax.shard_map`.

  >>> local_params(optax.adam(1e-3).init(jnp.ones(2)), jnp.ones(2))
  Array([1., 1.], dtype=float32)

  Args:
    state: Of any transform.
    params: What is equal on all devices.
  """
  found = find(state, Workers)
  return single(found[0].params) if found else params
