"""Values of a program's scalars, as far as they can be told without running.

That is what loops need: their counters start at constants, change by constants
and are compared with constants, through tuples, copies and fusions.
"""

import operator
import re
from collections.abc import Sequence
from typing import Any

from deepseek_jax.parallel.hlo import Computation, Instruction, Program

Value = Any
"""An integer, a list of values for a tuple, or None for what is not known."""

_ARITHMETIC = {
  "add": operator.add,
  "subtract": operator.sub,
  "multiply": operator.mul,
  "maximum": max,
  "minimum": min,
}
_COMPARE = {
  "LT": operator.lt,
  "LE": operator.le,
  "GT": operator.gt,
  "GE": operator.ge,
  "EQ": operator.eq,
  "NE": operator.ne,
}
_SAME = (
  "bitcast",
  "convert",
  "copy",
  "copy-done",
  "copy-start",
  "opt-barrier",
  "reshape",
)


class Scalars:
  """Scalars of one computation, called with these arguments.

  Args:
    program: where the computations that it calls are.
    computation: whose.
    arguments: value of every parameter; None for those left out.
  """

  def __init__(
    self,
    program: Program,
    computation: Computation,
    arguments: Sequence[Value] = (),
  ):
    self._program = program
    self._computation = computation
    self._arguments = arguments
    self._known: dict[str, Value] = {}

  def root(self) -> Value:
    """Returns the value of what the computation gives."""
    return self[self._computation.root.name]

  def __getitem__(self, name: str) -> Value:
    """Returns the value of an instruction."""
    if name not in self._known:
      self._known[name] = self._find(self._computation.instructions[name])
    return self._known[name]

  def element(self, index: int) -> Value:
    """Returns the value of one element of the tuple that is the root."""
    root = self._computation.root
    if root.opcode == "tuple":
      return self[root.operands[index]]
    whole = self.root()
    return whole[index] if isinstance(whole, list) else None

  def _find(self, one: Instruction) -> Value:
    if one.opcode == "parameter":
      number = int(one.inside)
      known = number < len(self._arguments)
      return self._arguments[number] if known else None
    if one.opcode == "tuple":
      return [self[name] for name in one.operands]
    if not one.shape.startswith("(") and any(x.dims for x in one.shapes):
      return None
    if one.opcode == "constant":
      return _constant(one.inside)
    if one.opcode == "get-tuple-element":
      return _member(self[one.operands[0]], one.tail)
    if one.opcode in _SAME:
      return self[one.operands[0]]
    return self._computed(one)

  def _computed(self, one: Instruction) -> Value:
    if one.opcode in ("call", "fusion"):
      arguments = [self[name] for name in one.operands]
      called = self._program.computations[one.calls("calls", "to_apply")[0]]
      return Scalars(self._program, called, arguments).root()
    compute = _ARITHMETIC.get(one.opcode)
    if one.opcode == "compare":
      compute = _COMPARE[one.tail.partition("direction=")[2][:2]]
    if compute is None:
      return None
    values = [self[name] for name in one.operands]
    known = all(isinstance(value, int) for value in values)
    return compute(*values) if known else None


def _constant(text: str) -> int | None:
  if text in ("true", "false"):
    return int(text == "true")
  return int(text) if re.fullmatch(r"-?\d+", text) else None


def _member(value: Value, tail: str) -> Value:
  match = re.search(r"\bindex=(\d+)", tail)
  if not isinstance(value, list) or match is None:
    return None
  return value[int(match[1])]
