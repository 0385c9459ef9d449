"""An average of the iterates that is ready at any step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from deepseek_jax.core import (
  leaf_paths,
  map_with_paths,
  require_floating,
  require_in,
)
from deepseek_jax.core.typing import Count, Params, Path, PyTree, Scalar

_GOLDEN = 0x9E3779B9  # 2³² over the golden ratio: its multiples spread evenly


class AnytimeAverageState(NamedTuple):
  """State of `anytime_average`; no displacement is ever NaN or infinite."""

  count: Count  # shape=(), dtype=int32: updates done
  displacement: PyTree  # like params, in `dtype`: the average minus the params
  inner_state: optax.OptState


def anytime_average(
  inner: optax.GradientTransformation,
  fraction: jax.typing.ArrayLike = 0.1,
  *,
  dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Averages the iterates of an optimizer over the latest part of the run.

  x̄ₜ = x̄ₜ₋₁ + cₜ·(xₜ - x̄ₜ₋₁) with cₜ = 1 / (1 + fraction·(t - 1)): at every
  step t, the window of an exponential average that is `fraction` of the run so
  far. The weight of an iterate grows with the power 1/fraction - 1 of its
  time, and their mean age is fraction/(1 + fraction)·t. The updates are those
  of `inner`, unchanged; `averaged_params` gives x̄.

  It takes the place of a decaying schedule where the length of the run is not
  known: train at a constant rate, and evaluate and save the AVERAGED
  parameters at any step. Where the length is known, try a cosine first: Adam
  at a constant rate with this average took 1.11 times the steps of tuned AdamW
  to a target (three small workloads, few rates tried). Batch norm's statistics
  belong to the parameters trained on, so recompute them for the average.
  `optax.contrib.schedule_free` takes gradients between iterate and average;
  here they are taken at the iterate.

  The state holds d = x̄ - x, which follows from the update u alone,
  d ← (1 - c)·(d - u), and starts at zero. What `inner` returns must be what is
  added to the parameters: only `optax.MultiSteps`, or what comes before in a
  chain, may stand outside. With `params`, u is taken as `optax.apply_updates`
  will round it, so that x̄ is the average of the parameters as stored, also in
  bfloat16.

  Args:
    inner: Any Optax transform, its learning rate included.
    fraction: Width of the average as a fraction of the run so far, in [0, 1];
      1 is the plain mean of all iterates, 0 the latest alone.
    dtype: Floating dtype of the displacement, that of the parameters by
      default and for complex ones. `jnp.bfloat16` saves two bytes a parameter:
      steps far below its resolution still count, as it is rounded up or down
      in proportion.

  Returns:
    An `optax.GradientTransformationExtraArgs`. It hands extra arguments on.

  Raises:
    ValueError: If `fraction` is out of its range, or `dtype` is not floating.

  >>> tx = anytime_average(optax.sgd(1.0), fraction=1.0)
  >>> params = jnp.zeros(2)
  >>> state = tx.init(params)
  >>> for _ in range(3):
  ...   updates, state = tx.update(-jnp.ones(2), state, params)
  ...   params = optax.apply_updates(params, updates)
  >>> print(params, averaged_params(state, params))
  [3. 3.] [2. 2.]

  References:
    Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth
    Optimization", 2013, https://arxiv.org/abs/1212.1824 (the weights)

    Cutkosky, "Anytime Online-to-Batch, Optimism and Acceleration", 2019,
    https://arxiv.org/abs/1903.00974

    Defazio et al., "The Road Less Scheduled", 2024,
    https://arxiv.org/abs/2405.15682
  """
  require_in("[0, 1]", fraction=fraction)
  require_floating(dtype=dtype)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return AnytimeAverageState(
      count=jnp.zeros((), jnp.int32),
      displacement=jax.tree.map(lambda p: _zeros(p, dtype), params),
      inner_state=inner.init(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    updates, inner_state = inner.update(
      updates, state.inner_state, params, **extra_args
    )
    past = fraction * state.count.astype(jnp.float32)
    keep = past / (1 + past)  # 1 - c, exactly 0 at the first update
    dither = _dither(state.count)
    moves = updates if params is None else _moves(params, updates)
    displacement = jax.tree.map(
      lambda d, move: _follow(d, move, keep, dither), state.displacement, moves
    )
    return updates, state._replace(
      count=optax.safe_increment(state.count),
      displacement=displacement,
      inner_state=inner_state,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def averaged_params(opt_state: optax.OptState, params: Params) -> Params:
  """Returns the parameters to evaluate and to save.

  Looks for the state of `anytime_average` anywhere in `opt_state`: in chains
  and partitions, under masks, `optax.inject_hyperparams` and
  `optax.MultiSteps`. A parameter that no average covers is returned as it is,
  so a training loop can ask of any optimizer.

  The state holds how far the average is from the parameters of ITS step. Ask
  with those: with the parameters before the update, or of another checkpoint,
  the answer is wrong by the difference, and nothing can notice.

  Args:
    opt_state: The state of any Optax transform, on the host or traced.
    params: The parameters of the same step, after `optax.apply_updates`.

  Returns:
    A tree like `params`, in their dtypes; `params` itself if there is no
    average in the state.

  Raises:
    ValueError: If a parameter has two averages, or the state was made for
      other parameters; the message names the paths.

  >>> tx = optax.chain(optax.clip(1.0), anytime_average(optax.adam(1e-2)))
  >>> params = {"kernel": jnp.ones(2)}
  >>> print(averaged_params(tx.init(params), params))
  {'kernel': Array([1., 1.], dtype=float32)}
  """
  displacements: dict[Path, Array] = {}
  averages = _find(opt_state)
  for state in averages:
    # A mask may hide whole subtrees: paths fit where structures do not.
    found = dict(
      zip(
        leaf_paths(state.displacement),
        jax.tree.leaves(state.displacement),
        strict=True,
      )
    )
    if twice := sorted(found.keys() & displacements.keys()):
      raise ValueError(
        f"opt_state must hold one average of a parameter, got two of {twice}."
      )
    displacements |= found
  if not averages:
    return params
  if unknown := sorted(displacements.keys() - set(leaf_paths(params))):
    raise ValueError(
      "opt_state must have been made for params, got an average of "
      f"{unknown}, which they lack."
    )

  def average(path, leaf):
    if path not in displacements:
      return leaf
    averaged = leaf + displacements[path]
    return averaged.astype(jnp.result_type(leaf))

  return map_with_paths(average, params)


def _find(tree: PyTree) -> list[AnytimeAverageState]:
  """Returns the states of averages in a state, outer before inner."""
  nodes = jax.tree.leaves(tree, is_leaf=_is_average)
  found = [node for node in nodes if _is_average(node)]
  return found + [s for state in found for s in _find(state.inner_state)]


def _is_average(node: Any) -> bool:
  return isinstance(node, AnytimeAverageState)


def _zeros(leaf: Any, dtype: Any | None) -> Array:
  own = jnp.result_type(leaf)
  real = jnp.issubdtype(own, jnp.floating)
  return jnp.zeros_like(leaf, dtype=dtype if dtype and real else own)


def _moves(params: Params, updates: PyTree) -> PyTree:
  """Returns by how much the updates will move the parameters as stored."""

  def move(leaf, update):
    leaf = jnp.asarray(leaf)  # It may be a Python number.
    wide = jnp.promote_types(jnp.float32, jnp.result_type(leaf, update))
    after = leaf.astype(wide) + update.astype(wide)
    # Both ends, though `leaf` is exact: float16 subnormals count as zero here,
    # and would be counted at each step if one end alone were rounded.
    return _as_stored(after, leaf.dtype) - _as_stored(leaf, leaf.dtype)

  return jax.tree.map(move, params, updates)


def _as_stored(x: Array, dtype: Any) -> Array:
  """Rounds to what `dtype` can hold, in float32 at least.

  XLA may drop a conversion to bfloat16 and back; it may not drop this.
  """
  wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  if jnp.dtype(dtype).itemsize >= wide.dtype.itemsize:
    return wide
  info = jnp.finfo(dtype)
  return jax.lax.reduce_precision(wide, info.nexp, info.nmant)


def _follow(d: Array, move: Array, keep: Scalar, dither: Array) -> Array:
  wide = jnp.promote_types(jnp.float32, jnp.result_type(d, move))
  exact = keep * (d.astype(wide) - move.astype(wide))
  new = exact
  if d.dtype.itemsize < 4:
    new = _round_in_proportion(exact.astype(jnp.float32), d.dtype, dither)
  new = new.astype(d.dtype)
  # Asked of both: the rounding can make a number of the bits of a NaN.
  return jnp.where(jnp.isfinite(exact) & jnp.isfinite(new), new, d)


def _dither(count: Count) -> Array:
  """Returns 32 bits that are evenly spread over any stretch of time.

  The multiples of the golden ratio modulo 1: as good as random numbers for
  rounding, at no cost, and the same ones when a run is resumed.
  """
  return count.astype(jnp.uint32) * jnp.uint32(_GOLDEN)  # modulo 2³²


def _round_in_proportion(x: Array, dtype: Any, dither: Array) -> Array:
  """Rounds to `dtype` up or down, on average over time to x itself.

  Rounding to the nearest would lose every change below half the spacing: a
  bfloat16 could neither grow beyond some 500 steps nor fade away after them.
  """
  lost = jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits = (bits + (dither >> (32 - lost))) >> lost << lost
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
