"""How often every instruction of a program runs.

Loops run as often as their compiler notes, or as their counter says when it is
followed from its start; those that depend on data count once.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_jax.parallel.hlo import Computation, Instruction, Program
from deepseek_jax.parallel.hlo_scalars import Scalars, Value

MAX_TRIPS = 100_000
"""Trips after which a counter is no longer followed."""

Totals = dict[Any, int | float]


@dataclasses.dataclass(frozen=True)
class Site:
  """Where an instruction stands.

  Attributes:
    computation: the one that it is of.
    fused: whether that is a fusion's.
    notes: what a leaf likes to remember for one run of the computation that is
      not fused, and its fusions.
  """

  computation: Computation
  fused: bool
  notes: set[str]


Leaf = Callable[[Instruction, Site], Mapping[Any, int | float]]
"""Counts one instruction."""


def count(
  program: Program, leaf: Leaf, *, fusions: bool = True
) -> tuple[Totals, tuple[str, ...]]:
  """Returns what `leaf` counts in one run of a program, and its open loops.

  Every instruction counts as often as it runs. Of a conditional it is the
  branch with the largest sum, so that a step is never said to cost less than
  it may. A loop whose trips nobody can tell counts once, and is named.

  Args:
    program: of `hlo.parse`.
    leaf: what one instruction counts, by any key.
    fusions: whether to look into fusions too.
  """
  counting = _Counting(program, leaf, fusions)
  total = counting.total(program.entry, ())
  return total, tuple(dict.fromkeys(counting.open_loops))


class _Counting:
  def __init__(self, program: Program, leaf: Leaf, fusions: bool):
    self._program = program
    self._leaf = leaf
    self._called = ["call", "async-start"] + ["fusion"] * fusions
    self.open_loops: list[str] = []

  def total(
    self,
    computation: Computation,
    arguments: Sequence[Value],
    notes: set[str] | None = None,
  ) -> Totals:
    """Returns the sum over a computation; with notes, over a fusion's."""
    fused = notes is not None
    site = Site(computation, fused, set() if notes is None else notes)
    scalars = Scalars(self._program, computation, arguments)
    total: Totals = {}
    for one in computation.instructions.values():
      _add(total, self._leaf(one, site), 1)
      if one.opcode == "while":
        self._add_loop(total, one, scalars)
      elif one.opcode == "conditional":
        _add(total, self._dearest_branch(one, scalars), 1)
      elif one.opcode in self._called:
        values = [scalars[name] for name in one.operands]
        inner = site.notes if one.opcode == "fusion" else notes
        for called in self._called_by(one, "calls", "to_apply"):
          _add(total, self.total(called, values, inner), 1)
    return total

  def _called_by(self, one: Instruction, *keys: str) -> list[Computation]:
    return [self._program.computations[name] for name in one.calls(*keys)]

  def _add_loop(
    self, total: Totals, loop: Instruction, scalars: Scalars
  ) -> None:
    condition, body = self._called_by(loop, "condition", "body")
    start = scalars[loop.operands[0]]
    kept = _kept(self._program, body, start)
    trips = _trips(self._program, loop, condition, body, start, kept)
    if trips is None:
      self.open_loops.append(loop.name)
    times = 1 if trips is None else trips
    _add(total, self.total(body, [kept]), times)
    _add(total, self.total(condition, [kept]), times)

  def _dearest_branch(self, one: Instruction, scalars: Scalars) -> Totals:
    keys = ("branch_computations", "true_computation", "false_computation")
    branches = self._called_by(one, *keys)
    values = [[scalars[name]] for name in one.operands[1:]]
    totals = [
      self.total(branch, value)
      for branch, value in zip(branches, values, strict=True)
    ]
    return max(totals, key=lambda total: sum(total.values()))


def _add(total: Totals, part: Mapping[Any, int | float], times: int) -> None:
  for key, value in part.items():
    total[key] = total.get(key, 0) + value * times


def _kept(program: Program, body: Computation, start: Value) -> Value:
  """Returns the tuple of a loop with None where an element may change."""
  if not isinstance(start, list):
    return None
  marks = [object() for _ in start]
  inner = Scalars(program, body, [marks])
  same = [inner.element(i) is mark for i, mark in enumerate(marks)]
  return [x if yes else None for x, yes in zip(start, same, strict=True)]


def _trips(
  program: Program,
  loop: Instruction,
  condition: Computation,
  body: Computation,
  start: Value,
  kept: Value,
) -> int | None:
  """Returns how often a loop runs, None if that depends on data."""
  noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.tail)
  if noted:
    return int(noted[1])
  if not isinstance(start, list):
    return None
  state, followed = list(kept), _read(condition)
  for index in followed:
    state[index] = start[index]
  for trip in range(MAX_TRIPS):
    goes_on = Scalars(program, condition, [state]).root()
    if not isinstance(goes_on, int):
      return None
    if not goes_on:
      return trip
    inner = Scalars(program, body, [state])
    for index, value in [(i, inner.element(i)) for i in followed]:
      state[index] = value
  return None


def _read(condition: Computation) -> list[int]:
  """Returns which elements of the loop's tuple its condition looks at."""
  taken = [
    re.search(r"\bindex=(\d+)", one.tail)
    for one in condition.instructions.values()
    if one.opcode == "get-tuple-element"
    and one.operands[0] in condition.parameters
  ]
  return sorted({int(match[1]) for match in taken if match})
