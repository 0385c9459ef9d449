"""Learning rates per tensor from the variance between replicas."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import leaf_paths
from deepseek_jax.core.typing import PyTree
from deepseek_jax.optim.balance import (
  Levels,
  PerLeaf,
  balanced_scales,
  check_scaling,
  init_levels,
  per_leaf,
  scale_leaves,
  signal_share,
  square_sum,
  update_levels,
)
from deepseek_jax.optim.guard import zero_non_finite
from deepseek_jax.optim.readback import scope_of


class ScaleByReplicaVarianceState(NamedTuple):
  """State of `scale_by_replica_variance`; equal on all replicas."""

  inner_state: optax.OptState
  levels: Levels  # squared length of the gradient, variance of one replica's
  rate_scales: PerLeaf  # shape=(leaves,), dtype=float32: the latest used
  scope: PyTree  # the covered leaves; no arrays


class _Gathered(NamedTuple):
  """What comes of the gradients of all replicas."""

  mean: PyTree  # like the parameters
  squares: PerLeaf  # mean over replicas of the squared length
  replicas: int


def scale_by_replica_variance(
  axis_name: str | tuple[str, ...],
  inner: optax.GradientTransformation | None = None,
  *,
  power: jax.typing.ArrayLike = 0.5,
  min_scale: jax.typing.ArrayLike = 0.5,
  max_scale: jax.typing.ArrayLike = 2.0,
  decay: jax.typing.ArrayLike = 0.95,
) -> optax.GradientTransformationExtraArgs:
  """Averages the gradients of all replicas, and scales by their agreement.

  With g_r the gradient of replica r of R and ḡ their mean, for every leaf

      noise = (mean |g_r|² - |ḡ|²)·R/(R - 1)       variance of one g_r
      signal = |ḡ|² - noise/R                      squared true gradient

  are unbiased, and averaged over updates. The share of ḡ that is signal,
  q = signal / (signal + noise/R), kept in [0.001, 0.999], gives the scales
  s_l = clip(c·q_l^power, min_scale, max_scale), with c such that the geometric
  mean of s over the leaves is 1. An update uses the averages before it. Unlike
  moments over time, this sees the noise of the parameters as they are, from the
  first step on; `noise_scale` and `suggest_batch_size` read it.

  It does the all-reduce itself, so call `update` inside `jax.shard_map` with
  each replica's own gradient. There, the gradient of a replicated parameter is
  summed silently; a cast of the parameters keeps it local:

      @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")),
               out_specs=(P(), P()))
      def step(params, opt_state, batch):
        local = jax.lax.pcast(params, "data", to="varying")
        grads = jax.grad(loss)(local, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

  On the wire are the mean gradient and one number a leaf, in one all-reduce.
  Each replica must hold the whole of every leaf. Put the optimizer into
  `inner`, not after it in a chain: Adam divides any factor of a leaf out again.
  To leave parameters out, mask inside `inner`: what a mask around this hides is
  not averaged.

  No gain of the scales was measured; power=0 averages and measures alone.

  Args:
    axis_name: The mesh axis, or axes, over which the batch is split.
    inner: What the mean gradient goes through before the scales; nothing by
      default.
    power: Exponent of the share, at least 0; 0 leaves the updates as they are.
    min_scale: Lower bound of a scale, in (0, 1].
    max_scale: Upper bound of a scale, at least 1.
    decay: Weight of the past in the averages, in [0, 1); 0.95 looks back about
      20 updates.

  Returns:
    An `optax.GradientTransformationExtraArgs`; extra arguments reach `inner`.
    `init` needs no mesh. Updates and state are equal on all replicas. Elements
    of a replica's gradient that are not finite count as 0 in the mean.

  Raises:
    ValueError: If an argument is out of its range; at `update`, if there is one
      replica only, or if the gradients have been summed already (which shows
      with `check_vma=True`, the default of `shard_map`).

  References:
    McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch
    Training", 2018, appendix A.1, https://arxiv.org/abs/1812.06162
    Balles and Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of
    Stochastic Gradients", 2018, https://arxiv.org/abs/1705.07774
  """
  check_scaling(power, min_scale, max_scale, decay)

  def gather(grads):
    replicas = jax.lax.axis_size(axis_name)
    _check_replicas(replicas, "axis_name")
    _check_local(grads, axis_name)
    squares = per_leaf([square_sum(leaf) for leaf in jax.tree.leaves(grads)])
    mean, squares = jax.lax.pmean((grads, squares), axis_name)
    return _Gathered(mean, squares, replicas)

  return _scale_by_agreement(gather, inner, power, min_scale, max_scale, decay)


def scale_by_microbatch_variance(
  inner: optax.GradientTransformation | None = None,
  *,
  power: jax.typing.ArrayLike = 0.5,
  min_scale: jax.typing.ArrayLike = 0.5,
  max_scale: jax.typing.ArrayLike = 2.0,
  decay: jax.typing.ArrayLike = 0.95,
) -> optax.GradientTransformationExtraArgs:
  """Does on one device what `scale_by_replica_variance` does on many.

  The gradients given to `update` have a leading axis of microbatches, which
  take the place of replicas; updates have no such axis. It needs the memory of
  all their gradients at once. States of the two can be exchanged.

  Args:
    inner: As for `scale_by_replica_variance`, and so are the others.
    power: Exponent of the share of signal, at least 0.
    min_scale: Lower bound of a scale, in (0, 1].
    max_scale: Upper bound of a scale, at least 1.
    decay: Weight of the past in the averages, in [0, 1).

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: If an argument is out of its range; at `update`, if the leaves
      have no common leading axis of at least 2.

  >>> loss = lambda w, x: jnp.mean((x - w) ** 2)
  >>> microbatches = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
  >>> w = jnp.zeros(())
  >>> grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(w, microbatches)
  >>> tx = scale_by_microbatch_variance(optax.sgd(0.5))
  >>> updates, state = jax.jit(tx.update)(grads, tx.init(w), w)
  >>> print(updates)
  3.5
  """
  check_scaling(power, min_scale, max_scale, decay)

  def gather(grads):
    leaves = jax.tree.leaves(grads)
    sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(sizes) > 1 or () in sizes:
      raise ValueError(
        "updates must have a leading axis of microbatches, the same for all "
        f"leaves, got shapes {[jnp.shape(leaf) for leaf in leaves]}."
      )
    replicas = sizes.pop()[0] if sizes else 2
    _check_replicas(replicas, "the leading axis of updates")
    squares = per_leaf([square_sum(leaf) / replicas for leaf in leaves])
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), grads)
    return _Gathered(mean, squares, replicas)

  return _scale_by_agreement(gather, inner, power, min_scale, max_scale, decay)


def _scale_by_agreement(
  gather: Callable[[PyTree], _Gathered],
  inner: optax.GradientTransformation | None,
  power: jax.typing.ArrayLike,
  min_scale: jax.typing.ArrayLike,
  max_scale: jax.typing.ArrayLike,
  decay: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
  """Measures what `gather` brings, and scales what `inner` makes of it."""
  guard = zero_non_finite()
  inner = optax.with_extra_args_support(inner or optax.identity())

  def init_fn(params):
    size = len(jax.tree.leaves(params))
    return ScaleByReplicaVarianceState(
      inner_state=inner.init(params),
      levels=init_levels(size),
      rate_scales=jnp.ones(size, jnp.float32),
      scope=scope_of(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    grads, _ = guard.update(updates, optax.EmptyState())
    gathered = gather(grads)
    # The shares of the mean that is applied: noise/R of it is noise.
    share = signal_share(state.levels, 1 / gathered.replicas)
    scales = balanced_scales(share, power, min_scale, max_scale)
    levels = update_levels(state.levels, _estimate(gathered), decay)
    updates, inner_state = inner.update(
      gathered.mean, state.inner_state, params, **extra_args
    )
    return scale_leaves(updates, scales), state._replace(
      inner_state=inner_state, levels=levels, rate_scales=scales
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _estimate(gathered: _Gathered) -> Levels:
  leaves = jax.tree.leaves(gathered.mean)
  whole = per_leaf([square_sum(leaf) for leaf in leaves])
  r = gathered.replicas
  noise = (gathered.squares - whole) * (r / (r - 1))
  return Levels(signal=whole - noise / r, noise=noise)


def _check_replicas(replicas: int, name: str) -> None:
  if replicas < 2:
    raise ValueError(
      f"{name} must have a size of at least 2, as one gradient has no "
      f"variance, got {replicas}."
    )


def _check_local(grads: PyTree, axis_name: str | tuple[str, ...]) -> None:
  """Raises if the type of a gradient says that replicas share it."""
  wanted = _varying(jax.lax.axis_index(axis_name))
  leaves = zip(leaf_paths(grads), jax.tree.leaves(grads), strict=True)
  shared = [path for path, leaf in leaves if not wanted <= _varying(leaf)]
  if shared:
    raise ValueError(
      "updates must be each replica's own gradient, got what is summed over "
      f"{axis_name=} already at {shared}. Differentiate with respect to "
      "jax.lax.pcast(params, axis_name, to='varying')."
    )


def _varying(array: jax.Array) -> frozenset[str]:
  """Returns the axes an array varies over; none outside `check_vma=True`."""
  kind = getattr(jax.typeof(array), "manual_axis_type", None)
  return frozenset(getattr(kind, "varying", ()))
