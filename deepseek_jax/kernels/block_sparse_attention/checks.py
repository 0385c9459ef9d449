"""Errors for arguments that no implementation can take."""

from typing import Any

import jax.numpy as jnp


def check_sizes(block_size: int, window: int) -> None:
  """Raises `ValueError` unless a window is made of whole blocks."""
  for name, value in (("block_size", block_size), ("window", window)):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(
        f"{name} must be a whole number of at least 1, got {name}={value!r}."
      )
  if window % block_size:
    below = max(1, window // block_size) * block_size
    raise ValueError(
      "window must be a multiple of block_size, as it is made of whole blocks "
      f"(the own one included), got {window=} with {block_size=}; try "
      f"window={below} or {below + block_size}."
    )


def check_flag(**flags: Any) -> None:
  """Raises `ValueError` naming the first value that is not True or False."""
  for name, value in flags.items():
    if not isinstance(value, bool):
      raise ValueError(f"{name} must be True or False, got {name}={value!r}.")


def check_heads(q: Any, k: Any, v: Any) -> None:
  """Raises `ValueError` unless queries, keys and values fit together."""
  for name, x in (("q", q), ("k", k), ("v", v)):
    if jnp.ndim(x) != 4 or not all(jnp.shape(x)):
      raise ValueError(
        f"{name} must be [batch, time, heads, head size], none of them 0, got "
        f"shape {jnp.shape(x)}."
      )
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
      raise ValueError(f"{name} must be floating, got {jnp.result_type(x)}.")
  if k.shape != v.shape:
    raise ValueError(
      f"k and v must have one shape, got {k.shape} and {v.shape}."
    )
  if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
    raise ValueError(
      "q and k must agree in batch and head size, got shapes "
      f"{q.shape} and {k.shape}."
    )
  if q.shape[1] != k.shape[1]:
    raise ValueError(
      "q and k must have as many tokens (this is self-attention), got "
      f"{q.shape[1]} and {k.shape[1]}."
    )
  if q.shape[2] % k.shape[2]:
    raise ValueError(
      "the heads of k must divide those of q (grouped-query attention), got "
      f"{q.shape[2]} heads of q and {k.shape[2]} of k."
    )


def check_rows(name: str, x: Any, shape: tuple[int, ...], kind: Any) -> None:
  """Raises `ValueError` unless an argument has a shape and a kind of type.

  Args:
    name: of the argument.
    x: the argument; None passes.
    shape: that it must have; -1 stands for any size.
    kind: `jnp.integer` or `jnp.floating`.
  """
  if x is None:
    return
  fits = jnp.ndim(x) == len(shape) and all(
    size in (-1, found) for size, found in zip(shape, jnp.shape(x), strict=True)
  )
  if not fits:
    wanted = str(shape).replace("-1", "any")
    raise ValueError(f"{name} must have shape {wanted}, got {jnp.shape(x)}.")
  if not jnp.issubdtype(jnp.result_type(x), kind):
    raise ValueError(
      f"{name} must be {kind.__name__}, got {jnp.result_type(x)}."
    )
