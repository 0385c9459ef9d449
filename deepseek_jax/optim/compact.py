"""An optimizer's moments in one or two bytes an element."""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from deepseek_jax.core import require_one_of, require_static
from deepseek_jax.core.typing import Count, Params, PyTree
from deepseek_jax.optim.averaging import AnytimeAverageState
from deepseek_jax.optim.codes import (
  BlockInt8,
  from_int8,
  to_bfloat16,
  to_int8,
)
from deepseek_jax.optim.readback import scope_of


class Rounding(NamedTuple):
  """What the rounding noise is made of, and the leaves it is for."""

  count: Count  # shape=(), dtype=int32: updates done
  scope: PyTree  # the covered leaves; no arrays


class CompactMomentsState(NamedTuple):
  """State of `compact_moments`."""

  inner_state: optax.OptState  # with `BlockInt8` or bfloat16 for moments
  rounding: Rounding


def compact_moments(
  inner: optax.GradientTransformation,
  dtype: Literal["int8", "bfloat16"] = "int8",
  *,
  block: int = 256,
  min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
  """Stores the moments of an optimizer in int8 or bfloat16.

  `inner` sees them in float32; between updates they rest in 1 + 4 / `block`
  bytes an element, or in 2: Adam's two take 2.03 or 4 bytes a parameter, not 8.
  A moment is what lies in the state of `inner` as a tree like the parameters,
  of their shapes. That may be a copy of the parameters too, which would lose
  digits here: so wrap the part that holds moments,
  `optax.chain(compact_moments(optax.scale_by_adam()), ...)`, or let
  `deepseek(moment_dtype="int8")` do it. Averages of parameters and
  schedule-free methods inside are refused.

  Rounding is stochastic and keeps the mean. An average of decay 0.999 moves
  by 0.1 % of the gap a step; neighbouring numbers lie 0.4 % (bfloat16) or
  1.5 % (int8) apart or more: rounded to the nearest it would stick. The noise
  is a hash of place and step, so that a run repeats bit by bit.

  Use it where memory is short, for it takes time. It saves between updates: in
  one, XLA decides how many moments are in float32 at once (on CPU, by default,
  all of them). In int8, a block of the last axis shares one scale, and updates
  carry noise: the final loss of Adam stayed within 1 % of float32 (a byte LM
  and an MLP, mean of three seeds). Choose bfloat16 where the gradients of a
  block differ by a factor of 10,000 and more. What reads the moments of another
  transform, as `scale_by_relative_snr` does, belongs inside.

  Args:
    inner: Any Optax transform.
    dtype: "int8" or "bfloat16".
    block: Elements that share a scale, at least 2; less where it does not
      divide the last axis (`codes.block_size`).
    min_size: Moments of fewer elements stay as they are, and so do, in int8,
      those whose last axis has one element.

  Returns:
    An `optax.GradientTransformationExtraArgs`. An element of a moment that is
    not finite is stored as 0; put `zero_non_finite` in front all the same, for
    `inner` sees the gradient first. `expand_moments` gives the moments back.

  Raises:
    ValueError: If an argument is out of its range; at `init`, if `inner` holds
      an average of the parameters.

  >>> tx = compact_moments(optax.scale_by_adam())
  >>> params = {"kernel": jnp.ones((64, 256))}
  >>> state = tx.init(params)
  >>> updates, state = tx.update(params, state, params)
  >>> print(f"{bytes_per_parameter(state, params):.2f}")
  2.03

  References:
    Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022,
    https://arxiv.org/abs/2110.02861
  """
  require_one_of(("int8", "bfloat16"), dtype=dtype)
  require_static(2, block=block)
  require_static(1, min_size=min_size)
  inner = optax.with_extra_args_support(inner)
  is_packed = lambda leaf: _is_packed(leaf, dtype, min_size)

  def pack_all(state, params, count):
    number = itertools.count()  # Every moment gets noise of its own.

    def pack(leaf):
      if not is_packed(leaf):
        return leaf
      if dtype == "int8":
        return to_int8(leaf, count, next(number), block)
      return to_bfloat16(leaf, count, next(number))

    return _map_moments(pack, state, params)

  def unpack_all(state, params):
    # Also what was bfloat16 from the start, with parameters of that type: its
    # averages need the digits between two steps no less.
    unpack = lambda leaf: leaf.astype(jnp.float32) if is_packed(leaf) else leaf
    return _map_moments(unpack, expand_moments(state), params)

  def init_fn(params):
    count = jnp.zeros((), jnp.int32)
    inner_state = inner.init(params)
    _check_no_average(inner_state)
    # Else XLA works out the codes of zeros while it compiles, for a minute.
    inner_state = jax.lax.optimization_barrier(inner_state)
    inner_state = pack_all(inner_state, params, count)
    return CompactMomentsState(inner_state, Rounding(count, scope_of(params)))

  def update_fn(updates, state, params=None, **extra_args):
    grads, rounding = updates, state.rounding
    updates, inner_state = inner.update(
      grads, unpack_all(state.inner_state, grads), params, **extra_args
    )
    count = optax.safe_increment(rounding.count)
    inner_state = pack_all(inner_state, grads, count)
    # Moments in float32 would widen the updates of smaller parameters.
    updates = jax.tree.map(
      lambda update, leaf: update.astype(jnp.result_type(leaf)),
      updates,
      grads if params is None else params,
    )
    rounding = rounding._replace(count=count)
    return updates, CompactMomentsState(inner_state, rounding)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def expand_moments(opt_state: optax.OptState) -> optax.OptState:
  """Returns the state of any optimizer with its int8 moments in float32.

  What reads moments then works as ever, such as `optax.tree.get`.

  >>> tx = compact_moments(optax.scale_by_adam(), min_size=1)
  >>> grads = jnp.array([1.0, 0.0])
  >>> _, state = tx.update(grads, tx.init(grads))
  >>> print(optax.tree.get(expand_moments(state), "mu"))
  [0.1 0. ]
  """
  return jax.tree.map(
    lambda node: from_int8(node) if _is_block(node) else node,
    opt_state,
    is_leaf=_is_block,
  )


def bytes_per_parameter(opt_state: optax.OptState, params: Params) -> float:
  """Returns the memory of an optimizer's state, in bytes a parameter.

  Args:
    opt_state: Any state, also an abstract one (of `jax.eval_shape`).
    params: The parameters that it was made for, also abstract.

  Returns:
    All bytes of the state by the number of parameters.

  Raises:
    ValueError: If there are no parameters.

  >>> params = jnp.zeros(1000)
  >>> bytes_per_parameter(optax.adam(1e-3).init(params), params)
  8.004
  """
  size = lambda leaf: math.prod(jnp.shape(leaf))
  held = sum(
    size(leaf) * jnp.result_type(leaf).itemsize
    for leaf in jax.tree.leaves(opt_state)
  )
  parameters = sum(map(size, jax.tree.leaves(params)))
  if parameters == 0:
    raise ValueError("params must hold a parameter, got none.")
  return held / parameters


def _is_packed(leaf: Array, dtype: str, min_size: int) -> bool:
  if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.size < min_size:
    return False
  return dtype == "bfloat16" or (leaf.ndim > 0 and leaf.shape[-1] > 1)


def _map_moments(
  function: Callable[[Array], Any], state: PyTree, params: Params
) -> PyTree:
  """Applies a function to the arrays of those trees that are like `params`.

  Inside `optax.masked` such a tree has `MaskedNode` in place of some arrays.
  """
  leaves, structure = jax.tree.flatten(params, is_leaf=_is_masked)

  def are_moments(node):
    found, treedef = jax.tree.flatten(node, is_leaf=_is_masked)
    return treedef == structure and all(map(_is_like, found, leaves))

  def visit(node):
    return jax.tree.map(function, node) if are_moments(node) else node

  return jax.tree.map(visit, state, is_leaf=are_moments)


def _is_like(leaf: Any, param: Any) -> bool:
  return _is_masked(leaf) or jnp.shape(leaf) == jnp.shape(param)


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def _is_block(node: Any) -> bool:
  return isinstance(node, BlockInt8)


def _check_no_average(state: optax.OptState) -> None:
  kinds = (AnytimeAverageState, optax.contrib.ScheduleFreeState)
  is_average = lambda node: isinstance(node, kinds)
  for node in jax.tree.leaves(state, is_leaf=is_average):
    if is_average(node):
      raise ValueError(
        "inner must hold moments, not an average of the parameters, which "
        f"would lose digits, got a {type(node).__name__} in its state. Wrap "
        "the moments inside: deepseek(moment_dtype='int8'), or "
        "optax.chain(compact_moments(optax.scale_by_adam()), ...)."
      )
