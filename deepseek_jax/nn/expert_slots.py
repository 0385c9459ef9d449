"""Rows in the order of their experts, and back to the order of tokens.

N tokens have k choices each. A choice has a slot: a row of an array [S, D] in
which every expert has consecutive rows of its own, not all of them taken.
Both ways, and on the way back both again, rows are gathered, never scattered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


class Slots(NamedTuple):
  """Who is where.

  Attributes:
    source: of every slot the choice in it, by its number among all N·k; N·k for
      none.
    place: of every choice its slot; S for one that found no room.
  """

  source: Int32[Array, " S"]
  place: Int32[Array, "N k"]


def sort_choices(
  chosen: Int32[Array, "N k"], num_experts: int
) -> tuple[Int32[Array, " choices"], Int32[Array, " E"]]:
  """Returns the choices by expert, of one expert in order; and their counts."""
  flat = chosen.reshape(-1)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  counts = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32).sum(0)
  return order, counts


def lay_out(
  chosen: Int32[Array, "N k"],
  order: Int32[Array, " choices"],
  counts: Int32[Array, " E"],
  first: Int32[Array, " E"],
  *,
  room: int,
  size: int,
) -> Slots:
  """Gives every choice a slot, as long as its expert has room.

  Choices of earlier tokens come first. So what becomes of a token never depends
  on a later one.

  Args:
    chosen: experts of every token.
    order: of `sort_choices`.
    counts: of `sort_choices`.
    first: the first slot of every expert.
    room: slots of an expert.
    size: S, slots of all experts.
  """
  expert = chosen.reshape(-1)[order]
  # In front of the expert's first one are all choices of experts before it.
  rank = jnp.arange(chosen.size) - (jnp.cumsum(counts) - counts)[expert]
  slot = jnp.where(rank < room, first[expert] + rank, size).astype(jnp.int32)
  source = jnp.full(size, chosen.size, jnp.int32)
  place = jnp.zeros(chosen.size, jnp.int32).at[order].set(slot)
  return Slots(
    source=source.at[slot].set(order, mode="drop"),
    place=place.reshape(chosen.shape),
  )


@jax.custom_vjp
def spread(x: Float[Array, "N D"], slots: Slots) -> Float[Array, "S D"]:
  """Returns the token of every slot; zeros where none is."""
  return _take(x, slots.source // slots.place.shape[1])


@jax.custom_vjp
def collect(y: Float[Array, "S D"], slots: Slots) -> Float[Array, "N k D"]:
  """Returns what is in the slots of every token; zeros for those it has not."""
  return _take(y, slots.place)


def _take(x, places):
  return x.at[places].get(mode="fill", fill_value=0)


def _spread_forward(x, slots):
  return spread(x, slots), slots


def _spread_backward(slots, grad):
  grads = _take(grad, slots.place).astype(jnp.float32)
  return grads.sum(1).astype(grad.dtype), None


def _collect_forward(y, slots):
  return collect(y, slots), slots


def _collect_backward(slots, grad):
  return _take(grad.reshape(-1, grad.shape[-1]), slots.source), None


spread.defvjp(_spread_forward, _spread_backward)
collect.defvjp(_collect_forward, _collect_backward)
