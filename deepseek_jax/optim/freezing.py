"""Training a part of a model, at the cost of that part."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import mask_tree
from deepseek_jax.core.typing import PyTree
from deepseek_jax.optim.readback import scope_of


class FrozenState(NamedTuple):
  """State of the frozen leaves: it holds no arrays at all."""

  scope: PyTree  # the frozen leaves; no arrays

  @property
  def learning_rate(self) -> float:
    """What `learning_rates` reads for a frozen leaf."""
    return 0.0


def freeze_except(
  patterns: Sequence[str],
  *,
  inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Trains the parameters that a pattern matches; the others stay as they are.

  The updates of frozen parameters are exactly 0, also where the gradient is
  NaN, and `learning_rates` reads 0 for them.

  * With `inner`, the whole optimizer, frozen parameters hold no optimizer
    state: training the head of a large model costs the state of the head.
    `inner` sees nothing of them, so that a clipping norm in it is that of the
    trained gradients alone; weight decay does not reach them either.
  * Without, this is a transform for the end of a chain. The optimizer before it
    keeps its state for every parameter, which is what gradual unfreezing of a
    running optimizer needs.

  Where gradient and update are in one `jax.jit`, XLA leaves out what only the
  gradients of frozen parameters need, unless something else looks at them, as
  a clipping norm before this does.

  Args:
    patterns: Regular expressions for the whole paths ("head/.*") of what is
      trained; each must match a parameter. With the state of an NNX module as
      it is, paths end in "/value".
    inner: The optimizer of the trained parameters.

  Returns:
    An `optax.GradientTransformationExtraArgs`; extra arguments such as `value`
    reach `inner`.

  Raises:
    ValueError: At once if there is no pattern, or it is no regular expression;
      at `init` if a pattern matches no parameter.

  >>> tx = freeze_except(["head/.*"], inner=optax.adam(0.1))
  >>> params = {"head": {"bias": jnp.ones(2)}, "trunk": {"bias": jnp.ones(9)}}
  >>> state = tx.init(params)
  >>> print(sum(leaf.size for leaf in jax.tree.leaves(state)))  # m, v, count
  5
  >>> updates, _ = tx.update(params, state, params)
  >>> print(updates["trunk"]["bias"])
  [0. 0. 0. 0. 0. 0. 0. 0. 0.]
  """
  patterns = tuple(_checked(patterns))

  def labels_of(tree):
    name = lambda trained: "train" if trained else "freeze"
    return jax.tree.map(name, mask_tree(patterns, tree))

  inner = optax.identity() if inner is None else inner
  return optax.partition({"train": inner, "freeze": _set_to_zero()}, labels_of)


def _set_to_zero() -> optax.GradientTransformationExtraArgs:
  """`optax.set_to_zero`, with a state that `learning_rates` understands."""

  def init_fn(params):
    return FrozenState(scope=scope_of(params))

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    return jax.tree.map(jnp.zeros_like, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked(patterns: Sequence[str]) -> Sequence[str]:
  mask_tree(patterns, ())  # A tree without leaves: checks the patterns alone.
  if not patterns:
    raise ValueError(
      f"patterns must name what is trained, got {patterns=}, which freezes all."
    )
  return patterns
