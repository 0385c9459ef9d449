"""Gradient averages as products of two thin matrices."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from deepseek_jax.comm.axes import Axes, AxisName
from deepseek_jax.comm.exchange import MIN_SIZE, Leaf, exchange
from deepseek_jax.core.arguments import require_static
from deepseek_jax.core.typing import PyTree


def power_sgd(
  axis_name: AxisName,
  rank: int = 4,
  *,
  warmup: int = 0,
  specs: PyTree | None = None,
  min_size: int = MIN_SIZE,
  exempt: Sequence[str] = (),
) -> optax.GradientTransformationExtraArgs:
  """Averages gradients over devices as products of rank `rank`.

  A parameter of more than two dimensions is a matrix whose columns are its last
  one. With M = g + e, a device's gradient and what it has not sent yet, and Q
  what the last step left,

      P = orthogonal columns of mean(M·Q)
      Q = mean(Mᵀ·P)
      the mean is P·Qᵀ, and e = M - P·Qᵀ,

  one step of a power iteration that goes on from step to step. P and Q are all
  that is sent: (rows + columns)·rank of rows·columns numbers, in one all-reduce
  each for all matrices. See `int_all_reduce` for how to use it.

  Args:
    axis_name: The mesh axis, or axes, over which the batch is split.
    rank: Columns of P and of Q, at least 1.
    warmup: Exchanges at the start that are in float32, at least 0.
    specs: Of parameters that are cut over one of the axes.
    min_size: Parameters with fewer elements are averaged in float32.
    exempt: Patterns of others that are.

  Returns:
    An `optax.GradientTransformationExtraArgs`, as `int_all_reduce` does.

  Raises:
    ValueError: As `int_all_reduce`; at `init`, if `rank` is above the rows or
      columns of a matrix.

  References:
    Vogels, Karimireddy and Jaggi, "PowerSGD: Practical Low-Rank Gradient
    Compression for Distributed Optimization", 2019,
    https://arxiv.org/abs/1905.13727
  """
  require_static(1, rank=rank)
  return exchange(
    LowRank(Axes.of(axis_name, specs), rank),
    specs=specs,
    min_size=min_size,
    exempt=exempt,
    warmup=warmup,
  )


@dataclasses.dataclass(frozen=True)
class LowRank:
  """Sends two factors of every matrix; those of one shape work as one stack.

  Attributes:
    axes: Over which devices.
    rank: Of the products.
  """

  axes: Axes
  rank: int

  def init(self, leaves: Sequence[Leaf]) -> PyTree:
    """Returns no errors, and a random Q, the same on all devices."""
    errors, factors = {}, {}
    for shape, group in self._groups(leaves).items():
      _check_rank(self.rank, shape, group)
      name = _name(shape)
      errors[name] = jnp.zeros((1, len(group), *shape), jnp.float32)
      key = jax.random.fold_in(jax.random.key(0), math.prod(shape))
      factors[name] = jax.random.normal(
        key, (1, len(group), shape[1], self.rank), jnp.float32
      )
    return {"left": errors, "factors": factors}

  def __call__(
    self,
    grads: Sequence[Array],
    leaves: Sequence[Leaf],
    own: PyTree,
    count: Array,
  ) -> tuple[list[Array], PyTree, Array, Array]:
    """Returns means, the state, and squares of what is left and of all."""
    del count
    places = {leaf.index: i for i, leaf in enumerate(leaves)}
    groups = self._groups(leaves)
    wanted = {
      _name(shape): own["left"][_name(shape)][0]
      + jnp.stack(
        [
          grads[places[x.index]].astype(jnp.float32).reshape(shape)
          for x in group
        ]
      )
      for shape, group in groups.items()
    }
    tall = {name: m @ own["factors"][name][0] for name, m in wanted.items()}
    tall = jax.lax.pmean(tall, self.axes.names)
    tall = {name: orthogonal(p) for name, p in tall.items()}
    wide = {
      name: jnp.swapaxes(m, 1, 2) @ tall[name] for name, m in wanted.items()
    }
    wide = jax.lax.pmean(wide, self.axes.names)
    found: list[Array] = [jnp.zeros(())] * len(leaves)
    left, lost, whole = {}, jnp.float32(0), jnp.float32(0)
    for shape, group in groups.items():
      name = _name(shape)
      product = tall[name] @ jnp.swapaxes(wide[name], 1, 2)
      error = wanted[name] - product
      left[name] = error[None]
      lost += jnp.sum(jnp.square(error))
      whole += jnp.sum(jnp.square(wanted[name]))
      for one, leaf in zip(product, group, strict=True):
        grad = grads[places[leaf.index]]
        one = one.reshape(grad.shape).astype(grad.dtype)
        found[places[leaf.index]] = self._part(one, leaf)
    # A column that found nothing would never find anything again.
    factors = {
      name: jnp.where(
        jnp.any(q != 0, 1, keepdims=True), q, own["factors"][name][0]
      )[None]
      for name, q in wide.items()
    }
    return found, {"left": left, "factors": factors}, lost, whole

  def sent_bytes(self, leaves: Sequence[Leaf]) -> float:
    """Returns the bytes that a device sends."""
    n = self.axes.devices
    sent = 0
    for shape, group in self._groups(leaves).items():
      sent += len(group) * sum(shape) * self.rank * 4
    return 2 * (n - 1) / n * sent

  def _groups(
    self, leaves: Sequence[Leaf]
  ) -> dict[tuple[int, int], list[Leaf]]:
    """Returns the leaves by the shape of their gradients as matrices."""
    groups = defaultdict(list)
    for leaf in leaves:
      shape = leaf.whole(self.axes)
      groups[math.prod(shape[:-1]), shape[-1]].append(leaf)
    return dict(groups)

  def _part(self, mean: Array, leaf: Leaf) -> Array:
    """Returns a parameter's part of the mean."""
    if leaf.dim is None:
      return mean
    size = leaf.shape[leaf.dim]
    start = jax.lax.axis_index(self.axes.sharded) * size
    return jax.lax.dynamic_slice_in_dim(mean, start, size, leaf.dim)


def orthogonal(
  x: Float32[Array, "k n r"],
) -> Float32[Array, "k n r"]:
  """Returns matrices with orthonormal columns that span those of `x`.

  By Gram and Schmidt, column by column and each twice: of a few columns faster
  than a QR decomposition, and the same on all devices. Columns that depend on
  the others become zero.

  >>> print(orthogonal(jnp.array([[[3.0, 1.0], [0.0, 2.0]]])))
  [[[1. 0.]
    [0. 1.]]]
  """

  def step(done, column):
    index, v = column
    size = jnp.linalg.norm(v, axis=-1, keepdims=True)
    for _ in range(2):
      v = v - jnp.einsum("knr,kmr,km->kn", done, done, v)
    rest = jnp.linalg.norm(v, axis=-1, keepdims=True)
    # What is left of a dependent column is rounding.
    v = jnp.where(rest > 1e-5 * size, v / jnp.maximum(rest, 1e-30), 0)
    return done.at[..., index].set(v), None

  columns = (jnp.arange(x.shape[-1]), jnp.moveaxis(x, -1, 0))
  return jax.lax.scan(step, jnp.zeros_like(x), columns)[0]


def _name(shape: tuple[int, int]) -> str:
  return f"{shape[0]}x{shape[1]}"


def _check_rank(rank: int, shape: tuple[int, int], group: list[Leaf]) -> None:
  if rank > min(shape):
    raise ValueError(
      "rank must be at most the rows and columns of every matrix, got "
      f"{rank=} for {group[0].path!r}, a matrix of {shape}; exempt it."
    )
