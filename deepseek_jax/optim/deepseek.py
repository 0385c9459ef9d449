"""The recipe: one optimizer with one default for every workload."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import is_number
from deepseek_jax.core.typing import Rules
from deepseek_jax.optim.decay import matrices as matrices
from deepseek_jax.optim.guard import zero_non_finite
from deepseek_jax.optim.layers import scale_by_layer
from deepseek_jax.optim.loss import scale_by_loss_ratio
from deepseek_jax.optim.rates import scale_by_rate
from deepseek_jax.optim.schedules import warmup


def deepseek(
  learning_rate: jax.typing.ArrayLike | optax.Schedule = 1e-2,
  *,
  weight_decay: int | optax.ScalarOrSchedule = 0.0,
  warmup_steps: jax.typing.ArrayLike = 0,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  mu_dtype: Any | None = None,
  mask: Any | None = None,
  layer_rules: Rules[float] | None = None,
  loss_power: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """Adam with decoupled decay of matrices, warm-up and readable rates.

  Takes the place of `optax.adamw` in any training loop, and gives the same
  updates to float precision when its decay is masked alike. Its parts, in the
  order they act:

  * a guard: elements of the gradient that are not finite count as zero;
  * Adam's moments;
  * decoupled weight decay, of leaves with two or more dimensions only;
  * `layer_rules`: learning rates by layer (off by default);
  * `loss_power`: the loss-adaptive scale (off by default);
  * the learning rate with its warm-up, which `learning_rates` reads back.

  What was measured: this is AdamW, neither faster nor slower to a target.
  `layer_rules` and `loss_power` have no measured gain in training from
  scratch, hence off. For one part with settings of your own, chain it:
  `optax.chain(deepseek(), scale_by_loss_ratio(-1.0, reference="best"))`.

  Args:
    learning_rate: The rate after warm-up, or a schedule from updates done to
      the rate; at least 0. The default suits small models; 3e-4 to 3e-3 is
      usual for large ones.
    weight_decay: Fraction of a weight taken off each step, times the learning
      rate; at least 0, or a schedule of it.
    warmup_steps: Updates over which the rate rises linearly, at least 0.
    b1: Decay of the first moment, in [0, 1).
    b2: Decay of the second moment, in [0, 1).
    eps: Added to the root of the second moment; at least 0.
    mu_dtype: Dtype of the first moment, by default that of the parameters;
      `jnp.bfloat16` saves two bytes a parameter.
    mask: Which leaves decay: a tree of booleans or a function from parameters
      to one. By default the leaves with two or more dimensions, where
      `optax.adamw` takes them all.
    layer_rules: Ordered (pattern, multiplier) pairs that cover every
      parameter; see `scale_by_layer`.
    loss_power: Exponent of `scale_by_loss_ratio`, used with its defaults; 0
      turns it off. It rests (the scale stays as it is, 1 at first) in updates
      that pass no `value`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; pass the loss as
    `tx.update(grads, opt_state, params, value=loss)` to be heard by
    `loss_power`.

  Raises:
    ValueError: If an argument is out of its range; at `init`, if
      `layer_rules` do not fit the parameters.

  >>> tx = deepseek(1e-2, weight_decay=0.1, warmup_steps=10)
  >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
  >>> state = tx.init(params)
  >>> updates, state = tx.update(params, state, params)
  >>> print(state["rate"].learning_rate)
  0.001

  References:
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019,
    https://arxiv.org/abs/1711.05101
  """
  _check_arguments(weight_decay, warmup_steps, b1, b2, eps)
  parts = [
    ("guard", zero_non_finite()),
    ("moments", optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)),
  ]
  if not _is_off(weight_decay):
    mask = matrices if mask is None else mask
    decay = optax.add_decayed_weights(weight_decay, mask)
    parts.append(("decay", decay))
  if layer_rules is not None:
    parts.append(("layers", scale_by_layer(layer_rules)))
  if not _is_off(loss_power):
    parts.append(("loss", _resting(scale_by_loss_ratio(loss_power))))
  parts.append(("rate", scale_by_rate(warmup(learning_rate, warmup_steps))))
  return optax.named_chain(*parts)


def _resting(
  tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Lets a loss-driven transform rest in updates that pass no loss."""

  def update_fn(updates, state, params=None, **extra_args):
    # NaN is the loss that such a transform does not take in.
    extra_args = {"value": jnp.nan} | extra_args
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _is_off(value: Any) -> bool:
  # An injected hyperparameter is an array: it may become other than 0 later.
  return is_number(value) and value == 0


def _check_arguments(weight_decay, warmup_steps, b1, b2, eps) -> None:
  if is_number(weight_decay) and not 0 <= weight_decay < float("inf"):
    raise ValueError(
      f"weight_decay must be finite and not negative, got {weight_decay=}."
    )
  if is_number(warmup_steps) and warmup_steps < 0:
    raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps=}.")
  for name, value in (("b1", b1), ("b2", b2)):
    if is_number(value) and not 0 <= value < 1:
      raise ValueError(f"{name} must be in [0, 1), got {name}={value}.")
  if is_number(eps) and not 0 <= eps < float("inf"):
    raise ValueError(f"eps must be finite and not negative, got {eps=}.")
