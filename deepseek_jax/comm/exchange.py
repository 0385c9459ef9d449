"""Transforms that average gradients over devices in few bytes."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from deepseek_jax.comm.axes import Axes
from deepseek_jax.comm.state import ExchangeState, PerDevice
from deepseek_jax.core.arguments import require_static
from deepseek_jax.core.tree import leaf_paths, mask_tree
from deepseek_jax.core.typing import PyTree

# Smaller leaves are sent as they are: next to nothing would be saved.
MIN_SIZE = 4096
# Larger elements count as not finite: sums with what was left would not be.
_LARGEST = 1e30


class Leaf:
  """A leaf, its place in the tree and on the mesh.

  Attributes:
    index: In the order of `jax.tree.leaves`.
    path: As in `core.leaf_paths`.
    shape: Of the parameter's part on this device.
    dim: What it is cut along over the exchange's own axis, or None.
  """

  def __init__(self, index: int, path: str, shape: Sequence[int], dim: Any):
    self.index, self.path, self.dim = index, path, dim
    self.shape = tuple(shape)

  def whole(self, axes: Axes) -> tuple[int, ...]:
    """Returns the shape of the gradient."""
    shape = list(self.shape)
    if self.dim is not None:
      shape[self.dim] *= axes.parts
    return tuple(shape)


@runtime_checkable
class Method(Protocol):
  """What an exchange does with the leaves that are not exempt."""

  @property
  def axes(self) -> Axes:
    """Over which devices."""
    ...

  def init(self, leaves: Sequence[Leaf]) -> PyTree:
    """Returns what a device keeps for itself, with a leading axis of one."""
    ...

  def __call__(
    self, grads: Sequence[Array], leaves: Sequence[Leaf], own: PyTree,
    count: Array,
  ) -> tuple[Sequence[Array], PyTree, Array, Array]:  # fmt: skip
    """Returns means, the state, and squares of what is left and of all."""
    ...

  def sent_bytes(self, leaves: Sequence[Leaf]) -> float:
    """Returns the bytes that a device sends."""
    ...


def exchange(
  method: Method,
  *,
  specs: PyTree | None,
  min_size: int,
  exempt: Sequence[str],
  warmup: int,
) -> optax.GradientTransformationExtraArgs:
  """Returns the transform that averages by a method.

  Args:
    method: For the leaves that are not exempt.
    specs: Of the parameters.
    min_size: Leaves with fewer elements, and vectors, are exempt.
    exempt: Patterns of paths of others that are.
    warmup: Exchanges at the start in which nothing is compressed.
  """
  require_static(0, min_size=min_size, warmup=warmup)
  axes = method.axes

  def sort(params: PyTree) -> tuple[list[Leaf], list[Leaf]]:
    """Returns the leaves to compress, and the others."""
    forced = jax.tree.leaves(mask_tree(exempt, params)) if exempt else None
    chosen: list[Leaf] = []
    others: list[Leaf] = []
    arrays = jax.tree.leaves(params)
    for leaf, array in zip(leaves(axes, specs, params), arrays, strict=True):
      shape = leaf.whole(axes)
      plain = len(shape) < 2 or math.prod(shape) < min_size
      plain |= not jnp.issubdtype(array.dtype, jnp.floating)
      plain |= forced is not None and forced[leaf.index]
      (others if plain else chosen).append(leaf)
    return chosen, others

  def init_fn(params: PyTree) -> Any:
    own = method.init(sort(params)[0])
    return ExchangeState(
      count=jnp.zeros((), jnp.int32),
      errors=PerDevice(own),
      relative_error=jnp.zeros((), jnp.float32),
      sent_bytes=jnp.zeros((), jnp.float32),
    )

  def update_fn(
    updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, Any]:
    del extra_args
    if params is None and axes.sharded:
      raise ValueError("params must be given where specs cut them, got None.")
    chosen, others = sort(updates if params is None else params)
    grads, structure = jax.tree.flatten(jax.tree.map(finite, updates))
    _check_shapes(grads, [*chosen, *others], axes)
    means: dict[int, Array] = {
      x.index: mean(grads[x.index], x, axes) for x in others
    }
    own = state.errors.arrays

    def compressed(grads, own):
      found, own, lost, whole = method(grads, chosen, own, state.count)
      share = jax.lax.pmean(jnp.stack([lost, whole]), axes.names)
      error = jnp.sqrt(share[0] / jnp.maximum(share[1], 1e-30))
      sent = jnp.asarray(method.sent_bytes(chosen), jnp.float32)
      return list(found), own, error, sent

    def plain(grads, own):
      found = [mean(g, x, axes) for g, x in zip(grads, chosen, strict=True)]
      sent = sum(plain_bytes(x, axes) for x in chosen)
      return found, own, jnp.float32(0), jnp.float32(sent)

    wanted = [grads[x.index] for x in chosen]
    if warmup:
      found, own, error, sent = jax.lax.cond(
        state.count < warmup, plain, compressed, wanted, own
      )
    else:
      found, own, error, sent = compressed(wanted, own)
    means |= {x.index: g for x, g in zip(chosen, found, strict=True)}
    sent += sum(plain_bytes(x, axes) for x in others)
    return structure.unflatten([means[i] for i in range(len(grads))]), (
      ExchangeState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        errors=PerDevice(own),
        relative_error=error,
        sent_bytes=sent,
      )
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mean(grad: Array, leaf: Leaf, axes: Axes) -> Array:
  """Returns a parameter's part of the mean gradient, uncompressed."""
  # Sums of bfloat16 would lose what they add to.
  part = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
  if leaf.dim is not None:
    part = jax.lax.psum_scatter(
      part, axes.sharded, scatter_dimension=leaf.dim, tiled=True
    )
  names = axes.names if leaf.dim is None else axes.others
  part = jax.lax.psum(part, names) if names else part
  return (part / axes.devices).astype(grad.dtype)


