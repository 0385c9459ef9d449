"""Cuts layers of unequal cost into stages of equal cost."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from deepseek_jax.core.arguments import require_static
from deepseek_jax.parallel.schedule import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
  """Layers in contiguous groups, and which stage of a pipeline holds which.

  Group g is on stage g % S, in its repeat g // S, see `Schedule`.

  Attributes:
    costs: of the layers, in any unit.
    ends: of the groups: layers before it, one number a group.
    stages: S.
  """

  costs: tuple[float, ...]
  ends: tuple[int, ...]
  stages: int

  @property
  def groups(self) -> list[range]:
    """The layers of every group."""
    return [
      range(*ends) for ends in zip((0, *self.ends[:-1]), self.ends, strict=True)
    ]

  @property
  def group_costs(self) -> np.ndarray:
    """What a visit of each group costs; float64, one row a repeat, [R, S]."""
    costs = [math.fsum(self.costs[i] for i in group) for group in self.groups]
    return np.reshape(costs, (-1, self.stages))

  @property
  def stage_costs(self) -> np.ndarray:
    """What all layers of each stage cost; float64, [S]."""
    return self.group_costs.sum(0)

  @property
  def imbalance(self) -> float:
    """How many times the mean the dearest group costs, at least 1.

    All wait for it: the stages work in step.
    """
    costs = self.group_costs
    return float(costs.max() / costs.mean())

  def bubble(self, microbatches: int) -> float:
    """Returns the share of the time that stages idle or wait for a dearer one.

    With equal groups this is `parallel.bubble`. Each tick takes as long as the
    dearest group that any stage applies in it.

    Args:
      microbatches: M, a multiple of the stages.

    Raises:
      ValueError: If it is none.
    """
    costs = self.group_costs
    schedule = Schedule(
      stages=self.stages, microbatches=microbatches, repeats=len(costs)
    )
    repeat = schedule.plan().repeat
    ticks = np.take_along_axis(costs.T, repeat, 1).max(0)
    done = microbatches * costs.sum()
    return float(1 - done / (self.stages * ticks.sum()))

  def describe(self, microbatches: int | None = None) -> str:
    """Returns the cut as a table, with the bubble if micro-batches are told."""
    costs = self.stage_costs
    lines = []
    for stage, cost in enumerate(costs):
      held = ", ".join(map(_told, self.groups[stage :: self.stages]))
      share = cost / costs.sum()
      lines.append(
        f"stage {stage} | cost {cost:g}, {share:.1%} | layers {held}"
      )
    lines.append(f"the dearest group costs {self.imbalance:.3f} times the mean")
    if microbatches is not None:
      lines.append(
        f"bubble of {microbatches} micro-batches, with what stages wait for "
        f"each other: {self.bubble(microbatches):.1%}"
      )
    return "\n".join(lines)

  def __str__(self) -> str:
    """Returns the cut as a table."""
    return self.describe()


def cut_layers(
  costs: Sequence[int | float], stages: int, repeats: int = 1
) -> Cut:
  """Returns the cut into groups of which the dearest is as cheap as can be.

  Exact, in O(L²·S·R) for L layers. `pipeline` itself takes the same number of
  layers everywhere: `cut_evenly` says what that costs in comparison.

  >>> print(cut_layers([1, 1, 1, 1, 2, 2], stages=2).describe(8))
  stage 0 | cost 4, 50.0% | layers 0-3
  stage 1 | cost 4, 50.0% | layers 4-5
  the dearest group costs 1.000 times the mean
  bubble of 8 micro-batches, with what stages wait for each other: 11.1%

  Args:
    costs: of the layers in turn, in any unit, such as FLOPs or seconds: finite,
      at least 0, not all 0.
    stages: S, at least 1.
    repeats: R, groups that a stage holds; S·R is at most L.

  Raises:
    ValueError: If a number is out of its range.
  """
  known = _checked(costs, stages, repeats)
  total = np.concatenate([[0.0], np.cumsum(known)])
  layers = len(known)
  # dearest[i] of the best cut of the first i layers into so many groups.
  dearest, lasts = total.copy(), []
  for group in range(2, stages * repeats + 1):
    shorter, dearest = dearest, np.full(layers + 1, math.inf)
    begin = np.zeros(layers + 1, int)
    for i in range(group, layers + 1):
      found = np.maximum(
        shorter[group - 1 : i], total[i] - total[group - 1 : i]
      )
      best = int(found.argmin())
      begin[i], dearest[i] = group - 1 + best, found[best]
    lasts.append(begin)
  ends = [layers]
  for begin in reversed(lasts):
    ends.append(int(begin[ends[-1]]))
  return Cut(costs=known, ends=tuple(reversed(ends)), stages=stages)


def cut_evenly(
  costs: Sequence[int | float], stages: int, repeats: int = 1
) -> Cut:
  """Returns the cut into groups of the same number of layers: `pipeline`'s.

  >>> print(cut_evenly([1, 1, 1, 1, 2, 2], stages=2))
  stage 0 | cost 3, 37.5% | layers 0-2
  stage 1 | cost 5, 62.5% | layers 3-5
  the dearest group costs 1.250 times the mean

  Args:
    costs: as in `cut_layers`.
    stages: S.
    repeats: R; S·R divides the layers.

  Raises:
    ValueError: If a number is out of its range.
  """
  known = _checked(costs, stages, repeats)
  groups = stages * repeats
  if len(known) % groups:
    raise ValueError(
      "the number of layers must be a multiple of stages * repeats = "
      f"{stages} * {repeats} = {groups}, got {len(known)}."
    )
  size = len(known) // groups
  ends = tuple(range(size, len(known) + 1, size))
  return Cut(costs=known, ends=ends, stages=stages)


def _checked(
  costs: Sequence[int | float], stages: int, repeats: int
) -> tuple[float, ...]:
  require_static(1, stages=stages, repeats=repeats)
  found = tuple(map(float, costs))
  if any(not 0 <= cost < math.inf for cost in found) or not sum(found):
    raise ValueError(
      f"costs must be finite, at least 0 and not all 0, got {list(found)}."
    )
  if stages * repeats > len(found):
    raise ValueError(
      "stages * repeats must be at most the number of layers, got "
      f"{stages} * {repeats} = {stages * repeats} for {len(found)}."
    )
  return found


def _told(group: range) -> str:
  return f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}"
