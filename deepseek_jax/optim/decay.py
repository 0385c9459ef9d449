"""Weight decay that Optax lacks: one that makes weights exactly zero."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from deepseek_jax.core import require_in
from deepseek_jax.core.tree import match_rules
from deepseek_jax.core.typing import Count, PyTree, Rules, Scalar
from deepseek_jax.optim.rates import check_rate


class DecayWeightsState(NamedTuple):
  """State of `decay_weights`."""

  count: Count  # shape=(), dtype=int32: updates done


def decay_weights(
  rate: jax.typing.ArrayLike | optax.Schedule,
  *,
  l2: jax.typing.ArrayLike = 0.0,
  l1: jax.typing.ArrayLike = 0.0,
  mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Shrinks weights after the step: in proportion (L2), by an amount (L1).

  With p the weights and u the update, learning rate and sign included:

    v = p + u - η·l2·p,   p' = sign(v)·max(|v| - η·l1, 0),   u ← p' - p

  The L1 part is the proximal step of l1·|p|. The usual way, its subgradient
  l1·sign(p), makes weights hover about zero; this one sets them to exactly
  zero, and they stay there until a step outgrows the threshold. Use it to find
  out which weights are not needed. With `l1=0` it is what
  `optax.add_decayed_weights` does before the rate, and that one will do.

  It must stand after the rate, last in the chain, as what moves a weight
  afterwards undoes the zeros. They are exact where updates and parameters have
  one dtype. After plain SGD it minimises loss + l1·|p|; after Adam every
  weight meets the same threshold whatever its own step was, which prunes but
  minimises no such sum.

  Args:
    rate: The learning rate η that the updates have been multiplied by, or the
      schedule of it; at least 0. It is no second rate: `learning_rates` does
      not count it.
    l2: Fraction of a weight taken off each step, times η; at least 0.
    l1: Amount taken off a weight's size each step, times η; in the unit of the
      weights, at least 0.
    mask: Which leaves decay: a tree of booleans, `True` for all, or a function
      from parameters to a tree. By default `matrices`, the leaves with two or
      more dimensions.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose `update` needs `params`.

  Raises:
    ValueError: If a number is negative, infinite or NaN; at `update`, if
      `params` are missing.

  >>> tx = optax.chain(optax.sgd(0.5), decay_weights(0.5, l1=1.0))
  >>> params = jnp.array([[2.0, 0.3, -1.0]])
  >>> updates, _ = tx.update(jnp.zeros((1, 3)), tx.init(params), params)
  >>> print(optax.apply_updates(params, updates))
  [[ 1.5  0.  -0.5]]

  References:
    Daubechies, Defrise and De Mol, "An iterative thresholding algorithm for
    linear inverse problems with a sparsity constraint", 2004,
    https://arxiv.org/abs/math/0307152
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019,
    https://arxiv.org/abs/1711.05101
  """
  check_rate(rate=rate)
  require_in("[0, inf)", l2=l2, l1=l1)

  def init_fn(params):
    del params
    return DecayWeightsState(count=jnp.zeros((), jnp.int32))

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        "decay_weights needs params: call tx.update(grads, opt_state, params)."
      )
    step = rate(state.count) if callable(rate) else rate
    step = jnp.asarray(step, jnp.float32)
    shrink = lambda u, p: _shrink_leaf(u, p, step * l2, step * l1)
    updates = jax.tree.map(shrink, updates, params)
    return updates, state._replace(count=optax.safe_increment(state.count))

  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return optax.masked(tx, matrices if mask is None else mask)


def matrices(params: PyTree, stacked: Rules[int] = ()) -> PyTree:
  """Returns the mask of the leaves with two or more dimensions.

  Args:
    params: A tree of arrays.
    stacked: Rules for leading axes that do not count, such as the one of layers
      in front of what a scan runs over; see `deepseek`.

  >>> matrices({"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)})
  {'bias': False, 'kernel': True}
  >>> matrices({"layers": {"bias": jnp.zeros((3, 2))}}, [("layers/.*", 1)])
  {'layers': {'bias': False}}
  """
  return jax.tree.map(
    lambda leaf, count: jnp.ndim(leaf) - count >= 2,
    params,
    match_rules(stacked, params, default=0),
  )


def _shrink_leaf(
  update: Array, weight: Array, fraction: Scalar, amount: Scalar
) -> Array:
  """Returns the update that also shrinks the weight."""
  shrunk = update - fraction * weight
  target = weight + shrunk
  # Not as p' - p: the difference of two near numbers loses the digits of a
  # small update, and a weight that lands on zero must do so exactly.
  shrunk = jnp.where(
    jnp.abs(target) <= amount, -weight, shrunk - amount * jnp.sign(target)
  )
  return shrunk.astype(update.dtype)
