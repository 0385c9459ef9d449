"""Activation functions by name."""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.nn.sparse_activations import (
  DynamicSparseReLU,
  LearnedSparseReLU,
  TargetSparseReLU,
)
from deepseek_jax.nn.sparse_relu import SparseReLU

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

SPARSE_ACTIVATIONS = MappingProxyType(
  {
    "dynamic_sparse_relu": DynamicSparseReLU,
    "learned_sparse_relu": LearnedSparseReLU,
    "sparse_relu": SparseReLU,
    "target_sparse_relu": TargetSparseReLU,
  }
)
"""The layers that `activation_layer` knows besides; read-only."""


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
  if name in SPARSE_ACTIVATIONS:
    raise ValueError(
      "activation must be a function here, as this layer has no room for the "
      f"state of one that adapts, got activation={name!r}."
    )
  raise _unknown(name, ACTIVATIONS)


def activation_layer(
  name: str | Activation,
  features: int | None = None,
  *,
  options: Mapping[str, Any] | None = None,
  rngs: nnx.Rngs | None = None,
) -> Activation:
  """Returns the activation of a name, be it a function or a layer with state.

  For layers that keep their activation as an attribute of their own: each call
  builds a new one, so no state is shared.

  >>> activation_layer("relu", 8).__name__
  'relu'
  >>> activation_layer("dynamic_sparse_relu", 8, options={"rate": 0.1}).rate
  0.1

  Args:
    name: one of `ACTIVATIONS` or `SPARSE_ACTIVATIONS`, or a callable, which is
      returned as it is.
    features: C, the size of the last axis of what it will be called with.
    options: arguments of the layer; a function takes none.
    rngs: unused so far; for layers that draw numbers.

  Raises:
    ValueError: the name is unknown, the message gives the nearest ones; or
      options for a function; or a value out of range.
  """
  del rngs
  if isinstance(name, str) and name in SPARSE_ACTIVATIONS:
    return SPARSE_ACTIVATIONS[name](features, **(options or {}))
  if options:
    raise ValueError(
      f"options must be empty for activation={name!r}, which is a function, "
      f"got {options=}."
    )
  if isinstance(name, str) and name not in ACTIVATIONS:
    raise _unknown(name, {**ACTIVATIONS, **SPARSE_ACTIVATIONS})
  return activation(name)


def _unknown(name: str, known: Mapping[str, object]) -> ValueError:
  near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
  hint = f"nearest: {', '.join(near)}" if near else "no name is near"
  return ValueError(
    f"activation must be a function or one of {', '.join(known)}, "
    f"got activation={name!r} ({hint})."
  )
