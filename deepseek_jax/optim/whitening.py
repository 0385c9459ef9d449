"""Whitening: updates that are equally long in all directions of a matrix."""

from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import (
  map_with_paths,
  match_rules,
  require_floating,
  require_in,
  require_one_of,
  require_static,
  require_whole,
)
from deepseek_jax.core.typing import PyTree, Rules
from deepseek_jax.optim.folding import matrix_shape
from deepseek_jax.optim.guard import zero_non_finite
from deepseek_jax.optim.newton_schulz import (
  Variance,
  scale_by_orthogonalization,
)
from deepseek_jax.optim.soap import scale_by_eigenbasis

Kind = Literal["newton_schulz", "soap"]
KINDS = ("newton_schulz", "soap", "adam")


def scale_by_whitening(
  kind: Kind = "newton_schulz",
  *,
  variance: Variance = "row",
  labels: Rules[str] | Callable[[PyTree], PyTree] | PyTree | None = None,
  stacked: Rules[int] = (),
  b1: jax.typing.ArrayLike = 0.95,
  b2: jax.typing.ArrayLike = 0.95,
  eps: jax.typing.ArrayLike = 1e-2,
  update_rms: jax.typing.ArrayLike = 0.2,
  steps: int = 5,
  every: jax.typing.ArrayLike = 5,
  max_side: int = 2048,
  mu_dtype: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Evens out the directions of the momentum of every matrix.

  Adam makes the entries of an update equally large; a matrix whose rows move
  alike still moves along few directions. With M the (Nesterov) momentum of a
  matrix:

  * `"newton_schulz"`: U·Vᵀ of M's singular value decomposition U·S·Vᵀ, by
    matrix products alone (Muon), then divided by the root mean square of each
    row so far (`variance`).
  * `"soap"`: Adam in the eigenbases L and R of the average G·Gᵀ and Gᵀ·G,
    L·adam(Lᵀ·M·R)·Rᵀ, where the work of turning the bases is done every few
    updates. A side more than twice as long as the other keeps its own basis.

  Either is scaled to the root mean square `update_rms` for every matrix, about
  that of Adam's updates, so that Adam's learning rates and decay carry over.
  Parameters that are no matrices, with a side of 1, or complex ones, get Adam
  times `update_rms`: all parameters move by about as much, and a rate too high
  for one kind is not far too high for another. When gradients stop, so do the
  updates, with the momentum.

  Which one: in our benchmark of small models "soap" needs fewer steps
  throughout; "newton_schulz" keeps half of Adam's state and its cost does not
  depend on decompositions, so it is the one for large matrices. Neither helps
  where a step costs less than the whitening: see
  `experiments/results/optimizer_cost.json` for the crossover.

  Args:
    kind: How the matrices are whitened.
    variance: After "newton_schulz", what is divided by its root mean square so
      far: each row, each entry ("full"), or nothing. Rows and columns are
      those of `matrix_shape`.
    labels: Which parameter gets which kind, or "adam": ordered (pattern, kind)
      rules that cover every parameter, a tree of labels, or a function from
      parameters to such a tree. A list or a tuple is taken for rules: where
      the parameters are one, give a function. By default every matrix gets
      `kind`.
    stacked: Ordered (pattern, number of leading axes) rules for parameters
      that are stacks of matrices, such as the layers of a scan; all others are
      one matrix, folded where it is squarest.
    b1: Decay of the momentum, in [0, 1); of Adam's too.
    b2: Decay of the mean squares and covariances, in [0, 1); of Adam's too.
    eps: Least root mean square that is divided by, as a fraction of the
      typical one of the matrix; at least 0.
    update_rms: Root mean square of the update of a matrix, and the factor of
      Adam's; above 0.
    steps: Polynomials of "newton_schulz", at least 1.
    every: Updates from one turn of the bases of "soap" to the next, at least
      1. In the first 20 updates they turn each time. Under `jax.vmap` over
      states it saves nothing, as both branches are computed there.
    max_side: Longer sides keep their own basis in "soap", at least 2: memory
      and work grow with the square and the cube.
    mu_dtype: Type of the momentum, that of the parameters by default.

  Returns:
    An `optax.GradientTransformationExtraArgs`; a learning rate of Adam's size
    follows it.

  Raises:
    ValueError: If an argument is out of its range; at `init`, if a label is
      unknown, rules leave a parameter uncovered, or a parameter labelled for
      whitening is no matrix.

  >>> import jax.numpy as jnp
  >>> tx = optax.chain(scale_by_whitening(), optax.scale_by_learning_rate(0.01))
  >>> params = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
  >>> grads = {"kernel": jnp.diag(jnp.array([9.0, 1.0])), "bias": jnp.ones(2)}
  >>> updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  >>> print(updates["kernel"].round(4) + 0.0)
  [[-0.0028  0.    ]
   [ 0.     -0.0028]]

  References:
    Jordan et al., "Muon", 2024, https://kellerjordan.github.io/posts/muon;
    Li et al., "NorMuon", 2025, https://arxiv.org/abs/2510.05491 (row variance);
    Liu et al., "Muon is Scalable for LLM Training", 2025,
    https://arxiv.org/abs/2502.16982 (the scale of 0.2);
    Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024,
    https://arxiv.org/abs/2409.11321
  """
  require_one_of(KINDS[:2], kind=kind)
  require_one_of(("row", "full", None), variance=variance)
  require_in("[0, 1)", b1=b1, b2=b2)
  require_in("[0, inf)", eps=eps)
  require_in("(0, inf)", update_rms=update_rms)
  require_whole(1, every=every)
  require_static(1, steps=steps)
  require_static(2, max_side=max_side)
  require_floating(mu_dtype=mu_dtype)
  stacked = tuple(stacked)
  axes = lambda tree: stacked_axes(tree, stacked)
  shared: dict[str, Any] = {"b1": b1, "b2": b2, "mu_dtype": mu_dtype}
  ours = shared | {"eps": eps, "update_rms": update_rms}
  kinds: dict[Hashable, optax.GradientTransformation] = {
    "newton_schulz": scale_by_orthogonalization(
      axes, variance=variance, steps=steps, **ours
    ),
    "soap": scale_by_eigenbasis(axes, every=every, max_side=max_side, **ours),
    "adam": _scaled(optax.scale_by_adam(**shared), update_rms),
  }
  choose = lambda tree: _labels(tree, labels, kind, axes)
  return optax.chain(zero_non_finite(), optax.partition(kinds, choose))


def _scaled(
  tx: optax.GradientTransformation, factor: jax.typing.ArrayLike
) -> optax.GradientTransformation:
  """Multiplies what comes out, in the types of what comes in."""

  def update_fn(updates, state, params=None):
    scaled, state = tx.update(updates, state, params)
    # Adam's own come in that of its moment.
    keep = lambda new, old: (factor * new).astype(old.dtype)
    return jax.tree.map(keep, scaled, updates), state

  return optax.GradientTransformation(tx.init, update_fn)


def stacked_axes(tree: PyTree, stacked: Rules[int]) -> PyTree:
  """Returns the number of stacked axes of every leaf."""
  # The kinds see their own leaves only, where a rule may find none.
  part = any(map(_is_masked, jax.tree.leaves(tree, is_leaf=_is_masked)))
  axes = match_rules(stacked, tree, default=0, allow_unused=part)

  def check(path, leaf, count):
    if not (isinstance(count, int) and 0 <= count <= jnp.ndim(leaf)):
      raise ValueError(
        "stacked must give a number of axes that the parameter has, got "
        f"{count!r} for {path!r} of shape {jnp.shape(leaf)}."
      )
    return count

  return map_with_paths(check, tree, axes)


def short_side(leaf: Any, count: int) -> int:
  """Returns the shorter side of a parameter, 1 if it is no real matrix."""
  shape = matrix_shape(jnp.shape(leaf), count)
  is_real = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
  return max(min(shape.rows, shape.columns), 1) if is_real else 1


def _is_masked(leaf: Any) -> bool:
  return isinstance(leaf, optax.MaskedNode)


def _labels(tree: PyTree, labels: Any, kind: Kind, axes: Any) -> PyTree:
  """Returns the kind of every leaf, checked."""
  is_matrix = lambda leaf, count: short_side(leaf, count) > 1

  def check(path, leaf, count, label):
    if label not in KINDS:
      raise ValueError(
        f"labels must be among {KINDS}, got {label!r} for {path!r}."
      )
    if label != "adam" and not is_matrix(leaf, count):
      raise ValueError(
        f"only real matrices can be whitened, got {label!r} for {path!r} of "
        f"shape {jnp.shape(leaf)} and {jnp.result_type(leaf)}; label it 'adam'."
      )
    return label

  counts = axes(tree)
  if labels is None:
    return jax.tree.map(
      lambda leaf, count: kind if is_matrix(leaf, count) else "adam",
      tree,
      counts,
    )
  if callable(labels):
    chosen = labels(tree)
  elif isinstance(labels, list | tuple):
    chosen = match_rules(labels, tree)
  else:
    chosen = labels
  return map_with_paths(check, tree, counts, chosen)
