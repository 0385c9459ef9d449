"""Learning rates of their own for parts of a model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from deepseek_jax.core import multiplier_tree
from deepseek_jax.core.typing import PyTree, Rules
from deepseek_jax.optim.readback import scope_of


class ScaleByLayerState(NamedTuple):
  """State of `scale_by_layer`: a record for `learning_rates`, no memory."""

  rate_scales: Float32[Array, " leaves"]  # shape=(leaves,), dtype=float32
  scope: PyTree  # the covered leaves; no arrays


def scale_by_layer(
  rules: Rules[float],
) -> optax.GradientTransformationExtraArgs:
  """Multiplies the update of every parameter by the multiplier of its layer.

  u ← m(path)·u, with m from an ordered table of rules. Put it after the
  optimizer's normalisation: before Adam it would do nothing, as Adam divides
  any constant factor out again. After `optax.add_decayed_weights` it scales
  the decay as well. A multiplier of 0 gives an update of exactly 0, whatever
  the gradient is; the optimizer keeps its state for the frozen leaves all the
  same.

  Use it to fine-tune (a small multiplier for the pre-trained trunk), or for
  the rates by level that the published description asks for without saying
  how. It is no tuning knob to start with: no gain was measured on models
  trained from scratch.

  Args:
    rules: Ordered (regular expression, multiplier) pairs. A pattern must match
      the whole path of a parameter ("stages/0/kernel"); the first match
      decides. Multipliers are finite and not negative.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state's `rate_scales` hold
    the multipliers in the order of `jax.tree.leaves`; `learning_rates` reads
    them by path.

  Raises:
    ValueError: At once if a multiplier or a pattern is no such thing; at
      `init` if a parameter is uncovered, or if a rule matches nothing or only
      what earlier rules take. The message names the paths.

  >>> tx = scale_by_layer([("head/.*", 1.0), (".*", 0.1)])
  >>> params = {"head": {"bias": jnp.ones(1)}, "trunk": {"bias": jnp.ones(1)}}
  >>> updates, _ = tx.update(params, tx.init(params))
  >>> print(updates["head"]["bias"], updates["trunk"]["bias"])
  [1.] [0.1]
  """
  rules = tuple(rules)
  multiplier_tree(rules, ())  # A tree without leaves: checks the table alone.

  def init_fn(params):
    return _state(multiplier_tree(rules, params))

  def update_fn(updates, state, params=None, **extra_args):
    del state, params, extra_args
    # From the rules rather than from the state, so that a restored checkpoint
    # cannot bring back the multipliers of an older table.
    multipliers = multiplier_tree(rules, updates)
    updates = jax.tree.map(_scale_leaf, updates, multipliers)
    return updates, _state(multipliers)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _state(multipliers: PyTree) -> ScaleByLayerState:
  scales = jnp.asarray(jax.tree.leaves(multipliers), jnp.float32)
  return ScaleByLayerState(rate_scales=scales, scope=scope_of(multipliers))


def _scale_leaf(update: Array, multiplier: float) -> Array:
  # A frozen layer must not move even when its gradient is NaN.
  if multiplier == 0:
    return jnp.zeros_like(update)
  return update if multiplier == 1 else multiplier * update
