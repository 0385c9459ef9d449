"""Signal and noise per tensor, and scales that balance out to 1."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from deepseek_jax.core import require_in, safe_ratio, scale_tree
from deepseek_jax.core.typing import PyTree, Scalar

# A share of signal is an estimate: below this and above 1 - this it is noise.
_LEAST_SHARE = 1e-3

# One number for each leaf, in the order of `jax.tree.leaves`.
PerLeaf: TypeAlias = Float32[Array, " leaves"]


class Levels(NamedTuple):
  """Averages of signal and noise, up to a factor that both share.

  They start at 0 and are not corrected for it, as only ratios of them are used.
  """

  signal: PerLeaf  # shape=(leaves,), dtype=float32
  noise: PerLeaf  # shape=(leaves,), dtype=float32


def balanced_scales(
  merits: PerLeaf,
  power: jax.typing.ArrayLike,
  min_scale: jax.typing.ArrayLike,
  max_scale: jax.typing.ArrayLike,
) -> PerLeaf:
  """Returns clip(c·merits^power, min_scale, max_scale) of geometric mean 1.

  Such a c exists whatever the merits, as the bounds lie on either side of 1.
  The mean logarithm rises with log c along straight lines between the places
  where an entry meets a bound: c is found by interpolation, exactly.

  Args:
    merits: Positive numbers; NaN for an entry that is left out and gets 1.
    power: Their exponent.
    min_scale: Lower bound, in (0, 1].
    max_scale: Upper bound, at least 1.

  Returns:
    The scales, in float32.

  >>> print(balanced_scales(jnp.array([1.0, 4.0, jnp.nan]), 0.5, 0.1, 10.0))
  [0.70710677 1.4142135  1.        ]
  """
  if merits.size == 0:
    return merits
  known = jnp.isfinite(merits)
  logs = jnp.where(known, power * jnp.log(merits), 0.0)
  low, high = jnp.log(min_scale), jnp.log(max_scale)
  shifts = jnp.sort(jnp.concatenate([low - logs, high - logs]))
  shifted = jnp.clip(shifts[:, None] + logs[None, :], low, high)
  means = jnp.sum(shifted, axis=1, where=known[None, :])
  shift = jnp.interp(0.0, means, shifts)
  scales = jnp.clip(jnp.exp(logs + shift), min_scale, max_scale)
  return jnp.where(known, scales, 1.0).astype(jnp.float32)


def init_levels(size: int) -> Levels:
  """Returns the levels of leaves of which nothing is known."""
  return Levels(jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.float32))


def update_levels(
  levels: Levels, new: Levels, decay: jax.typing.ArrayLike
) -> Levels:
  """Averages in new levels, but for the leaves where they are not finite."""
  known = jnp.isfinite(new.signal + new.noise)
  keep = jnp.asarray(decay, jnp.float32)
  blend = lambda old, x: jnp.where(known, keep * old + (1 - keep) * x, old)
  return jax.tree.map(blend, levels, new)


def scale_leaves(updates: PyTree, scales: PerLeaf) -> PyTree:
  """Multiplies every leaf by its scale and keeps its dtype."""
  leaves, treedef = jax.tree.flatten(updates)
  scaled = [scale_tree(leaf, scales[i]) for i, leaf in enumerate(leaves)]
  return jax.tree.unflatten(treedef, scaled)


def square_mean(leaf: Array) -> Scalar:
  """Returns the mean of |x|² over a leaf, in float32 whatever the leaf is."""
  return jnp.mean(jnp.square(jnp.abs(leaf).astype(jnp.float32)))


def square_sum(leaf: Array) -> Scalar:
  """Returns the sum of |x|² over a leaf, in float32 whatever the leaf is."""
  return jnp.sum(jnp.square(jnp.abs(leaf).astype(jnp.float32)))


def per_leaf(scalars: list[Scalar]) -> PerLeaf:
  """Stacks one number a leaf; there may be no leaves."""
  return jnp.stack(scalars) if scalars else jnp.zeros(0, jnp.float32)


def signal_share(
  levels: Levels, noise_weight: jax.typing.ArrayLike = 1.0
) -> PerLeaf:
  """Returns signal / (signal + noise_weight·noise), kept off 0 and 1.

  The share is NaN where nothing is known: gradients have been 0, or none came.
  """
  # Estimates may fall below 0, where there is none of it.
  signal = jnp.maximum(levels.signal, 0.0)
  noise = noise_weight * jnp.maximum(levels.noise, 0.0)
  share = safe_ratio(signal, signal + noise, default=jnp.nan)
  return jnp.clip(share, _LEAST_SHARE, 1 - _LEAST_SHARE)


def check_scaling(power, min_scale, max_scale, decay) -> None:
  """Checks what is known now; injected hyperparameters are arrays."""
  require_in("[0, inf)", power=power)
  require_in("(0, 1]", min_scale=min_scale)
  require_in("[1, inf)", max_scale=max_scale)
  require_in("[0, 1)", decay=decay)
