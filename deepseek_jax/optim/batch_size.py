"""A batch size from the noise of the gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import require_in, safe_ratio
from deepseek_jax.core.typing import Scalar
from deepseek_jax.optim.replicas import ScaleByReplicaVarianceState


def noise_scale(opt_state: optax.OptState) -> Scalar:
  """Returns the gradient noise scale, in batches of one replica.

  The variance of one replica's gradient over the squared length of the true
  gradient, each summed over all leaves and averaged over updates before the
  division. A batch much smaller is mostly noise; one much larger is mostly
  spent on what is known already.

  Args:
    opt_state: A state with that of `scale_by_replica_variance` or
      `scale_by_microbatch_variance` anywhere inside, on the host or traced.

  Returns:
    A float32 scalar: NaN before the first update, infinite where no signal
    shows above the noise.

  Raises:
    ValueError: If there is no such state.

  >>> noise_scale(optax.sgd(0.1).init(jnp.ones(2)))
  Traceback (most recent call last):
  ...
  ValueError: opt_state must hold a ScaleByReplicaVarianceState, got none.
  """
  nodes = jax.tree.leaves(opt_state, is_leaf=_is_ours)
  levels = [node.levels for node in nodes if _is_ours(node)]
  if not levels:
    raise ValueError(
      "opt_state must hold a ScaleByReplicaVarianceState, got none."
    )
  # More than one under `optax.partition`: each has its part of the gradient.
  signal = sum(jnp.sum(level.signal) for level in levels)
  noise = sum(jnp.sum(level.noise) for level in levels)
  signal, noise = jnp.maximum(signal, 0.0), jnp.maximum(noise, 0.0)
  unknown = jnp.where(noise > 0, jnp.inf, jnp.nan)
  return safe_ratio(noise, signal, default=unknown)


def suggest_batch_size(
  opt_state: optax.OptState, replica_batch_size: jax.typing.ArrayLike
) -> Scalar:
  """Returns the batch size, in examples, at which noise equals signal.

  For the whole batch, over all replicas. By the model of McCandlish et al.,
  twice this batch takes a quarter off the steps, half of it adds a half: a
  compromise between time and compute. It tends to grow as training goes on, so
  read it late, and more than once.

  Args:
    opt_state: As for `noise_scale`.
    replica_batch_size: Examples in the batch of one replica, at least 1, whose
      losses are averaged.

  Returns:
    A float32 scalar, not rounded; NaN or infinite as `noise_scale` is.

  Raises:
    ValueError: If the size is below 1, or there is no such state.

  >>> from deepseek_jax.optim.replicas import scale_by_microbatch_variance
  >>> tx = scale_by_microbatch_variance()
  >>> grads = jnp.array([3.0, 7.0, 11.0])  # of three microbatches
  >>> _, state = jax.jit(tx.update)(grads, tx.init(jnp.zeros(())))
  >>> print(f"{suggest_batch_size(state, replica_batch_size=2):.2f}")
  0.73

  References:
    McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch
    Training", 2018, https://arxiv.org/abs/1812.06162
  """
  require_in("[1, inf)", replica_batch_size=replica_batch_size)
  return noise_scale(opt_state) * replica_batch_size


def _is_ours(node: Any) -> bool:
  return isinstance(node, ScaleByReplicaVarianceState)
