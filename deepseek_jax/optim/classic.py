"""The two published rules, each with what had to be corrected.

They are here to be cited, compared with and built upon. Both fell short of
AdamW in what was measured: train with `deepseek`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import (
  is_number,
  require_in,
  require_one_of,
  scale_tree,
)
from deepseek_jax.core.typing import Count, PyTree, Scalar
from deepseek_jax.optim.chaining import named_chain
from deepseek_jax.optim.guard import zero_non_finite
from deepseek_jax.optim.loss import as_loss
from deepseek_jax.optim.rates import check_rate, scale_by_rate
from deepseek_jax.optim.readback import scope_of


class LossLevelState(NamedTuple):
  """State of the middle part of `loss_level_sgd`."""

  rate_scale: Scalar  # shape=(), dtype=float32: the factor in force
  scope: PyTree  # the covered leaves; no arrays


class VarianceScaledState(NamedTuple):
  """State of the middle part of `variance_scaled`."""

  count: Count  # shape=(), dtype=int32: updates done
  mean: PyTree  # of the gradient; like the parameters but dtype=float32
  variance: PyTree  # dtype=float32; a scalar, one a leaf, or like `mean`


def loss_level_sgd(
  learning_rate: jax.typing.ArrayLike | optax.Schedule = 1e-3,
  *,
  weight_decay: int | optax.ScalarOrSchedule = 0.0,
  levels: Sequence[tuple[int | float, int | float]] = ((0.1, 10.0), (1.0, 5.0)),
) -> optax.GradientTransformationExtraArgs:
  """Gradient descent whose rate jumps up when the loss falls below levels.

  With η' = η times the factor of the lowest level that the loss is below (10
  below 0.1, 5 below 1, else 1):

    p ← p - η'·(g + weight_decay·p)

  Corrected here: the published decay made the weights grow and ignored the
  rate, and without a loss the factor was always 10; the decay shrinks them in
  proportion to the rate in force, and the loss is required.

  Measured: it never reached the middle target of AdamW on any of five small
  workloads, and diverged on one. The levels depend on the unit of the loss,
  and the rate rises late, where a calm one is wanted: see
  `scale_by_loss_ratio` for the idea without either, `deepseek` to train.

  Args:
    learning_rate: The rate above all levels, at least 0, or a schedule of it.
    weight_decay: Fraction of a weight taken off each step, times the rate in
      force; at least 0, or a schedule of it.
    levels: (loss, factor) pairs with rising losses and positive factors.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose `update` needs the loss as
    keyword `value`. A NaN or infinite loss leaves the factor as it is, 1 at
    first. `learning_rates` reads η' back.

  Raises:
    ValueError: If an argument is out of its range.
    TypeError: At `update`, if `value` is missing.

  >>> tx = loss_level_sgd(0.5)
  >>> params = jnp.ones(())
  >>> state = tx.init(params)
  >>> for loss in (2.0, 0.5, 0.05):
  ...   updates, state = tx.update(params, state, params, value=loss)
  ...   print(updates)
  -0.5
  -2.5
  -5.0
  """
  check_rate(learning_rate=learning_rate, weight_decay=weight_decay)
  # Without decay, `update` needs no params.
  off = is_number(weight_decay) and weight_decay == 0
  decay = optax.identity() if off else optax.add_decayed_weights(weight_decay)
  return named_chain(
    ("decay", decay),
    ("loss", _scale_by_loss_level(_checked_levels(levels))),
    ("rate", scale_by_rate(learning_rate)),
  )


def variance_scaled(
  learning_rate: jax.typing.ArrayLike | optax.Schedule = 1e-3,
  *,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  mode: Literal["global", "tensor", "element"] = "global",
) -> optax.GradientTransformationExtraArgs:
  """Momentum with a rate that falls with the variance of past gradients.

    m ← b1·m + (1 - b1)·g,   v ← b2·v + (1 - b2)·pool(g²)
    p ← p - η / (√v̂ + eps)·m̂

  with m̂ and v̂ bias-corrected, and v the second moment, not centred. The
  published rule leaves open what one v belongs to; `pool` takes the mean

  * over all parameters, a large layer counting for more (`"global"`);
  * over each leaf (`"tensor"`);
  * over nothing (`"element"`): this is Adam, `optax.adam` to float precision.

  Corrected here: the published code adapts the rate of one parameter group to
  whatever single gradient it is given; here every gradient counts.

  Measured: with `"global"`, which normalises momentum by the size of the whole
  gradient, 1.6 to 2.0 times the steps of AdamW on 3 of 4 small workloads, and
  the tight target never. Use `deepseek` to train.

  Args:
    learning_rate: The rate η, at least 0, or a schedule of it. It is what
      `learning_rates` reads back, as for Adam.
    b1: Decay of the mean, in [0, 1).
    b2: Decay of the variance, in [0, 1).
    eps: Added to the root of the variance; at least 0.
    mode: What shares a variance.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Elements of the gradient that
    are not finite count as zero. The state is 4 bytes a parameter, 8 with
    `"element"`.

  Raises:
    ValueError: If an argument is out of its range.

  >>> tx = variance_scaled(1.0, mode="global")
  >>> grads = {"bias": jnp.array([1.0]), "kernel": jnp.array([1.0, 3.0, 5.0])}
  >>> updates, _ = tx.update(grads, tx.init(grads))  # The RMS is 3.
  >>> print(*(f"{update:.2f}" for update in updates["kernel"]))
  -0.33 -1.00 -1.67

  References:
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015,
    https://arxiv.org/abs/1412.6980
  """
  check_rate(learning_rate=learning_rate)
  require_in("[0, 1)", b1=b1, b2=b2)
  require_in("[0, inf)", eps=eps)
  require_one_of(tuple(_POOLS), mode=mode)
  return named_chain(
    ("guard", zero_non_finite()),
    ("moments", _scale_by_variance(b1, b2, eps, _POOLS[mode])),
    ("rate", scale_by_rate(learning_rate)),
  )


def _scale_by_loss_level(
  levels: Sequence[tuple[int | float, int | float]],
) -> optax.GradientTransformationExtraArgs:
  """Multiplies updates by the factor of the level that the loss is below."""
  bounds, factors = zip(*levels, strict=True)

  def init_fn(params):
    return LossLevelState(jnp.ones((), jnp.float32), scope_of(params))

  def update_fn(updates, state, params=None, *, value=None, **extra_args):
    del params, extra_args
    value = as_loss(value, "loss_level_sgd")
    below = [value < bound for bound in bounds]
    factor = jnp.select(below, factors, 1.0).astype(jnp.float32)
    scale = jnp.where(jnp.isfinite(value), factor, state.rate_scale)
    return scale_tree(updates, scale), state._replace(rate_scale=scale)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scale_by_variance(
  b1, b2, eps, pool: Callable[[PyTree], PyTree]
) -> optax.GradientTransformationExtraArgs:
  """Divides the mean gradient by the root of its pooled second moment."""

  def init_fn(params):
    mean = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    # Zeros of its own: unpooled it would share the buffers of the mean.
    variance = optax.tree.zeros_like(pool(mean))
    return VarianceScaledState(jnp.zeros((), jnp.int32), mean, variance)

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    grads = optax.tree.cast(updates, jnp.float32)
    squares = jax.tree.map(jnp.square, grads)
    new = state._replace(
      count=optax.safe_increment(state.count),
      mean=optax.tree.update_moment(grads, state.mean, b1, 1),
      variance=optax.tree.update_moment(pool(squares), state.variance, b2, 1),
    )
    mean = optax.tree.bias_correction(new.mean, b1, new.count)
    variance = optax.tree.bias_correction(new.variance, b2, new.count)
    # One variance for the whole tree is a prefix of it: give it to every leaf.
    variance = jax.tree.broadcast(variance, mean)
    divide = lambda m, v, u: (m / (jnp.sqrt(v) + eps)).astype(u.dtype)
    return jax.tree.map(divide, mean, variance, updates), new

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _pool_globally(squares: PyTree) -> Scalar:
  """Returns the mean of all elements."""
  size = optax.tree.size(squares)
  # Divided first: the sum of squares that are finite may not be.
  parts = [jnp.sum(leaf / size) for leaf in jax.tree.leaves(squares)]
  return sum(parts, start=jnp.zeros((), jnp.float32))


def _pool_by_tensor(squares: PyTree) -> PyTree:
  """Returns the mean of each leaf."""
  return jax.tree.map(lambda leaf: jnp.sum(leaf / leaf.size), squares)


_POOLS = {
  "global": _pool_globally,
  "tensor": _pool_by_tensor,
  "element": lambda squares: squares,
}


def _checked_levels(
  levels: Sequence[tuple[int | float, int | float]],
) -> Sequence[tuple[int | float, int | float]]:
  """Returns the levels, or says which rule they break."""
  bounds = [bound for bound, _ in levels]
  if not bounds or bounds != sorted(set(bounds)):
    raise ValueError(f"levels must be given by rising loss, got {levels=}.")
  for bound, factor in levels:
    if not (math.isfinite(bound) and 0 < factor < math.inf):
      raise ValueError(
        "levels must be pairs of a finite loss and a positive factor, got "
        f"{(bound, factor)}."
      )
  return tuple(levels)
