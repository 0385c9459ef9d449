"""State of exchanges on another number of devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from deepseek_jax.comm.state import ExchangeState, PerDevice
from deepseek_jax.core.typing import PyTree


def adapt(state: PyTree, like: PyTree) -> PyTree:
  """Returns a state, made for some devices, for as many as `like` is for.

  What every device kept for itself becomes, on each of the new ones, the mean
  of what there was: so the workers of `diloco` go on from where they were on
  average, and errors that fit lose nothing. Errors in chunks, of which there
  is one for each device, do not fit: they are forgotten, which costs what one
  exchange has lost, and the exchange begins anew with its warm-up.

  >>> state = PerDevice(jnp.array([[1.0], [3.0]]))
  >>> print(adapt(state, PerDevice(jnp.zeros((4, 1)))).arrays.ravel())
  [2. 2. 2. 2.]

  Args:
    state: Of any transforms, with exchanges among them.
    like: The shapes of the state that is wanted.
  """

  def convert(node, wanted):
    if isinstance(node, PerDevice):
      return jax.tree.map(_convert, node, wanted)
    if not isinstance(node, ExchangeState):
      return node
    fits = jax.tree.map(_fits, node.errors, wanted.errors)
    count = node.count
    if not all(jax.tree.leaves(fits)):
      count = jnp.zeros_like(count)
    errors = jax.tree.map(_convert, node.errors, wanted.errors)
    return node._replace(count=count, errors=errors)

  kinds = PerDevice | ExchangeState
  return jax.tree.map(
    convert, state, like, is_leaf=lambda x: isinstance(x, kinds)
  )


def _fits(array: Array, wanted: Array) -> bool:
  return array.shape[1:] == wanted.shape[1:]


def _convert(array: Array, wanted: Array) -> Array:
  if array.shape == wanted.shape:
    return array
  if not _fits(array, wanted):
    return jnp.zeros(wanted.shape, wanted.dtype)
  floating = jnp.issubdtype(array.dtype, jnp.floating)
  one = jnp.mean(array, 0) if floating else array[0]
  return jnp.broadcast_to(one, wanted.shape).astype(wanted.dtype)
