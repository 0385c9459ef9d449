"""Arguments that are what they should be, or an error that says which is not.

Each check takes the arguments by name, so that the message can say
`b1 must be in [0, 1), got b1=1.5.`
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np


def is_number(value: Any) -> TypeGuard[int | float]:
  """Says whether a Python or NumPy number was given, that can be checked now.

  `optax.inject_hyperparams` hands arrays, perhaps traced, to a factory: their
  range cannot be checked while tracing.
  """
  kinds = (int, float, np.integer, np.floating)
  return isinstance(value, kinds) and not isinstance(value, bool)


def require_in(interval: str, /, **arguments: Any) -> None:
  """Refuses what is no number of an interval.

  Args:
    interval: As one writes it: "[0, 1)", "(0, inf)".
    **arguments: What was given. Arrays pass: they are injected hyperparameters,
      whose values may not be known now.

  Raises:
    ValueError: At the first that lies outside, is NaN or no number.

  >>> require_in("[0, 1)", b1=0.9, b2=1.5)
  Traceback (most recent call last):
  ...
  ValueError: b2 must be in [0, 1), got b2=1.5.
  """
  low, high = map(float, interval[1:-1].split(","))

  def holds(x):
    above = x >= low if interval[0] == "[" else x > low
    return above and (x <= high if interval[-1] == "]" else x < high)

  _require(f"be in {interval}", holds, arguments)


def require_whole(least: int, /, **arguments: Any) -> None:
  """Refuses what is no whole number of at least `least`.

  Args:
    least: The least value.
    **arguments: What was given. 2.0 is whole, and arrays pass.

  Raises:
    ValueError: At the first that is too small or not whole.

  >>> require_whole(1, every=2.5)
  Traceback (most recent call last):
  ...
  ValueError: every must be a whole number, at least 1, got every=2.5.
  """
  holds = lambda x: x >= least and x % 1 == 0
  _require(f"be a whole number, at least {least}", holds, arguments)


def require_static(least: int, /, **arguments: Any) -> None:
  """Refuses what is no integer of at least `least`, floats and arrays too.

  For numbers that shape the program, such as the length of a loop.

  Raises:
    ValueError: At the first that is too small or no integer.

  >>> require_static(1, num_processes=0)
  Traceback (most recent call last):
  ...
  ValueError: num_processes must be an integer, at least 1, got num_processes=0.
  """
  for name, value in arguments.items():
    is_integer = is_number(value) and isinstance(value, int | np.integer)
    if not (is_integer and value >= least):
      # What `optax.inject_hyperparams` makes of a number.
      injected = isinstance(value, jax.Array | np.ndarray | float)
      hint = " Under optax.inject_hyperparams it belongs to static_args."
      raise ValueError(
        f"{name} must be an integer, at least {least}, got {name}={value!r}."
        f"{hint if injected else ''}"
      )


def require_one_of(choices: Sequence[Any], /, **arguments: Any) -> None:
  """Refuses what is none of a few choices.

  >>> require_one_of(("row", "full"), variance=2)
  Traceback (most recent call last):
  ...
  ValueError: variance must be one of ('row', 'full'), got variance=2.
  """
  for name, value in arguments.items():
    if value not in choices:
      raise ValueError(
        f"{name} must be one of {choices}, got {name}={value!r}."
      )


def require_floating(**dtypes: Any) -> None:
  """Refuses what is no floating dtype; None, which means a default, passes.

  >>> require_floating(mu_dtype="int8")
  Traceback (most recent call last):
  ...
  ValueError: mu_dtype must be a floating dtype or None, got mu_dtype='int8'.
  """
  for name, dtype in dtypes.items():
    if not (dtype is None or _is_floating(dtype)):
      raise ValueError(
        f"{name} must be a floating dtype or None, got {name}={dtype!r}."
      )


def _require(
  rule: str, holds: Callable[[Any], bool], arguments: Mapping[str, Any]
) -> None:
  for name, value in arguments.items():
    is_array = isinstance(value, jax.Array | np.ndarray)
    if not (is_array or (is_number(value) and holds(value))):
      raise ValueError(f"{name} must {rule}, got {name}={value!r}.")


def _is_floating(dtype: Any) -> bool:
  try:
    return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:
    return False
