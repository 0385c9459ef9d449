"""Tokens and experts on many devices.

Every device has tokens of its own, and along the mesh's axis "expert" a share
of the experts. It sends each token to the devices that have its experts, and
gets back what became of it: two `all_to_all` a layer, and two on the way back.
The shapes are fixed. To every expert a device sends `room` rows, empty ones
among them, so of N tokens of its own it sends E·room rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from deepseek_jax import parallel
from deepseek_jax.nn.activations import Activation
from deepseek_jax.nn.expert_products import (
  Matrices,
  combine,
  think_by_expert,
  think_in_blocks,
)
from deepseek_jax.nn.expert_slots import collect, lay_out, sort_choices, spread

_AXIS = "expert"


class TokenCut(NamedTuple):
  """Axes of the mesh that tokens, [B, T] or of other shapes, are cut over."""

  rows: tuple[str, ...]
  time: tuple[str, ...]

  @classmethod
  def of(cls, shape: tuple[int, ...]) -> "TokenCut":
    """Returns how tokens are cut here; an axis that does not divide is none."""
    rows, time = parallel.batch_axes(), ("sequence",)
    return cls(
      rows if shape and _divides(rows, shape[0]) else (),
      time if len(shape) > 1 and _divides(time, shape[1]) else (),
    )

  @property
  def axes(self) -> tuple[str, ...]:
    """All of them."""
    return self.rows + self.time

  @property
  def spec(self) -> PartitionSpec:
    """Of what has these tokens in its first dimensions."""
    cut = (self.rows, self.time) if self.time else (self.rows,)
    return PartitionSpec(*(axes or None for axes in cut))


def _divides(axes: tuple[str, ...], size: int) -> bool:
  parts = parallel.axis_size(*axes)
  return parts > 1 and size % parts == 0


def slots_of_an_expert(
  tokens: int, top_k: int, num_experts: int, capacity_factor: float | None
) -> int:
  """Returns how many rows a device may send to an expert.

  >>> slots_of_an_expert(100, 2, 8, 1.25), slots_of_an_expert(100, 2, 8, None)
  (32, 100)

  Args:
    tokens: of a device.
    top_k: experts of a token.
    num_experts: E.
    capacity_factor: in units of what an expert gets if all get equally many;
      None for as many as there are tokens, so that none is ever dropped.
  """
  if capacity_factor is None:
    return tokens
  fair = tokens * top_k / num_experts
  return min(tokens, math.ceil(capacity_factor * fair))


def run_experts(
  matrices: Matrices,
  activation: Activation,
  x: Float[Array, "*B D"],
  chosen: Int32[Array, "*B k"],
  weights: Float32[Array, "*B k"],
  capacity_factor: float | None = None,
) -> tuple[Float[Array, "*B D"], Int32[Array, ""]]:
  """Returns the weighted sum of the experts' outputs, and dropped choices.

  Raises:
    ValueError: the mesh's axis "expert" does not divide the experts.
  """
  _check_experts(len(matrices.gate))
  cut = TokenCut.of(x.shape[:-1])
  # Tokens that cannot be cut over the experts' axis: the compiler moves what it
  # must, as on a mesh without that axis.
  swaps = _AXIS in cut.axes
  run = functools.partial(
    _run, activation, capacity_factor if swaps else None, cut.axes
  )
  if not cut.axes:
    y, dropped = run(matrices, x, chosen, weights)
    return y, dropped.sum()
  if jax.sharding.get_abstract_mesh().manual_axes:
    # Inside of a pipeline's own `jax.shard_map`, JAX cannot lower the arrays
    # that this one would keep for the way back: it keeps its inputs alone.
    run = jax.checkpoint(run)
  own = PartitionSpec(_AXIS) if swaps else PartitionSpec()
  y, dropped = jax.shard_map(
    run,
    in_specs=(own, cut.spec, cut.spec, cut.spec),
    out_specs=(cut.spec, PartitionSpec(cut.axes)),
    axis_names=set(cut.axes),
  )(matrices, x, chosen, weights)
  return y, dropped.sum()


def _check_experts(num_experts: int) -> None:
  if num_experts % parallel.axis_size(_AXIS):
    raise ValueError(
      "num_experts must be a multiple of the mesh's axis 'expert', got "
      f"{num_experts=} for expert={parallel.axis_size(_AXIS)}."
    )


def _run(activation, capacity_factor, axes, matrices, x, chosen, weights):
  """Runs the experts for the tokens of one device."""
  matrices = Matrices(*(_varying(matrix, axes) for matrix in matrices))
  tokens, top_k = math.prod(x.shape[:-1]), chosen.shape[-1]
  rows, chosen = x.reshape(tokens, -1), chosen.reshape(tokens, top_k)
  if _AXIS in axes:
    room = slots_of_an_expert(
      tokens, top_k, len(matrices.gate) * jax.lax.axis_size(_AXIS),
      capacity_factor,
    )  # fmt: skip
    y, dropped = _think_elsewhere(matrices, activation, rows, chosen, room)
  else:
    y = think_in_blocks(matrices, activation, rows, chosen)
    dropped = 0 * chosen[0, 0]  # A zero that varies over devices.
  y = combine(y, weights.reshape(tokens, top_k))
  return y.reshape(x.shape), dropped[None]


def _think_elsewhere(matrices, activation, x, chosen, room):
  """Sends tokens to the devices of their experts, and fetches the results."""
  here, devices = len(matrices.gate), jax.lax.axis_size(_AXIS)
  size = x.shape[-1]
  order, counts = sort_choices(chosen, here * devices)
  slots = lay_out(
    chosen, order, counts, room * jnp.arange(here * devices, dtype=jnp.int32),
    room=room, size=here * devices * room,
  )  # fmt: skip
  swap = lambda x: jax.lax.all_to_all(x, _AXIS, 0, 0)
  got = swap(spread(x, slots).reshape(devices, here, room, size))
  got = jnp.swapaxes(got, 0, 1).reshape(here, devices * room, size)
  y = think_by_expert(matrices, activation, got)
  y = y.reshape(here, devices, room, size)
  y = swap(jnp.swapaxes(y, 0, 1)).reshape(-1, size)
  return collect(y, slots), jnp.maximum(counts - room, 0).sum()


def _varying(matrix: Array, axes: tuple[str, ...]) -> Array:
  """Returns a matrix whose gradients are added up over devices in float32."""
  # Explicitly: XLA's compiler for CPU ends where bfloat16 is added up here.
  whole = tuple(name for name in axes if name != _AXIS)
  wide = jax.lax.pcast(matrix.astype(jnp.float32), whole, to="varying")
  return wide.astype(matrix.dtype)
