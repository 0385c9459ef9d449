"""Activation functions by name."""

import difflib
from collections.abc import Callable
from types import MappingProxyType

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]
"""A function applied to every element of an array."""


def _identity(x: jax.Array) -> jax.Array:
  return x


ACTIVATIONS = MappingProxyType(
  {
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "identity": _identity,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "squareplus": jax.nn.squareplus,
    "tanh": jnp.tanh,
  }
)
"""The names that `activation` knows; read-only."""


def activation(name: str | Activation) -> Activation:
  """Returns the activation function of a name.

  A callable is returned as it is, so every argument called `activation` in this
  library takes either. The callable must hold no parameters: a module given to
  several layers would be shared between them.

  >>> activation("relu")(jnp.array([-1.0, 2.0])).tolist()
  [0.0, 2.0]

  Args:
    name: one of `ACTIVATIONS`, or a function of one array.

  Returns:
    A function that maps an array to an array of the same shape and dtype.

  Raises:
    ValueError: the name is unknown; the message gives the nearest ones.
  """
  if callable(name):
    return name
  if name in ACTIVATIONS:
    return ACTIVATIONS[name]
  near = difflib.get_close_matches(name.lower(), ACTIVATIONS, n=3, cutoff=0.5)
  hint = f"nearest: {', '.join(near)}" if near else "no name is near"
  raise ValueError(
    f"activation must be a function or one of {', '.join(ACTIVATIONS)}, "
    f"got activation={name!r} ({hint})."
  )
