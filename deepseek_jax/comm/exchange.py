"""Transforms that average gradients over devices in few bytes."""

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


@runtime_checkable
class Method(Protocol):
  """What an exchange does with the leaves that are not exempt."""

  @property
  def axes(self) -> Axes:
    """Over which devices."""
    ...

  def init(self, leaves: Sequence[Leaf]) -> tuple[PyTree, PyTree]:
    """Returns what a device keeps for itself, and what is equal on all."""
    ...

  def __call__(
    self, grads: Sequence[Array], leaves: Sequence[Leaf], own: PyTree,
    inner: PyTree, count: Array,
  ) -> tuple[Sequence[Array], PyTree, PyTree, Array, Array]:  # fmt: skip
    """Returns means, both states, and squares of what is left and of all."""
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

  def leaves_of(params: PyTree) -> tuple[list[Leaf], list[Leaf]]:
    """Returns the leaves to compress, and the others."""
    dims = _dims(axes, specs, params)
    forced = jax.tree.leaves(mask_tree(exempt, params)) if exempt else None
    chosen: list[Leaf] = []
    others: list[Leaf] = []
    paths = leaf_paths(params)
    for i, (path, leaf) in enumerate(
      zip(paths, jax.tree.leaves(params), strict=True)
    ):
      part = Leaf(i, path, jnp.shape(leaf), dims[i])
      plain = leaf.ndim < 2 or leaf.size < min_size
      plain |= not jnp.issubdtype(leaf.dtype, jnp.floating)
      plain |= forced is not None and forced[i]
      (others if plain else chosen).append(part)
    return chosen, others

  def init_fn(params: PyTree) -> Any:
    own, inner = method.init(leaves_of(params)[0])
    return ExchangeState(
      count=jnp.zeros((), jnp.int32),
      errors=PerDevice(own),
      inner=inner,
      relative_error=jnp.zeros((), jnp.float32),
      sent_bytes=jnp.zeros((), jnp.float32),
    )

  def update_fn(
    updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, Any]:
    del extra_args
    chosen, others = leaves_of(updates if params is None else params)
    grads, structure = jax.tree.flatten(jax.tree.map(finite, updates))
    _check_shapes(grads, [*chosen, *others], axes)
    means: dict[int, Array] = {
      x.index: mean(grads[x.index], x, axes) for x in others
    }
    own, inner = state.errors.arrays, state.inner

    def compressed(grads, own, inner):
      found, own, inner, lost, whole = method(
        grads, chosen, own, inner, state.count
      )
      share = jax.lax.pmean(jnp.stack([lost, whole]), axes.names)
      error = jnp.sqrt(share[0] / jnp.maximum(share[1], 1e-30))
      sent = jnp.asarray(method.sent_bytes(chosen), jnp.float32)
      return list(found), own, inner, error, sent

    def plain(grads, own, inner):
      found = [mean(g, x, axes) for g, x in zip(grads, chosen, strict=True)]
      sent = sum(plain_bytes(x, axes) for x in chosen)
      return found, own, inner, jnp.zeros(()), jnp.asarray(sent, jnp.float32)

    wanted = [grads[x.index] for x in chosen]
    if warmup:
      found, own, inner, error, sent = jax.lax.cond(
        state.count < warmup, plain, compressed, wanted, own, inner
      )
    else:
      found, own, inner, error, sent = compressed(wanted, own, inner)
    means |= {x.index: g for x, g in zip(chosen, found, strict=True)}
    sent += sum(plain_bytes(x, axes) for x in others)
    return structure.unflatten([means[i] for i in range(len(grads))]), (
      ExchangeState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        errors=PerDevice(own),
        inner=inner,
        relative_error=error,
        sent_bytes=sent,
      )
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mean(grad: Array, leaf: Leaf, axes: Axes) -> Array:
  """Returns a parameter's part of the mean gradient, uncompressed."""
  if leaf.dim is None:
    return jax.lax.pmean(grad, axes.names)
  part = jax.lax.psum_scatter(
    grad, axes.sharded, scatter_dimension=leaf.dim, tiled=True
  )
  part = part / axes.parts
  return jax.lax.pmean(part, axes.others) if axes.others else part


def plain_bytes(leaf: Leaf, axes: Axes) -> float:
  """Returns the bytes that a device sends for `mean`, in float32."""
  size = 4.0
  for n in leaf.shape:
    size *= n
  parts = 1 if leaf.dim is None else axes.parts
  copies = axes.parts * axes.copies // parts
  return (parts - 1) * size + 2 * (copies - 1) / copies * size


def finite(grad: Array) -> Array:
  """Returns a gradient with zeros where it is not finite, or next to it."""
  return jnp.where(jnp.abs(grad) < _LARGEST, grad, jnp.zeros_like(grad))


def _dims(axes: Axes, specs: PyTree | None, params: PyTree) -> list[int | None]:
  """Returns the dimension along which each leaf is cut, or None."""
  if specs is None:
    return [None] * len(jax.tree.leaves(params))
  is_spec = lambda x: isinstance(x, PartitionSpec)
  whole = jax.tree.broadcast(specs, params, is_leaf=is_spec)
  return [axes.dim(x) for x in jax.tree.leaves(whole, is_leaf=is_spec)]


def _check_shapes(
  grads: Sequence[Array], leaves: Sequence[Leaf], axes: Axes
) -> None:
  parts = axes.parts
  for leaf in leaves:
    shape = list(leaf.shape)
    if leaf.dim is not None:
      shape[leaf.dim] *= parts
    if list(grads[leaf.index].shape) != shape:
      raise ValueError(
        "updates must be whole gradients, of parameters that lie as specs say, "
        f"got shape {grads[leaf.index].shape} for {leaf.path!r}, whose part "
        f"has {tuple(leaf.shape)}, cut along {leaf.dim} in {parts}."
      )
