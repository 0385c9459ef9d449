"""From full to sparse attention in the course of training."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class SparsitySchedule:
  """How many far blocks a token may read, from which training step on.

  Attention that is sparse from the first step on learns far recall badly: what
  is not chosen gets no gradient, and is never chosen. So start with all blocks
  and take them away.

  >>> schedule = SparsitySchedule(((0, None), (500, 16), (1000, 4)))
  >>> [int(schedule.level(step)) for step in (0, 499, 500, 2000)]
  [0, 0, 1, 2]

  Args:
    levels: pairs of a first step and a number of blocks; None for all.

  Raises:
    ValueError: the steps do not rise from 0 on, or the numbers do not fall.
  """

  levels: Sequence[Sequence[int | None]]

  def __post_init__(self):
    """Checks the levels."""
    levels = tuple(  # JSON gives lists.
      tuple(level) if isinstance(level, Sequence) else ()
      for level in self.levels
    )
    given = self.levels
    object.__setattr__(self, "levels", levels)
    fits = levels and all(
      len(level) == 2 and _is_whole(level[0]) and _is_whole(level[1] or 0)
      for level in levels
    )
    if not fits:
      raise ValueError(
        "schedule must be pairs of a step and a number of blocks or None, got "
        f"{given}."
      )
    steps, numbers = zip(*levels, strict=True)
    if steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
      raise ValueError(f"schedule must have steps rising from 0, got {steps}.")
    sizes = [math.inf if n is None else n for n in numbers]
    if any(a <= b for a, b in itertools.pairwise(sizes)):
      raise ValueError(
        "schedule must have falling numbers of blocks, None (all) being the "
        f"largest, got {numbers}."
      )

  def level(self, step: Int[Array, ""] | int) -> Int[Array, ""]:
    """Returns the place in `levels` of what holds at a step."""
    first = jnp.array([step for step, _ in self.levels])
    return jnp.sum(first <= step) - 1


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class TrainingCalls(nnx.Variable):
  """Calls in training mode so far; int32. It goes into checkpoints."""


class Annealing(nnx.Module):
  """Picks what a `SparsitySchedule` says for the number of calls so far.

  It counts by itself, as batch norm keeps statistics: calls after
  `model.train()` count, those after `model.eval()` do not. A trainer that
  carries the state of the model along (`train.fit` does) drives the schedule
  without knowing of it. With gradients accumulated over micro-batches, each of
  these is a call.

  All levels are compiled at once, and one of them runs. Under `jax.vmap` over
  the count itself all would run.

  Args:
    schedule: a `SparsitySchedule`.
  """

  def __init__(self, schedule: SparsitySchedule):
    self.schedule = schedule
    self.calls = TrainingCalls(jnp.zeros((), jnp.int32))
    self.deterministic = False

  def __call__(
    self, function: Callable[..., Any], *operands: Any, tick: bool = False
  ) -> Any:
    """Returns `function(blocks, *operands)` for the blocks of now.

    Args:
      function: of a number of blocks, which is static, and of arrays; what it
        returns has the same shapes for every number.
      *operands: the arrays.
      tick: whether this is a call that counts, if in training mode.
    """
    level = self.schedule.level(self.calls[...])
    if tick and not self.deterministic:
      most = jnp.iinfo(jnp.int32).max
      self.calls[...] = jnp.minimum(self.calls[...], most - 1) + 1
    branches = [
      lambda *operands, blocks=blocks: function(blocks, *operands)
      for _, blocks in self.schedule.levels
    ]
    return jax.lax.switch(level, branches, *operands)
