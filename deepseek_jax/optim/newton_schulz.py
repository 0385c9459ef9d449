"""Orthogonalization of momentum, by matrix products alone."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from deepseek_jax.core import require_static
from deepseek_jax.core.typing import PyTree
from deepseek_jax.optim.folding import (
  MatrixShape,
  fold,
  matrix_shape,
  without_axis_types,
)

# Each row (a, b, c) is the odd polynomial a·x + b·x³ + c·x⁵ that brings all
# singular values closest to 1, given what the rows before it left of
# [0.001, 1]; the last is the Newton-Schulz iteration that those approach.
POLYNOMIALS = (
  (8.28721201814563, -23.595886519098837, 17.300387312530933),
  (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
  (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
  (3.3184196573706015, -2.488488024314874, 0.51004894012372),
  (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
  (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
  (1.875, -1.25, 0.375),
)
_SAFETY = 1.01  # Rounding must not push a singular value beyond 1.

Variance = Literal["row", "full"] | None


class NewtonSchulzState(NamedTuple):
  """State of whitening by orthogonalization."""

  mu: PyTree  # momentum; like the parameters
  # Mean squares of the orthogonalized momentum, float32: one a row, one an
  # entry, or None.
  variance: PyTree
  energy: PyTree  # mean square of the gradient, float32, [stack, 1, 1] each


def orthogonalize(
  matrices: Float[Array, "*stack m n"], *, steps: int = 5
) -> Float[Array, "*stack m n"]:
  """Moves all singular values of matrices close to 1.

  U·S·Vᵀ becomes about U·Vᵀ, by `steps` odd polynomials of the matrix: three
  matrix products each, no decomposition, exact differentiability aside. With 5
  steps, singular values above a thousandth of the Frobenius norm end between
  0.87 and 1.13; smaller ones grow by as much as they can.

  Args:
    matrices: Of any scale; computed in float32 at least.
    steps: Polynomials, at least 1; 6 end within 0.002 of 1.

  Returns:
    Matrices of the same shape and dtype. Zero stays zero.

  Raises:
    ValueError: If `steps` is below 1, or `matrices` have integer or complex
      entries, or no two axes.

  >>> x = jnp.diag(jnp.array([3.0, 0.1]))
  >>> print(orthogonalize(x, steps=8).round(2))
  [[1. 0.]
   [0. 1.]]

  References:
    Amsel et al., "The Polar Express: Optimal Matrix Sign Methods and Their
    Application to the Muon Algorithm", 2025, https://arxiv.org/abs/2505.16932
    (the polynomials); Jordan et al., "Muon", 2024,
    https://kellerjordan.github.io/posts/muon
  """
  require_static(1, steps=steps)
  dtype = matrices.dtype
  if not jnp.issubdtype(dtype, jnp.floating) or matrices.ndim < 2:
    raise ValueError(
      "matrices must be floating, of two axes or more, got "
      f"{dtype} of shape {matrices.shape}."
    )
  x = matrices.astype(jnp.promote_types(dtype, jnp.float32))
  wide = x.shape[-2] < x.shape[-1]
  x = jnp.swapaxes(x, -1, -2) if wide else x
  # Twice, as the square of an entry may leave the range of its type.
  x = _divide(x, jnp.max(jnp.abs(x), (-2, -1), keepdims=True))
  x = _divide(x, _SAFETY * jnp.linalg.norm(x, axis=(-2, -1), keepdims=True))
  for step in range(steps):
    a, b, c = POLYNOMIALS[min(step, len(POLYNOMIALS) - 1)]
    gram = jnp.swapaxes(x, -1, -2) @ x
    x = a * x + x @ (b * gram + c * gram @ gram)
  return (jnp.swapaxes(x, -1, -2) if wide else x).astype(dtype)


def scale_by_orthogonalization(
  stacked: PyTree,
  *,
  variance: Variance,
  b1: jax.typing.ArrayLike,
  b2: jax.typing.ArrayLike,
  eps: jax.typing.ArrayLike,
  update_rms: jax.typing.ArrayLike,
  steps: int,
  mu_dtype: Any | None,
) -> optax.GradientTransformationExtraArgs:
  """The kind "newton_schulz" of `scale_by_whitening`, for leaves it is for.

  `stacked` is a function from the parameters to the number of stacked axes of
  each, as the arguments otherwise are those of `scale_by_whitening`.
  """

  def init_fn(params):
    dtype = lambda leaf: mu_dtype or leaf.dtype
    mu = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype(p)), params)
    empty = lambda p, k: _empty_variance(matrix_shape(p.shape, k), variance)
    none = lambda p, k: jnp.zeros((matrix_shape(p.shape, k).stack, 1, 1))
    axes = stacked(params)
    return NewtonSchulzState(
      mu=mu,
      variance=jax.tree.map(empty, params, axes),
      energy=jax.tree.map(none, params, axes),
    )

  def update_leaf(grad, mu, spread, energy, axes):
    shape = matrix_shape(grad.shape, axes)

    def act(grad, mu, spread, energy):
      grad32 = grad.astype(jnp.float32)
      energy = b2 * energy + (1 - b2) * mean_square(fold(grad32, shape))
      mu = b1 * mu.astype(jnp.float32) + (1 - b1) * grad32
      ahead = b1 * mu + (1 - b1) * grad32
      share = share_of_life(fold(ahead, shape), energy, b1)
      square = orthogonalize(fold(ahead, shape), steps=steps)
      square, spread = _even_out(square, spread, variance, b2, eps)
      square = with_rms(square, update_rms) * share
      update = square.reshape(grad.shape).astype(grad.dtype)
      return update, mu, spread, energy

    arguments = (grad, mu, spread, energy)
    update, new_mu, *rest = without_axis_types(act, arguments, *arguments)
    return update, new_mu.astype(mu.dtype), *rest

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    axes = stacked(updates)
    updates, *rest = map_leaves(
      update_leaf, 4, updates, state.mu, state.variance, state.energy, axes
    )
    return updates, NewtonSchulzState(*rest)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def map_leaves(function, outputs: int, tree: PyTree, *rest: PyTree) -> tuple:
  """Maps a function of several results; `rest` may go on where leaves end."""
  leaves, treedef = jax.tree.flatten(tree)
  columns = [treedef.flatten_up_to(other) for other in rest]
  results = [function(*entry) for entry in zip(leaves, *columns, strict=True)]
  return tuple(
    jax.tree.unflatten(treedef, [result[i] for result in results])
    for i in range(outputs)
  )


def with_rms(matrices: Array, target: jax.typing.ArrayLike) -> Array:
  """Scales each matrix to a root mean square; zero stays zero."""
  return _divide(matrices, jnp.sqrt(mean_square(matrices))) * target


def mean_square(matrices: Array) -> Array:
  """Returns the mean square of each matrix, [stack, 1, 1]."""
  return jnp.mean(jnp.square(matrices), (-2, -1), keepdims=True)


def share_of_life(
  momentum: Array, energy: Array, b1: jax.typing.ArrayLike
) -> Array:
  """Returns 1 while gradients come; falls with the momentum when they stop.

  An update of fixed length would go on for ever along the last gradient seen,
  in an expert that gets no more tokens or after a layer was frozen. Momentum
  of pure noise is √((1 - b1) / (1 + b1)) times as long as a gradient: below
  half of that, no gradients have come for a while.
  """
  noise = jnp.sqrt((1 - b1) / (1 + b1) * energy)
  length = jnp.sqrt(mean_square(momentum))
  return jnp.minimum(1.0, _divide(2 * length, noise))


def _divide(matrices: Array, scale: Array) -> Array:
  return matrices / jnp.where(scale > 0, scale, 1)


def _empty_variance(shape: MatrixShape, variance: Variance) -> Array | None:
  if variance is None:
    return None
  columns = shape.columns if variance == "full" else 1
  return jnp.zeros((shape.stack, shape.rows, columns), jnp.float32)


def _even_out(square, spread, variance, b2, eps):
  """Divides by the root of the mean squares so far, row by row or entrywise.

  Their bias needs no correction: it is one factor for all, and the scale of
  the whole is set afterwards.
  """
  if variance is None:
    return square, spread
  now = jnp.square(square)
  now = jnp.mean(now, -1, keepdims=True) if variance == "row" else now
  spread = b2 * spread + (1 - b2) * now
  typical = jnp.sqrt(jnp.mean(spread, (-2, -1), keepdims=True))
  return _divide(square, jnp.sqrt(spread) + eps * typical), spread
