"""What one stage of a pipeline does, tick after tick."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from deepseek_jax.core.typing import PyTree
from deepseek_jax.parallel.ambient import batch_axes
from deepseek_jax.parallel.microbatches import lay_rows
from deepseek_jax.parallel.schedule import Schedule, Visit


def run_stage(
  schedule: Schedule,
  layer: Callable[..., tuple[PyTree, PyTree]],
  remat: bool | str,
  number: Int[Array, "1"],
  params: PyTree,
  state: PyTree,
  held: PyTree,
  whole: PyTree,
) -> tuple[PyTree, PyTree]:
  """Returns what one stage holds of the results, and its layers' state.

  Args:
    schedule: what to do when.
    layer: (params, state, x, own, whole) -> (x, state).
    remat: what to recompute on the way back, see `pipeline`.
    number: of this stage.
    params: of its layers.
    state: of its layers.
    held: the micro-batches that it is home to: (x, own), [1, waves, rows, ...].
    whole: what layers take beside, [1, ...].
  """
  held, whole = jax.tree.map(lambda v: v[0], (held, whole))
  groups = lambda v: v.reshape(-1, schedule.repeats, *v.shape[1:])
  params, state = jax.tree.map(groups, (params, state))
  stage = _Stage(schedule, number[0], layer, remat, params, whole)
  # Stages that wait work on rows, too: what a layer makes of zeros might have
  # no gradient, and NaN times zero is NaN.
  waiting = jax.lax.stop_gradient(jax.tree.map(lambda v: v[0], held))
  carry = (waiting, held, state, stage.purse)
  ticks = jnp.arange(schedule.ticks)
  (arrived, held, state, _), _ = jax.lax.scan(stage.tick, carry, ticks)
  _, held = stage.exchange(schedule.ticks, arrived, held)
  home = lambda v: jnp.roll(v, -(schedule.stages % len(v)), 0)[None]
  flat = lambda v: v.reshape(-1, *v.shape[2:])
  return jax.tree.map(home, held), jax.tree.map(flat, state)


class _Stage:
  """A stage, and the groups of layers that it holds, [layers, repeats, ...]."""

  def __init__(self, schedule, number, layer, remat, params, whole):
    self.schedule = schedule
    self.number = number
    self.params, self.structure = jax.tree.flatten(params)
    self.purse = [v if _is_real(v) else None for v in self.params]
    self.whole = whole
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    forget = functools.partial(
      jax.checkpoint,
      prevent_cse=False,
      policy=keep if remat == "dots" else None,
    )
    self.layer = layer
    self.run = self.visit
    if remat and schedule.repeats == 1:
      self.layer = forget(layer)
    elif remat:
      # Parameters are copies made for the visit: not to be kept.
      self.run = forget(self.visit)

  def tick(self, carry: PyTree, tick: Int[Array, ""]) -> tuple[PyTree, None]:
    """Takes a micro-batch, applies a group of layers, and hands it on.

    Args:
      carry: the micro-batch that the stage before sent, those that lie here,
        the layers' state, and the purse.
      tick: its number.
    """
    arrived, held, state, purse = carry
    plan = self.schedule.visit(tick, self.number)
    fresh, held = self.exchange(tick, arrived, held)
    is_first = (self.number == 0) & (plan.repeat == 0)
    moving = _select(is_first, fresh, arrived)
    moving = jax.tree.map(lambda v: lay_rows(v, batch_axes()), moving)
    moving = jax.tree.map(lambda v: _hold(v, plan.is_working), moving)
    moving, state, purse = self.run(plan, moving, state, purse)
    return (self.send(moving, 1), held, state, purse), None

  def visit(
    self, plan: Visit, moving: PyTree, state: PyTree, purse: PyTree
  ) -> tuple[PyTree, PyTree, PyTree]:
    """Applies a group of layers to a micro-batch."""
    x, own = moving
    params, purse = _borrow_all(self.params, purse, plan)
    old = jax.tree.map(lambda v: _take(v, plan.repeat), state)
    old = jax.lax.stop_gradient(old)
    body = lambda x, layer: self.layer(*layer, x, own, self.whole)
    x, new = jax.lax.scan(body, x, (self.structure.unflatten(params), old))
    new = _select(plan.is_working, new, old)
    put = lambda old, new: _put(old, new, plan.repeat)
    return (x, own), jax.tree.map(put, state, new), purse

  def exchange(
    self, tick: Any, arrived: PyTree, held: PyTree
  ) -> tuple[PyTree, PyTree]:
    """Returns the micro-batch that may begin here, and what is held then.

    When the first stage takes a micro-batch to begin with, one that is through
    has come back to it, and takes the free place. Then those in this place move
    one stage towards the first, and that of the first to the last. After M such
    moves each micro-batch has begun, and after S more it is at home again.
    """
    schedule = self.schedule
    plan = schedule.visit(tick, 0)
    place = plan.microbatch % (schedule.microbatches // schedule.stages)
    fresh = jax.tree.map(
      lambda v: jax.lax.dynamic_index_in_dim(v, place, keepdims=False), held
    )

    def swap(held):
      coming = self.send(_select(self.number == 0, arrived, fresh), -1)
      put = lambda v, new: jax.lax.dynamic_update_index_in_dim(v, new, place, 0)
      return jax.tree.map(put, held, coming)

    if schedule.repeats == 1:
      return fresh, swap(held)
    # All stages agree on it, so that none waits for another that does not swap.
    begins = plan.repeat == 0
    return fresh, jax.lax.cond(begins, swap, lambda held: held, held)

  def send(self, values: PyTree, step: int) -> PyTree:
    """Sends to the stage that is `step` on; returns what came from another."""
    stages = self.schedule.stages
    if stages == 1:
      return values
    pairs = [(s, (s + step) % stages) for s in range(stages)]
    return jax.tree.map(lambda v: jax.lax.ppermute(v, "stage", pairs), values)


def _select(condition: Any, one: PyTree, other: PyTree) -> PyTree:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _is_real(x: Array) -> bool:
  return jnp.issubdtype(x.dtype, jnp.inexact)


def _take(x: Shaped[Array, "layers repeats ..."], repeat: Any) -> Array:
  if x.shape[1] == 1:
    return x[:, 0]
  return jax.lax.dynamic_index_in_dim(x, repeat, 1, keepdims=False)


def _put(x: Array, new: Array, repeat: Any) -> Array:
  if x.shape[1] == 1:
    return new[:, None]
  return jax.lax.dynamic_update_index_in_dim(x, new, repeat, 1)


def _borrow_all(
  leaves: list[Array], purse: list[Array | None], plan: Visit
) -> tuple[list[Array], list[Array | None]]:
  """Returns the parameters of a visit, and the purses with them."""
  borrowed, purses = [], []
  for leaf, own in zip(leaves, purse, strict=True):
    taken = _take(leaf, plan.repeat)
    if own is not None:
      taken = jax.lax.stop_gradient(taken)
      taken, own = _borrow(taken, own, plan.repeat, plan.is_working)
    borrowed.append(taken)
    purses.append(own)
  return borrowed, purses


@jax.custom_vjp
def _borrow(taken, purse, repeat, is_working):
  """Returns parameters of a visit, and the purse where their gradient goes.

  The purse has the values of all parameters, and is handed from tick to tick,
  so that gradients are added in place: that of an indexed array would be an
  array of all repeats, added in every tick. Visits that do not count add
  nothing, whatever a layer might add to a gradient by itself.
  """
  # What is given back must be what came in, or JAX does not see that it is the
  # same in every tick, and keeps it for each.
  del repeat, is_working
  return taken, purse


def _borrow_forward(taken, purse, repeat, is_working):
  return (taken, purse), (repeat, is_working)


def _borrow_backward(kept, grads):
  repeat, is_working = kept
  grad, purse = grads
  grad = jnp.where(is_working, grad, 0)
  return None, _put(purse, _take(purse, repeat) + grad, repeat), None, None


_borrow.defvjp(_borrow_forward, _borrow_backward)


def _hold(x: Array, is_working: Any) -> Array:
  """Returns `x`, which gets a gradient only where the visit counts."""
  return _held(x, is_working) if _is_real(x) else x


@jax.custom_vjp
def _held(x, is_working):
  del is_working
  return x


_held.defvjp(
  lambda x, is_working: (x, is_working),
  lambda is_working, grad: (jnp.where(is_working, grad, 0), None),
)
