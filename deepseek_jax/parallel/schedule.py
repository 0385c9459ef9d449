"""Which micro-batch a stage of a pipeline works on, and when."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.core.arguments import require_static


class Visit(NamedTuple):
  """What a stage does in a tick; numbers, or arrays of them.

  Attributes:
    is_working: whether it does anything that counts.
    repeat: which of its groups of layers it applies; in [0, repeats) always.
    microbatch: to which micro-batch; out of range where it does not work.
  """

  is_working: Any
  repeat: Any
  microbatch: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """When each stage of a pipeline works on what.

  In every tick each stage applies one group of layers to one micro-batch, and
  hands it to the next stage. With one repeat this is GPipe. With R the pipeline
  is circular: stage s holds groups s, S + s, 2·S + s, ... of S·R, and the last
  stage hands on to the first. Micro-batches go in waves of S, so that each is
  back at the first stage just when that is free for it: nothing waits. Either
  way every group sees the micro-batches in their order.

  >>> print(Schedule(stages=2, microbatches=4))
  stage 0 | 0  1  2  3  .
  stage 1 | .  0  1  2  3
  2 stages, 4 micro-batches, 1 repeat: 5 ticks, of which a stage idles 20.0 %

  Attributes:
    stages: S, at least 1.
    microbatches: M, a multiple of S.
    repeats: R, groups of layers that a stage holds, at least 1.

  Raises:
    ValueError: If a number is out of its range.

  References:
    Huang et al., "GPipe", 2018, https://arxiv.org/abs/1811.06965
    Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
    Clusters Using Megatron-LM", 2021, https://arxiv.org/abs/2104.04473 (several
    groups of layers a stage, micro-batches in waves)
  """

  stages: int
  microbatches: int
  repeats: int = 1

  def __post_init__(self):
    """Checks the numbers."""
    for name, value in dataclasses.asdict(self).items():
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
          f"{name} must be an integer of at least 1, got {name}={value!r}."
        )
    if self.microbatches % self.stages:
      raise ValueError(
        "microbatches must be a multiple of the stages, got microbatches="
        f"{self.microbatches} for {self.stages} stages."
      )

  @property
  def slots(self) -> int:
    """How many visits each stage makes: R·M."""
    return self.repeats * self.microbatches

  @property
  def ticks(self) -> int:
    """How many visits take place one after the other."""
    return self.slots + self.stages - 1

  def visit(self, tick: Any, stage: Any) -> Visit:
    """Returns what a stage does in a tick: of integers or arrays of them."""
    slot = tick - stage
    wave = slot // (self.stages * self.repeats)
    return Visit(
      is_working=(slot >= 0) & (slot < self.slots),
      repeat=slot // self.stages % self.repeats,
      microbatch=wave * self.stages + slot % self.stages,
    )

  def plan(self) -> Visit:
    """Returns all visits, as arrays of one row a stage and one column a tick.

    >>> Schedule(stages=2, microbatches=2, repeats=2).plan().microbatch
    array([[ 0,  1,  0,  1,  2],
           [-1,  0,  1,  0,  1]])
    """
    return self.visit(np.arange(self.ticks), np.arange(self.stages)[:, None])

  def __str__(self) -> str:
    """Draws it: one row a stage, one column a tick, repeats by letters."""
    plan = self.plan()
    letter = (lambda r: chr(ord("a") + r % 26)) if self.repeats > 1 else str
    cells = [
      [
        f"{m}{letter(r) if self.repeats > 1 else ''}" if works else "."
        for works, r, m in zip(*row, strict=True)
      ]
      for row in zip(*plan, strict=True)
    ]
    width = max(len(cell) for row in cells for cell in row)
    lines = [
      f"stage {stage} | "
      + "  ".join(cell.ljust(width) for cell in row).rstrip()
      for stage, row in enumerate(cells)
    ]
    share = bubble(self.stages, self.microbatches, self.repeats)
    lines.append(
      f"{_count(self.stages, 'stage')}, "
      f"{_count(self.microbatches, 'micro-batch', 'es')}, "
      f"{_count(self.repeats, 'repeat')}: {_count(self.ticks, 'tick')}, of "
      f"which a stage idles {share:.1%}".replace("%", " %")
    )
    return "\n".join(lines)


def bubble(stages: int, microbatches: int, repeats: int = 1) -> float:
  """Returns the share of a pipeline's time in which a stage idles.

  (S - 1) / (R·M + S - 1), in [0, 1): small where micro-batches, or rounds that
  they make, are many for the stages.

  >>> bubble(4, 8), bubble(4, 8, repeats=3)
  (0.2727272727272727, 0.1111111111111111)

  Args:
    stages: S, at least 1.
    microbatches: M, at least 1.
    repeats: R, groups of layers that a stage holds, at least 1.

  Raises:
    ValueError: If a number is below 1.

  References:
    Narayanan et al., "Efficient Large-Scale Language Model Training on GPU
    Clusters Using Megatron-LM", 2021, https://arxiv.org/abs/2104.04473
  """
  require_static(1, stages=stages, microbatches=microbatches, repeats=repeats)
  return (stages - 1) / (repeats * microbatches + stages - 1)


def _count(number: int, noun: str, plural: str = "s") -> str:
  return f"{number} {noun}{'' if number == 1 else plural}"
