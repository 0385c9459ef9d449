"""The recipe: one optimizer with one default for every workload."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import (
  is_number,
  require_floating,
  require_in,
  require_one_of,
  require_whole,
)
from deepseek_jax.core.typing import PyTree, Rules
from deepseek_jax.optim.averaging import anytime_average
from deepseek_jax.optim.chaining import named_chain
from deepseek_jax.optim.compact import compact_moments
from deepseek_jax.optim.layers import scale_by_layer
from deepseek_jax.optim.loss import scale_by_loss_ratio
from deepseek_jax.optim.polyak import cap_by_polyak
from deepseek_jax.optim.rates import check_rate, scale_by_rate
from deepseek_jax.optim.schedules import warmup
from deepseek_jax.optim.variance import scale_by_relative_snr
from deepseek_jax.optim.whitening import (
  scale_by_whitening,
  short_side,
  stacked_axes,
)

_MAX_SIDE = 2048  # Eigenbases of longer sides cost more than they gain.


def deepseek(
  learning_rate: jax.typing.ArrayLike | optax.Schedule = 1e-2,
  *,
  kind: Literal["soap", "newton_schulz"] = "soap",
  weight_decay: int | optax.ScalarOrSchedule = 0.1,
  warmup_steps: jax.typing.ArrayLike = 0,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.95,
  mask: Any | None = None,
  labels: Rules[str] | Callable[[PyTree], PyTree] | PyTree | None = None,
  stacked: Rules[int] = (),
  every: jax.typing.ArrayLike = 5,
  average: jax.typing.ArrayLike = 0.1,
  average_dtype: Any | None = None,
  cap: jax.typing.ArrayLike = 0.6,
  snr_power: jax.typing.ArrayLike = 0.0,
  loss_power: jax.typing.ArrayLike = 0.0,
  layer_rules: Rules[float] | None = None,
  moment_dtype: Literal["bfloat16", "int8"] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Whitened momentum, a cap from the loss, and an average to evaluate.

  Takes the place of `optax.adamw` in any training loop. Evaluate and save
  `averaged_params(opt_state, params)`: at a constant rate the parameters
  themselves keep moving, their average is what has converged; there is no
  schedule to choose. Its parts, in the order they act:

  * whitening of matrices in the eigenbases of their gradients ("soap", see
    `scale_by_whitening`), by Newton-Schulz where the shorter side is above
    2048 or `kind` says so, and Adam for vectors; elements of the gradient
    that are not finite count as zero;
  * decoupled weight decay, of leaves with two or more dimensions only, those
    of a stack (`stacked`) not counted;
  * `layer_rules`: learning rates by layer (off by default);
  * `loss_power`: the loss-adaptive scale (off by default);
  * the learning rate with its warm-up, which `learning_rates` reads back;
  * `cap`: a step is predicted to take at most this fraction of the loss;
  * the average over the latest tenth of the run so far.

  What was measured, on five small workloads against AdamW with the best of 108
  settings for each (`experiments/results/optimizers.json`): whitening and the
  average give the gain in steps. The cap gives none; it is on because it makes
  a far too high rate usable. The variance-adaptive scale (`snr_power`) and
  `loss_power` have no measured gain, hence off.

  It costs more than AdamW: of state, 7 floats a parameter in a square matrix, 8
  where one side is twice the other and 3.5 where it is four times as long, not
  2; compilation, seven times as long with a hundred matrices; and time that
  does not depend on the batch. With 10 and 50 million parameters it reached a
  target sooner than AdamW from 5,000 and 3,500 tokens a step on (a CPU; fewer
  on small models). Use `optax.adamw` where a step is shorter or the state does
  not fit.

  Without the loss as `value` the parts that are driven by it rest. The cap
  takes the loss to be bounded below by 0; at a negative one it rests too. Clip
  gradients inside: before, as in `optax.chain(optax.clip_by_global_norm(1.0),
  deepseek())`, the cap sees the clipped gradient and brakes too little.

  Args:
    learning_rate: The rate after warm-up, or a schedule from updates done to
      the rate; at least 0. The update of every matrix has a root mean square
      of 0.2 times the rate. The default was right from 10,000 to 300,000
      parameters; take 1e-3 to 5e-3 for large models.
    kind: How matrices are whitened. "newton_schulz" took as many steps on the
      five workloads (`experiments/results/optimizers.json`) and holds 2 floats
      a parameter, the average included.
    weight_decay: Fraction of a weight taken off each step, times the learning
      rate; at least 0, or a schedule of it.
    warmup_steps: Updates over which the rate rises linearly, at least 0.
    b1: Decay of the momentum, in [0, 1).
    b2: Decay of the mean squares and covariances, in [0, 1).
    mask: Which leaves decay: a tree of booleans or a function from parameters
      to one. By default the leaves with two or more dimensions beside those
      of a stack, where `optax.adamw` takes them all.
    labels: Which parameters are whitened and how, as in `scale_by_whitening`;
      by default all matrices, chosen by shape.
    stacked: Rules for parameters that are stacks of matrices, such as the
      layers of a scan; as in `scale_by_whitening`.
    every: Updates from one turn of the eigenbases to the next, at least 1.
    average: Width of the average as a fraction of the run so far, in [0, 1];
      0 turns it off. Parts that are off come to life as injected
      hyperparameters, which could turn them on later: name them in
      `static_args` of `optax.inject_hyperparams` to keep them off.
    average_dtype: Type that the average is kept in; `jnp.bfloat16` saves two
      bytes a parameter.
    cap: `fraction` of `cap_by_polyak`, in [0, 2); 0 turns it off, as for a
      range test.
    snr_power: Exponent of `scale_by_relative_snr`, used with its defaults; 0
      turns it off.
    loss_power: Exponent of `scale_by_loss_ratio`, used with its defaults; 0
      turns it off. It rests in updates that pass no `value`.
    layer_rules: Ordered (pattern, multiplier) pairs that cover every
      parameter; see `scale_by_layer`.
    moment_dtype: How momentum and mean squares are stored, see
      `compact_moments`; as the parameters by default.

  Returns:
    An `optax.GradientTransformationExtraArgs`; pass the loss as
    `tx.update(grads, opt_state, params, value=loss)`. Only
    `optax.MultiSteps`, or what comes before it in a chain, may stand outside,
    as the average must see the updates that are applied.

  Raises:
    ValueError: If an argument is out of its range; at `init`, if `layer_rules`
      or `labels` do not fit the parameters.

  >>> from deepseek_jax import optim
  >>> tx = deepseek(1e-2, warmup_steps=10)
  >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
  >>> state = tx.init(params)
  >>> updates, state = jax.jit(tx.update)(params, state, params, value=1.0)
  >>> params = optax.apply_updates(params, updates)
  >>> print(f"{optim.averaged_params(state, params)['kernel'][0, 0]:.4f}")
  0.9997

  References:
    Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024,
    https://arxiv.org/abs/2409.11321; Shamir and Zhang, "Stochastic Gradient
    Descent for Non-smooth Optimization", 2013,
    https://arxiv.org/abs/1212.1824 (the average); Loshchilov and Hutter,
    "Decoupled Weight Decay Regularization", 2019,
    https://arxiv.org/abs/1711.05101
  """
  check_rate(learning_rate=learning_rate, weight_decay=weight_decay)
  require_whole(0, warmup_steps=warmup_steps)
  require_one_of(("soap", "newton_schulz"), kind=kind)
  require_in("[0, 1)", b1=b1, b2=b2)
  require_whole(1, every=every)
  require_in("[0, 1]", average=average)
  require_floating(average_dtype=average_dtype)
  require_in("[0, 2)", cap=cap)
  require_in("[0, inf)", snr_power=snr_power)
  require_in("[0, inf)", loss_power=loss_power)
  require_one_of((None, "bfloat16", "int8"), moment_dtype=moment_dtype)
  stacked = tuple(stacked)
  moments = scale_by_whitening(
    "soap",
    labels=_kinds(kind, stacked) if labels is None else labels,
    stacked=stacked,
    b1=b1,
    b2=b2,
    every=every,
    max_side=_MAX_SIDE,
  )
  if not _is_off(snr_power):
    moments = scale_by_relative_snr(moments, power=snr_power, b1=b1, b2=b2)
  if moment_dtype is not None:
    moments = compact_moments(moments, moment_dtype)
  parts: list[tuple[str, optax.GradientTransformation]]
  parts = [("whitening", moments)]
  if not _is_off(weight_decay):
    mask = _matrices(stacked) if mask is None else mask
    decay = optax.add_decayed_weights(weight_decay, mask)
    parts.append(("decay", decay))
  if layer_rules is not None:
    parts.append(("layers", scale_by_layer(layer_rules)))
  if not _is_off(loss_power):
    parts.append(("loss", _resting(scale_by_loss_ratio(loss_power))))
  parts.append(("rate", scale_by_rate(warmup(learning_rate, warmup_steps))))
  tx = named_chain(*parts)
  if not _is_off(cap):
    tx = _capped(cap, tx)
  if not _is_off(average):
    tx = anytime_average(tx, average, dtype=average_dtype)
  return tx


