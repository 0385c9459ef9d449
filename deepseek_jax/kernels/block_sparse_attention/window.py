"""A window with soft edges, whose size and place can be learned."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def window_weight(
  distance: Num[Array, "..."],
  span: jax.typing.ArrayLike,
  offset: jax.typing.ArrayLike | None = None,
  ramp: jax.typing.ArrayLike = 32.0,
) -> Float[Array, "..."]:
  """Returns how much of a key a window lets through, from 0 to 1.

  clip(1 + (span - |distance - offset|) / ramp, 0, 1): one up to `span` away
  from the window's middle, zero from `span + ramp` on, linear in between,
  where the gradient of `span` and `offset` comes from. Attention multiplies
  exp(logit) by it before it normalises.

  Args:
    distance: from query to key in tokens, positive for keys of the past.
    span: tokens seen in full on each side of the middle.
    offset: distance from the query to the middle; 0 if None.
    ramp: tokens over which the weight falls, above 0.

  >>> print(window_weight(jnp.arange(5), 1.0, ramp=2.0))
  [1.  1.  0.5 0.  0. ]

  References:
    Sukhbaatar et al., "Adaptive Attention Span in Transformers", 2019,
    https://arxiv.org/abs/1905.07799
  """
  away = jnp.abs(distance if offset is None else distance - jnp.asarray(offset))
  return jnp.clip(1 + (jnp.asarray(span) - away) / ramp, 0, 1)