def plain_bytes(leaf: Leaf, axes: Axes) -> float:
  """Returns the bytes that a device sends for `mean`, in float32."""
  size = 4.0
  for n in leaf.shape:
    size *= n
  parts = 1 if leaf.dim is None else axes.parts
  copies = axes.devices // parts
  return (parts - 1) * size + 2 * (copies - 1) / copies * size


def finite(grad: Array) -> Array:
  """Returns a gradient with zeros where it is not finite, or next to it."""
  largest = min(_LARGEST, float(jnp.finfo(grad.dtype).max))
  return jnp.where(jnp.abs(grad) <= largest, grad, jnp.zeros_like(grad))


def leaves(axes: Axes, specs: PyTree | None, params: PyTree) -> list[Leaf]:
  """Returns the leaves of parameters, as they lie on a device.

  Raises:
    ValueError: If one holds whole numbers, or outside of a `shard_map` with
      these axes.
  """
  _ = axes.devices
  arrays, paths = jax.tree.leaves(params), leaf_paths(params)
  is_spec = lambda x: isinstance(x, PartitionSpec)
  whole = jax.tree.broadcast(
    PartitionSpec() if specs is None else specs, params, is_leaf=is_spec
  )
  dims = [axes.dim(x) for x in jax.tree.leaves(whole, is_leaf=is_spec)]
  for path, array in zip(paths, arrays, strict=True):
    if not jnp.issubdtype(array.dtype, jnp.inexact):
      raise ValueError(
        f"params must be floating or complex, got {array.dtype} for {path!r}."
      )
  return [
    Leaf(i, path, array.shape, dim)
    for i, (path, array, dim) in enumerate(
      zip(paths, arrays, dims, strict=True)
    )
  ]


def _check_shapes(
  grads: Sequence[Array], leaves: Sequence[Leaf], axes: Axes
) -> None:
  for leaf in leaves:
    if grads[leaf.index].shape != leaf.whole(axes):
      raise ValueError(
        "updates must be whole gradients, of parameters that lie as specs say, "
        f"got shape {grads[leaf.index].shape} for {leaf.path!r}, whose part "
        f"has {leaf.shape}, cut along {leaf.dim} in {axes.parts}."
      )
