"""Adam in the eigenbasis of the gradient's covariance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import optax
from jaxtyping import Array, Float32

from deepseek_jax.core.typing import Count, PyTree
from deepseek_jax.optim.folding import (
  MatrixShape,
  fold,
  matrix_shape,
  without_axis_types,
)
from deepseek_jax.optim.newton_schulz import (
  map_leaves,
  share_of_life,
  with_rms,
)

# Updates at the start in which the bases always follow the gradient: they know
# little yet, and it turns fast.
SETTLING = 20
# A side this many times longer than the other keeps its own basis: to turn it
# costs most and gained least.
_ASPECT = 2
# Larger entries of a gradient count as zero: sums of their squares would leave
# the range of float32, and nothing infinite leaves an average again.
_LARGEST = 1e15
# On CPUs older versions of XLA work on the matrices of a stack in parallel and
# wait for all: where a program has many stacks, threads may wait for each other
# for ever (seen in jaxlib 0.10.2, with 24 stacks on 2 cores). One by one they
# take as long, but a stack split between fake devices is gathered first.
_STACKS_HANG = jaxlib.version.__version_info__ < (0, 12)


class Basis(NamedTuple):
  """What one side of a stack of n by n matrices is turned by."""

  covariance: Float32[Array, "stack n n"]  # average of G·Gᵀ, or of Gᵀ·G
  vectors: Float32[Array, "stack n n"]  # its eigenvectors, about, as columns


class SoapState(NamedTuple):
  """State of whitening in an eigenbasis."""

  count: Count  # shape=(), dtype=int32: updates done
  mu: PyTree  # momentum; like the parameters
  nu: PyTree  # mean squares of the turned gradient; likewise, or float32
  rows: PyTree  # a Basis for each parameter, or None where it stays
  columns: PyTree  # likewise


def scale_by_eigenbasis(
  stacked: PyTree,
  *,
  b1: jax.typing.ArrayLike,
  b2: jax.typing.ArrayLike,
  eps: jax.typing.ArrayLike,
  update_rms: jax.typing.ArrayLike,
  every: jax.typing.ArrayLike,
  max_side: int,
  mu_dtype: Any | None,
) -> optax.GradientTransformationExtraArgs:
  """The kind "soap" of `scale_by_whitening`, for the leaves it is for.

  `stacked` is a function from the parameters to the number of stacked axes of
  each; the other arguments are those of `scale_by_whitening`.
  """

  def init_fn(params):
    axes = stacked(params)
    dtype = lambda leaf: mu_dtype or leaf.dtype
    empty = lambda side: jax.tree.map(
      lambda p, k: _empty_basis(matrix_shape(p.shape, k), side, max_side),
      params,
      axes,
    )
    return SoapState(
      count=jnp.zeros((), jnp.int32),
      mu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype(p)), params),
      nu=jax.tree.map(_empty_squares, params),
      rows=empty("rows"),
      columns=empty("columns"),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    count = jnp.asarray(optax.safe_increment(state.count))
    follow = (count <= SETTLING) | (count % every == 0)

    def whiten(grad, mu, nu, rows, columns, follow):
      grad = jnp.where(jnp.abs(grad) < _LARGEST, grad, 0)
      rows = _follow(rows, grad @ _transpose(grad), b2, follow)
      columns = _follow(columns, _transpose(grad) @ grad, b2, follow)
      turned = _turn(grad, rows, columns)
      nu = b2 * nu + (1 - b2) * jnp.square(turned)
      mu = b1 * mu + (1 - b1) * grad
      ahead = b1 * mu + (1 - b1) * grad
      # Turning leaves lengths as they are: the mean of nu is that of squares.
      energy = jnp.mean(nu, (-2, -1), keepdims=True)
      share = share_of_life(ahead, energy, b1)
      square = _normalize(_turn(ahead, rows, columns), nu, eps)
      update = with_rms(_turn_back(square, rows, columns), update_rms)
      return share * update, mu, nu, rows, columns

    def update_leaf(grad, mu, nu, rows, columns, axes):
      shape = matrix_shape(grad.shape, axes)

      def act(grad, mu, nu, rows, columns, follow):
        leaves = grad, mu, nu
        folded = [fold(leaf.astype(jnp.float32), shape) for leaf in leaves]
        *results, rows, columns = whiten(
          folded[0], folded[1], folded[2], rows, columns, follow
        )
        unfolded = (
          result.reshape(leaf.shape).astype(leaf.dtype)
          for result, leaf in zip(results, leaves, strict=True)
        )
        return *unfolded, rows, columns

      results = (grad, mu, nu, rows, columns)
      return without_axis_types(act, results, *results, follow)

    updates, *rest = map_leaves(
      update_leaf,
      5,
      updates,
      state.mu,
      state.nu,
      state.rows,
      state.columns,
      stacked(updates),
    )
    return updates, SoapState(count, *rest)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _empty_squares(leaf: Any) -> Array:
  # The square of a float16 is infinite from 256 on, and 0 below 0.0002.
  return jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.bfloat16))


def _empty_basis(shape: MatrixShape, side: str, max_side: int) -> Basis | None:
  """Returns the basis of a side at the start, or None if it is never turned."""
  size = getattr(shape, side)
  other = shape.rows if side == "columns" else shape.columns
  if size > max_side or size > _ASPECT * other:
    return None
  covariance = jnp.zeros((shape.stack, size, size), jnp.float32)
  return Basis(covariance, covariance + jnp.eye(size, dtype=jnp.float32)[None])


def _follow(
  basis: Basis | None, square: Array, decay: jax.typing.ArrayLike, turn: Array
) -> Basis | None:
  """Takes in a gradient, and moves the eigenvectors one power iteration on."""
  if basis is None:
    return None
  covariance = jnp.asarray(
    decay * basis.covariance + (1 - decay) * square, jnp.float32
  )
  vectors = jax.lax.cond(
    turn,
    lambda covariance, vectors: _orthogonal(covariance @ vectors),
    lambda _, vectors: vectors,
    covariance,
    basis.vectors,
  )
  return Basis(covariance, vectors)


def _orthogonal(x: Array) -> Array:
  """Returns the orthogonal factor of every matrix of a stack."""
  factor = lambda x: jnp.linalg.qr(x)[0]
  if len(x) == 1 or not _STACKS_HANG:
    return factor(x)
  one_by_one = lambda x: jax.lax.map(factor, x)
  return jax.lax.platform_dependent(x, cpu=one_by_one, default=factor)


def _turn(x: Array, rows: Basis | None, columns: Basis | None) -> Array:
  """Returns Lᵀ·x·R: a matrix seen in the bases."""
  x = x if rows is None else _transpose(rows.vectors) @ x
  return x if columns is None else x @ columns.vectors


def _turn_back(x: Array, rows: Basis | None, columns: Basis | None) -> Array:
  """Returns L·x·Rᵀ."""
  x = x if rows is None else rows.vectors @ x
  return x if columns is None else x @ _transpose(columns.vectors)


def _transpose(x: Array) -> Array:
  return jnp.swapaxes(x, -1, -2)


def _normalize(momentum: Array, nu: Array, eps: jax.typing.ArrayLike) -> Array:
  """Divides by the root mean square so far, but not by next to nothing.

  The bias of `nu` is one factor for all; the scale is set afterwards.
  """
  typical = jnp.sqrt(jnp.mean(nu, (-2, -1), keepdims=True))
  spread = jnp.sqrt(nu) + eps * typical
  return momentum / jnp.where(spread > 0, spread, 1)
