"""Layers one after the other: as a loop, one compiled body, or a pipeline."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax import parallel
from deepseek_jax.nn import checks
from deepseek_jax.nn.layer_call import LayerCall, Remat, split_arrays


class LayerStack(nnx.Module):
  """Applies layers in turn: x = layer(x).

  As a loop, every layer is compiled by itself: the fastest step for few layers.
  With `scan`, one body is compiled for all and their arrays have an axis of
  layers in front, which keeps compilation short for many. Either carries the
  other state of the layers along (random streams, thresholds, counts).

  Layers may differ in a repeating pattern: with a `period` of 3, layers 0, 3, 6
  are alike, as are 1, 4, 7 and 2, 5, 8.

  Traced for a mesh with an axis "stage", a scan becomes a pipeline, see
  `parallel.pipeline`: every stage holds some of the layers, and micro-batches
  of rows go from stage to stage. Given a number of `microbatches`, a scan takes
  one after the other on any mesh: the same numbers then, whatever the mesh, of
  layers with other state too. That goes on from micro-batch to micro-batch: a
  call of the stack is as many calls of each layer.

  >>> make = lambda seed: nnx.Linear(4, 4, rngs=nnx.Rngs(seed))
  >>> stack = LayerStack([make(0), make(1)], scan=True)
  >>> stack(jnp.ones((2, 4))).shape, stack.layers[0].kernel.shape
  ((2, 4), (2, 4, 4))

  Args:
    layers: modules that map an array to one of the same shape and type.
    scan: whether to compile one body for all periods.
    remat: whether to keep of each layer only its input and to recompute the
      rest on the way back: less memory for about a third more time. "dots"
      keeps the results of matrix products with parameters too, which leaves
      little to recompute. A pipeline keeps the input of each period for that of
      each layer, and with repeats of each group of them.
    period: layers after which kinds repeat; divides their number. For `scan`.
    microbatches: parts that a scan takes the rows in, a multiple of the stages.
      None for one, and in a pipeline for four a stage where rows allow.
    repeats: groups of layers that each stage of a pipeline holds: more make it
      idle less and exchange more. The axis of layers is ordered for that, see
      `parallel.storage_order`. For `scan`.

  Raises:
    ValueError: there are no layers, period or repeats do not divide their
      number, `scan` meets layers that differ, or what is for `scan` comes
      without.
  """

  def __init__(
    self,
    layers: Sequence[nnx.Module],
    *,
    scan: bool = False,
    remat: Remat = False,
    period: int = 1,
    microbatches: int | None = None,
    repeats: int = 1,
  ):
    layers = list(layers)
    checks.require_positive(
      number_of_layers=len(layers), period=period, repeats=repeats
    )
    _check_scan(scan, microbatches, repeats)
    _check_remat(remat)
    for name, parts in (
      ("period", period),
      ("period * repeats", period * repeats),
    ):
      if len(layers) % parts:
        raise ValueError(
          f"{name} must divide the number of layers, got {name}={parts} for "
          f"{len(layers)}."
        )
    _check_modules(layers)
    self.num_layers = len(layers)
    self.scan = scan
    self.remat = remat
    self.microbatches = microbatches
    self.repeats = repeats
    if scan:
      order = parallel.storage_order(len(layers) // period, repeats)
      layers = [
        _stacked([layers[i + period * place] for place in order], i)
        for i in range(period)
      ]
    self.layers = nnx.List(layers)

  def __call__(self, x: Any, *shared: Any) -> Any:
    """Returns what the last layer gives.

    Args:
      x: what the first layer takes.
      *shared: further arguments of every layer. In a pipeline, arrays with as
        many rows as `x` are cut into micro-batches with it.

    Raises:
      ValueError: the mesh has stages, and there is no scan, or layers or rows
        do not divide over them.
    """
    stages = parallel.axis_size("stage")
    if stages > 1:
      self._check_stages(stages)
    if stages > 1 or self.microbatches is not None or self.repeats > 1:
      return self._pipelined(x, *shared)
    if not (self.scan or self.remat):
      for layer in self.layers:
        x = layer(x, *shared)
      return x
    calls = [LayerCall(layer, self.remat) for layer in self.layers]

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
    order = parallel.storage_order(periods, self.repeats)
    found = []
    for period in range(periods):
      place = order.index(period)
      for layer in self.layers:
        structure, *state = split_arrays(layer)
        one = jax.tree.map(lambda x, place=place: x[place], state)
        found.append(nnx.merge(structure, *one))
    return found

  def _pipelined(self, x, *shared):
    calls = [LayerCall(layer) for layer in self.layers]

    def one_period(arrays, x):
      for call, own in zip(calls, arrays, strict=True):
        x, _ = call(own, x, *shared)
      return x

    first = jax.tree.map(lambda v: v[0], [call.arrays for call in calls])
    jax.eval_shape(one_period, first, x)  # Shows what is written to.
    fixed, moving = zip(*(call.apart() for call in calls), strict=True)

    def layer(fixed, moving, x, *shared):
      left = []
      for call, *arrays in zip(calls, fixed, moving, strict=True):
        x, rest = call(call.together(*arrays), x, *shared)
        left.append(rest)
      return x, tuple(left)

    x, left = parallel.pipeline(
      layer,
      fixed,
      x,
      *shared,
      state=moving,
      microbatches=self.microbatches,
      repeats=self.repeats,
      remat=self.remat,
    )
    for call, rest in zip(calls, left, strict=True):
      call.keep(rest)
    return x

  def _check_stages(self, stages: int) -> None:
    if not self.scan:
      raise ValueError(
        "scan must be True on a mesh with stages, whose devices hold stacked "
        f"layers, got scan=False with {stages} stages."
      )
    period = len(self.layers)
    parts = stages * self.repeats * period
    if self.num_layers % parts:
      raise ValueError(
        "the number of layers must be a multiple of stages * repeats * period "
        f"= {stages} * {self.repeats} * {period} = {parts}, got "
        f"{self.num_layers}."
      )


def _check_remat(remat: Any) -> None:
  if remat not in (False, True, "dots"):
    raise ValueError(f"remat must be False, True or 'dots', got {remat=}.")


def _check_scan(scan: bool, microbatches: int | None, repeats: int) -> None:
  if microbatches is not None:
    checks.require_positive(microbatches=microbatches)
  if scan:
    return
  if microbatches is not None or repeats > 1:
    raise ValueError(
      "microbatches and repeats are for scan=True, got "
      f"{microbatches=} and {repeats=} with scan=False."
    )


def _check_modules(layers: Sequence[Any]) -> None:
  for layer in layers:
    if not isinstance(layer, nnx.Module):
      raise ValueError(
        f"layers must be modules, as nnx.Linear is one, got {layer!r}."
      )


def _stacked(layers: Sequence[nnx.Module], first: int) -> nnx.Module:
  """Returns one layer whose arrays are those of all, along a new first axis."""
  structures, *states = zip(*map(split_arrays, layers), strict=True)
  if any(structure != structures[0] for structure in structures):
    raise ValueError(
      f"scan needs equal layers at places {first}, {first} + period, ...; some "
      "differ in more than their arrays. Give the period of their pattern, or "
      "scan=False."
    )
  stacked = [jax.tree.map(lambda *x: jnp.stack(x), *state) for state in states]
  return nnx.merge(structures[0], *stacked)
