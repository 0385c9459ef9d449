"""Layers one after the other: as a loop, or one compiled body for all."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.nn import checks


class LayerStack(nnx.Module):
  """Applies layers in turn: x = layer(x).

  As a loop, every layer is compiled by itself: the fastest step for few layers.
  With `scan`, one body is compiled for all and their arrays have an axis of
  layers in front, which keeps compilation short for many. Either carries the
  other state of the layers along (random streams, thresholds, counts).

  Layers may differ in a repeating pattern: with a `period` of 3, layers 0, 3, 6
  are alike, as are 1, 4, 7 and 2, 5, 8.

  >>> make = lambda seed: nnx.Linear(4, 4, rngs=nnx.Rngs(seed))
  >>> stack = LayerStack([make(0), make(1)], scan=True)
  >>> stack(jnp.ones((2, 4))).shape, stack.layers[0].kernel.shape
  ((2, 4), (2, 4, 4))

  Args:
    layers: modules that map an array to one of the same shape and type.
    scan: whether to compile one body for all periods.
    remat: whether to keep of each layer only its input and to recompute the
      rest on the way back: less memory for about a third more time.
    period: layers after which kinds repeat; divides their number. For `scan`.

  Raises:
    ValueError: there are no layers, the period does not divide their number, or
      `scan` meets layers that differ.
  """

  def __init__(
    self,
    layers: Sequence[nnx.Module],
    *,
    scan: bool = False,
    remat: bool = False,
    period: int = 1,
  ):
    layers = list(layers)
    checks.require_positive(number_of_layers=len(layers), period=period)
    if len(layers) % period:
      raise ValueError(
        f"period must divide the number of layers, got {period=} for "
        f"{len(layers)}."
      )
    _check_modules(layers)
    self.num_layers = len(layers)
    self.scan = scan
    self.remat = remat
    if scan:
      layers = [_stacked(layers[i::period], i) for i in range(period)]
    self.layers = nnx.List(layers)

  def __call__(self, x: Any, *shared: Any) -> Any:
    """Returns what the last layer gives.

    Args:
      x: what the first layer takes.
      *shared: further arguments of every layer.
    """
    if not (self.scan or self.remat):
      for layer in self.layers:
        x = layer(x, *shared)
      return x
    calls = [_Call(layer, self.remat) for layer in self.layers]

    def body(x, state):
      left = []
      for call, arrays in zip(calls, state, strict=True):
        x, rest = call(arrays, x, *shared)
        left.append(rest)
      return x, left

    run = jax.lax.scan if self.scan else lambda body, *args: body(*args)
    x, left = run(body, x, [call.arrays for call in calls])
    for call, rest in zip(calls, left, strict=True):
      call.keep(rest)
    return x

  def unstacked(self) -> list[Any]:
    """Returns all layers one by one, those of a scan as cut out copies."""
    if not self.scan:
      return list(self.layers)
    periods = self.num_layers // len(self.layers)
    found = []
    for period in range(periods):
      for layer in self.layers:
        structure, *state = _split(layer)
        one = jax.tree.map(lambda x, period=period: x[period], state)
        found.append(nnx.merge(structure, *one))
    return found


def _check_modules(layers: Sequence[Any]) -> None:
  for layer in layers:
    if not isinstance(layer, nnx.Module):
      raise ValueError(
        f"layers must be modules, as nnx.Linear is one, got {layer!r}."
      )


def _split(layer: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
  """Returns the structure of a layer, its parameters and its other arrays."""
  structure, params, rest = nnx.split(layer, nnx.Param, ...)
  return structure, _arrays(params), _arrays(rest)


def _arrays(state: Any) -> Any:
  # Variables of an outer trace may not be written to in an inner one.
  return nnx.to_pure_dict(nnx.as_pure(state))


class _Call:
  """A layer as a function (arrays, x) -> (x, what it changed of the arrays)."""

  def __init__(self, layer: nnx.Module, remat: bool):
    self._layer = layer
    self._structure, *self.arrays = _split(layer)
    self._step = jax.checkpoint(self._pure) if remat else self._pure

  def __call__(self, arrays: Any, x: Any, *shared: Any) -> tuple[Any, Any]:
    return self._step(arrays, x, *shared)

  def _pure(self, arrays, x, *shared):
    layer = nnx.merge(self._structure, *arrays)
    x = layer(x, *shared)
    old, tree = jax.tree.flatten(arrays[1])
    new = jax.tree.leaves(_split(layer)[2])
    self._tree = tree
    # Only what the layer wrote comes back, so that a layer that writes nothing,
    # as in evaluation, may be called inside of any transformation.
    self._written = [a is not b for a, b in zip(old, new, strict=True)]
    changed = zip(new, self._written, strict=True)
    return x, [leaf for leaf, written in changed if written]

  def keep(self, changed: Sequence[jax.Array]) -> None:
    """Writes to the layer what a call has changed."""
    if not changed:
      return
    fresh = iter(changed)
    leaves = zip(jax.tree.leaves(self.arrays[1]), self._written, strict=True)
    rest = [next(fresh) if written else leaf for leaf, written in leaves]
    nnx.update(self._layer, jax.tree.unflatten(self._tree, rest))


def _stacked(layers: Sequence[nnx.Module], first: int) -> nnx.Module:
  """Returns one layer whose arrays are those of all, along a new first axis."""
  structures, *states = zip(*map(_split, layers), strict=True)
  if any(structure != structures[0] for structure in structures):
    raise ValueError(
      f"scan needs equal layers at places {first}, {first} + period, ...; some "
      "differ in more than their arrays. Give the period of their pattern, or "
      "scan=False."
    )
  stacked = [jax.tree.map(lambda *x: jnp.stack(x), *state) for state in states]
  return nnx.merge(structures[0], *stacked)
