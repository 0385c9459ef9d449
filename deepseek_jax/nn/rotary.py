"""Positions as rotations of queries and keys."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate_by_position(
  x: Float[Array, "B T N H"],
  positions: Int[Array, "#B T"],
  base: int | float = 10_000.0,
) -> Float[Array, "B T N H"]:
  """Turns vectors by angles that grow with their position.

  Element i and element i + H/2 are the two parts of a complex number, which is
  multiplied by exp(i·p·base^(-2i/H)) at position p. So q·k depends on the
  distance of query and key alone: adding a number to all positions changes
  nothing. Use it on queries and keys, never on values, nor on keys that were
  turned before they went into a cache.

  Args:
    x: queries or keys; H is even.
    positions: of the tokens, from any number on. Where several sequences share
      a row, they may count on or start anew: distances within one are equal.
    base: the longest wave has about 2π·base tokens; at least 1.

  Returns:
    The turned vectors, as long as before, in the type of x. Angles are float32.

  Raises:
    ValueError: H is odd.

  >>> x = jnp.ones((1, 2, 1, 2))
  >>> print(rotate_by_position(x, jnp.array([[0, 1]]))[0, 0, 0])
  [1. 1.]

  References:
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
    2021, https://arxiv.org/abs/2104.09864
  """
  size = x.shape[-1]
  check_rotary(size, base)
  frequency = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
  angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
  angle = angle[:, :, None]  # One for all heads.
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  real, imaginary = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def check_rotary(head_dim: int, base: int | float) -> None:
  """Raises `ValueError` unless vectors can be turned."""
  if head_dim % 2:
    raise ValueError(
      "head_dim must be even for rotary positions, which turn pairs of "
      f"elements, got {head_dim=}; use rotary=False for none."
    )
  if not base >= 1:
    raise ValueError(f"rotary_base must be at least 1, got rotary_base={base}.")
