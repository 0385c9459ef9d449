"""A layer as a function of its arrays, for loops that carry them along."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

Remat = bool | str
"""What to recompute on the way back: False, True, or "dots", all but those."""


def rematerialized(function: Callable, remat: Remat) -> Callable:
  """Returns a function that keeps this little for the way back."""
  if not remat:
    return function
  keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return jax.checkpoint(function, policy=keep if remat == "dots" else None)


def split_arrays(layer: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
  """Returns the structure of a layer, its parameters and its other arrays."""
  structure, params, rest = nnx.split(layer, nnx.Param, ...)
  return structure, _arrays(params), _arrays(rest)


def _arrays(state: Any) -> Any:
  # Variables of an outer trace may not be written to in an inner one.
  return nnx.to_pure_dict(nnx.as_pure(state))


class LayerCall:
  """A layer as a function (arrays, x) -> (x, what it changed of the arrays).

  Only what the layer writes comes back, so that a layer that writes nothing, as
  in evaluation, may be called inside of any transformation. What that is, a
  call has to show: it is known once one was traced.

  Attributes:
    arrays: parameters and other arrays of the layer.
  """

  def __init__(self, layer: nnx.Module, remat: Remat = False):
    self._layer = layer
    self._structure, *self.arrays = split_arrays(layer)
    self._step = rematerialized(self._pure, remat)
    self._tree = jax.tree.structure(self.arrays[1])
    self._written: list[bool] = []

  def __call__(self, arrays: Any, x: Any, *shared: Any) -> tuple[Any, Any]:
    """Returns what the layer gives, and what it changed."""
    return self._step(arrays, x, *shared)

  def _pure(self, arrays, x, *shared):
    layer = nnx.merge(self._structure, *arrays)
    x = layer(x, *shared)
    old = jax.tree.leaves(arrays[1])
    new = jax.tree.leaves(split_arrays(layer)[2])
    self._written = [a is not b for a, b in zip(old, new, strict=True)]
    changed = zip(new, self._written, strict=True)
    return x, [leaf for leaf, written in changed if written]

  def apart(self) -> tuple[Any, list[jax.Array]]:
    """Returns what calls leave as it is, and what they write to."""
    params, rest = self.arrays
    leaves = list(zip(jax.tree.leaves(rest), self._written, strict=True))
    fixed = params, [leaf for leaf, written in leaves if not written]
    return fixed, [leaf for leaf, written in leaves if written]

  def together(self, fixed: Any, changed: Sequence[jax.Array]) -> Any:
    """Returns the arrays that `apart` took apart."""
    params, still = fixed
    still, fresh = iter(still), iter(changed)
    rest = [next(fresh if written else still) for written in self._written]
    return params, jax.tree.unflatten(self._tree, rest)

  def keep(self, changed: Sequence[jax.Array]) -> None:
    """Writes to the layer what a call has changed."""
    if changed:
      rest = self.together(self.apart()[0], changed)[1]
      nnx.update(self._layer, rest)
