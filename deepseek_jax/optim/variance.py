"""Learning rates per tensor that follow the noise of the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from deepseek_jax.core import leaf_paths, require_floating, require_in
from deepseek_jax.core.typing import Count, Params, Path, PyTree, Scalar
from deepseek_jax.optim.balance import (
  Levels,
  PerLeaf,
  balanced_scales,
  check_scaling,
  init_levels,
  per_leaf,
  scale_leaves,
  signal_share,
  square_mean,
  update_levels,
)
from deepseek_jax.optim.guard import zero_non_finite
from deepseek_jax.optim.readback import scope_of


class ScaleByRelativeSnrState(NamedTuple):
  """State of `scale_by_relative_snr`."""

  inner_state: optax.OptState  # holds the moments
  levels: Levels  # of every leaf; 0 until something is known
  rate_scales: PerLeaf  # shape=(leaves,), dtype=float32: the latest used
  scope: PyTree  # the covered leaves; no arrays


class OwnMomentsState(NamedTuple):
  """Moments that are kept when there is no inner transform to read them of."""

  count: Count  # shape=(), dtype=int32: updates done
  mu: PyTree  # like the parameters, in mu_dtype: average gradient
  nu: PerLeaf  # shape=(leaves,), dtype=float32: average mean square


def scale_by_relative_snr(
  inner: optax.GradientTransformation | None = None,
  *,
  power: jax.typing.ArrayLike = 0.5,
  min_scale: jax.typing.ArrayLike = 0.5,
  max_scale: jax.typing.ArrayLike = 2.0,
  decay: jax.typing.ArrayLike = 0.99,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Gives tensors with a clear gradient larger updates, noisy ones smaller.

  u_l ← s_l·u_l, with s_l = clip(c·snr_l^power, min_scale, max_scale) and c such
  that the geometric mean of s over the leaves is 1: rates move between
  tensors, the rate as a whole stays. The scale of a leaf does not change when
  all gradients are multiplied by a constant.

  The signal-to-noise ratio comes from Adam's moments. The average of t
  gradients with weights that decay by b1 still has the share
  κ = (1 - b1)(1 + b1^t) / ((1 + b1)(1 - b1^t)) of the variance of one. With
  M = mean(m̂²) and V = mean(v̂) over a leaf, E[M] = signal + κ·noise and
  E[V] = signal + noise, hence snr = (M - κ·V) / (V - M). Numerator and
  denominator are averaged over updates before the division, and the share of
  signal is kept in [0.001, 0.999]. A leaf about which nothing is known (at
  first, with gradients of 0 only, without moments) has scale 1 and no part in
  the mean. An update uses the averages before it: all is one pass.

  * With `inner`, an optimizer that keeps the moments of the gradient and of its
    square (a state with `mu`, `nu` and `count`, such as `optax.scale_by_adam`):
    its updates are scaled, its moments read, none are kept here.
  * Without, moments are kept of what comes in: one element a parameter, and the
    mean square of a leaf. For plain SGD; before Adam it would do nothing, as
    Adam divides any factor of a leaf out again.

  Cost: reading Adam's moments takes 1.03 to 1.07 times AdamW's update (10 and
  50 million parameters, CPU, `experiments/results/optimizer_cost.json`);
  moments kept here took about 3.5 times in another run.

  It is no tuning knob to start with: as a gain of at most 1 the ratio was
  measured to hurt (that is a smaller learning rate), and normalised to
  geometric mean 1 to be about neutral in steps to a target.

  Args:
    inner: The optimizer to wrap. Guard it with `zero_non_finite`, if it is to
      survive a broken gradient: what it does with one is its own affair, and
      moments that are not finite are not taken in here.
    power: Exponent of the ratio, at least 0; 0 does nothing.
    min_scale: Lower bound of a scale, in (0, 1].
    max_scale: Upper bound of a scale, at least 1.
    decay: Weight of the past in the averages of signal and noise, in [0, 1);
      0.99 looks back about 100 updates.
    b1: Decay of the first moment, in (0, 1); that of `inner`, if given.
    b2: Decay of the second moment, in [0, 1); that of `inner`, if given.
    mu_dtype: Dtype of the first moment that is kept without `inner`, by default
      that of the parameters; `jnp.bfloat16` saves two bytes a parameter.

  Returns:
    An `optax.GradientTransformationExtraArgs`; extra arguments reach `inner`.

  Raises:
    ValueError: If an argument is out of its range; at `init`, if the state of
      `inner` holds no such moments.

  >>> tx = scale_by_relative_snr(b1=0.5, decay=0.0)
  >>> state = tx.init({"clear": jnp.ones(2), "noisy": jnp.ones(2)})
  >>> update = jax.jit(tx.update)
  >>> for sign in (1.0, -1.0, 1.0):
  ...   grads = {"clear": jnp.ones(2), "noisy": sign * jnp.ones(2)}
  ...   updates, state = update(grads, state)
  >>> print(updates["clear"], updates["noisy"])
  [2. 2.] [0.5 0.5]

  References:
    Balles and Hennig, "Dissecting Adam: The Sign, Magnitude and Variance of
    Stochastic Gradients", 2018, https://arxiv.org/abs/1705.07774
    Schaul, Zhang and LeCun, "No More Pesky Learning Rates", 2013,
    https://arxiv.org/abs/1206.1106
  """
  check_scaling(power, min_scale, max_scale, decay)
  _check_moments(inner, b1, b2, mu_dtype)
  keeper = _keep_moments(b1, b2, mu_dtype) if inner is None else inner
  keeper = optax.with_extra_args_support(keeper)

  def init_fn(params):
    inner_state = keeper.init(params)
    _check_covered(inner_state, params)
    size = len(jax.tree.leaves(params))
    return ScaleByRelativeSnrState(
      inner_state=inner_state,
      levels=init_levels(size),
      rate_scales=jnp.ones(size, jnp.float32),
      scope=scope_of(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    updates, inner_state = keeper.update(
      updates, state.inner_state, params, **extra_args
    )
    share = signal_share(state.levels)
    scales = balanced_scales(share / (1 - share), power, min_scale, max_scale)
    levels = update_levels(
      state.levels, _read_levels(inner_state, updates, b1, b2), decay
    )
    return scale_leaves(updates, scales), state._replace(
      inner_state=inner_state, levels=levels, rate_scales=scales
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _keep_moments(
  b1: jax.typing.ArrayLike,
  b2: jax.typing.ArrayLike,
  mu_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
  """Keeps moments of what passes, and changes nothing of it."""
  guard = zero_non_finite()

  def init_fn(params):
    return OwnMomentsState(
      count=jnp.zeros((), jnp.int32),
      mu=jax.tree.map(lambda p: jnp.zeros_like(p, mu_dtype), params),
      nu=jnp.zeros(len(jax.tree.leaves(params)), jnp.float32),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    clean, _ = guard.update(updates, optax.EmptyState())
    squares = per_leaf([square_mean(leaf) for leaf in jax.tree.leaves(clean)])
    # A sum of squares may overflow even though no square does.
    squares = jnp.where(jnp.isfinite(squares), squares, state.nu)
    nu = jnp.asarray(b2 * state.nu + (1 - b2) * squares, jnp.float32)
    mu = jax.tree.map(lambda m, g: _follow(m, g, b1), state.mu, clean)
    count = optax.safe_increment(state.count)
    return updates, state._replace(count=count, mu=mu, nu=nu)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _follow(mu: Array, grad: Array, b1: jax.typing.ArrayLike) -> Array:
  wide = jnp.promote_types(jnp.promote_types(mu.dtype, grad.dtype), jnp.float32)
  new = b1 * mu.astype(wide) + (1 - b1) * grad.astype(wide)
  # What float32 holds may be infinite in a narrower `mu_dtype`.
  fits = jnp.abs(new) <= float(jnp.finfo(mu.dtype).max)
  return jnp.where(fits, new, mu.astype(wide)).astype(mu.dtype)


def _read_levels(
  inner_state: optax.OptState,
  updates: PyTree,
  b1: jax.typing.ArrayLike,
  b2: jax.typing.ArrayLike,
) -> Levels:
  """Returns (1 - κ) times signal and noise, NaN for leaves without moments."""
  found = _find_moments(inner_state, updates)
  nothing = (jnp.asarray(jnp.nan, jnp.float32),) * 2
  pairs = [
    _leaf_levels(*found[path], b1, b2) if path in found else nothing
    for path in leaf_paths(updates)
  ]
  return Levels(*(per_leaf([pair[i] for pair in pairs]) for i in (0, 1)))


def _leaf_levels(moments, index, b1, b2) -> tuple[Scalar, Scalar]:
  """Corrects the moments of a leaf for their short past."""
  mu = jax.tree.leaves(moments.mu)[index]
  own = isinstance(moments, OwnMomentsState)
  nu = moments.nu[index] if own else jax.tree.leaves(moments.nu)[index]
  b1_power = jnp.asarray(b1, jnp.float32) ** moments.count
  b2_power = jnp.asarray(b2, jnp.float32) ** moments.count
  kappa = (1 - b1) * (1 + b1_power) / ((1 + b1) * (1 - b1_power))
  m = square_mean(mu) / (1 - b1_power) ** 2
  v = jnp.mean(nu, dtype=jnp.float32) / (1 - b2_power)
  # One gradient cannot tell signal from noise: κ is 1.
  known = moments.count > 1
  return (
    jnp.where(known, m - kappa * v, jnp.nan).astype(jnp.float32),
    jnp.where(known, v - m, jnp.nan).astype(jnp.float32),
  )


def _find_moments(
  inner_state: optax.OptState, tree: PyTree
) -> dict[Path, tuple[Any, int]]:
  """Maps paths to (state with moments, place among its leaves).

  Leaves that a mask hides from the inner transform have none.
  """
  paths, leaves = leaf_paths(tree), jax.tree.leaves(tree)
  shapes = dict(zip(paths, map(jnp.shape, leaves), strict=True))
  found = {}
  for node in jax.tree.leaves(inner_state, is_leaf=_has_moments):
    if _has_moments(node):
      mus = zip(leaf_paths(node.mu), jax.tree.leaves(node.mu), strict=True)
      for i, (path, mu) in enumerate(mus):
        if shapes.get(path) == jnp.shape(mu):
          found.setdefault(path, (node, i))
  return found


def _has_moments(node: Any) -> bool:
  return all(hasattr(node, name) for name in ("mu", "nu", "count"))


def _check_covered(inner_state: optax.OptState, params: Params) -> None:
  paths = leaf_paths(params)
  if paths and not _find_moments(inner_state, params):
    raise ValueError(
      "inner must keep moments of the gradient (a state with mu, nu and count, "
      "such as that of optax.scale_by_adam), got none for any parameter, of "
      f"{len(paths)}, in a {type(inner_state).__name__}."
    )


def _check_moments(inner, b1, b2, mu_dtype) -> None:
  require_in("(0, 1)", b1=b1)
  require_in("[0, 1)", b2=b2)
  require_floating(mu_dtype=mu_dtype)
  if inner is not None and mu_dtype is not None:
    raise ValueError(
      "mu_dtype must be None with inner (whose moments are read), got "
      f"{mu_dtype=}."
    )