def _kinds(whitening: str, stacked: Rules[int]) -> Callable[[PyTree], PyTree]:
  """Labels matrices by their shorter side, the one that is always turned."""

  def kind(leaf, count):
    short = short_side(leaf, count)
    if short == 1:
      return "adam"
    return whitening if short <= _MAX_SIDE else "newton_schulz"

  def label(params):
    return jax.tree.map(kind, params, stacked_axes(params, stacked))

  return label


def _matrices(stacked: Rules[int]) -> Callable[[PyTree], PyTree]:
  """Masks what decays; the bias of a stack of layers does not."""

  def mask(params):
    return jax.tree.map(
      lambda leaf, count: jnp.ndim(leaf) - count >= 2,
      params,
      stacked_axes(params, stacked),
    )

  return mask


def _capped(
  fraction: jax.typing.ArrayLike, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """Caps the updates that come with a loss; the others pass as they are."""
  capped = cap_by_polyak(fraction, inner=tx)
  tx = optax.with_extra_args_support(tx)

  def update_fn(updates, state, params=None, *, value=None, **extra_args):
    if value is not None:
      return capped.update(updates, state, params, value=value, **extra_args)
    updates, inner_state = tx.update(
      updates, state.inner_state, params, **extra_args
    )
    one = jnp.ones_like(state.rate_scale)
    return updates, state._replace(inner_state=inner_state, rate_scale=one)

  return optax.GradientTransformationExtraArgs(capped.init, update_fn)


def _resting(
  tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Lets a loss-driven transform rest in updates that pass no loss."""

  def update_fn(updates, state, params=None, *, value=None, **extra_args):
    # NaN is the loss that such a transform does not take in.
    value = jnp.nan if value is None else value
    return tx.update(updates, state, params, value=value, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _is_off(value: Any) -> bool:
  # An injected hyperparameter is an array: it may become other than 0 later.
  return is_number(value) and value == 0
