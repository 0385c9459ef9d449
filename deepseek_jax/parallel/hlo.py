"""Programs as XLA prints them: instructions, computations and their shapes.

Only what is needed to count bytes, products and loops is read; everything else
of an instruction stays text.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_PARENTHESIS = re.compile(r"[()]")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
"""Widths that a type's name does not say."""


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array: its type, dimensions and the memory it lies in.

  Attributes:
    dtype: as XLA names it, such as "bf16".
    dims: its sizes.
    fast: whether it lies in a TPU's vector memory, not in the large one.
  """

  dtype: str
  dims: tuple[int, ...]
  fast: bool = False

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Bytes of all elements, without padding."""
    return -(-self.size * _bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in its computation.
    shape: text of the type of what it gives.
    opcode: such as "all-reduce" or "fusion".
    operands: names of instructions of the same computation.
    inside: text between its parentheses: of a constant, its value.
    tail: text of the attributes.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  inside: str
  tail: str

  @functools.cached_property
  def shapes(self) -> tuple[Shape, ...]:
    """The arrays that it gives, those of nested tuples in order."""
    return parse_shapes(self.shape)

  def calls(self, *keys: str) -> tuple[str, ...]:
    """Returns the computations that these attributes name, in order."""
    found = []
    for key in keys:
      match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.tail)
      if match:
        found += _OPERAND.findall(match[1])
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order they run in."""

  name: str
  instructions: Mapping[str, Instruction]
  root: Instruction

  @functools.cached_property
  def parameters(self) -> dict[str, int]:
    """Number of a parameter by its name."""
    found = self.instructions.values()
    return {x.name: int(x.inside) for x in found if x.opcode == "parameter"}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Instructions that take one, by its name."""
    users: dict[str, list[Instruction]] = {}
    for instruction in self.instructions.values():
      for name in instruction.operands:
        users.setdefault(name, []).append(instruction)
    return users

  def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
    """Returns the arrays that an instruction takes."""
    taken = (self.instructions[name] for name in instruction.operands)
    return tuple(shape for one in taken for shape in one.shapes)


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    computations: by name.
    entry: the one that is run.
    num_devices: how many devices run it together.
  """

  computations: Mapping[str, Computation]
  entry: Computation
  num_devices: int


def parse(compiled: Any) -> Program:
  """Returns the program that a compiled function is.

  >>> import jax
  >>> parse(jax.jit(jax.numpy.sin).lower(1.0).compile()).num_devices
  1

  Args:
    compiled: what `jax.jit(f).lower(...).compile()` gives, or its text.

  Raises:
    ValueError: if there is no text, or it is no program.
  """
  text = compiled
  if not isinstance(compiled, str):
    text = getattr(compiled, "as_text", str)()
  lines = (text or "").splitlines()
  if not lines or not lines[0].startswith("HloModule"):
    begins = f" that begins with {text[:40]!r}" if text else ""
    raise ValueError(
      "compiled must be what jax.jit(f).lower(...).compile() gives, or the "
      f"text of its HloModule, got {type(compiled).__name__}{begins}."
    )
  computations, entry = _computations(lines)
  if entry is None:
    raise ValueError("the text of compiled has no ENTRY computation.")
  return Program(computations, computations[entry], _num_devices(lines[0]))


def parse_shapes(text: str) -> tuple[Shape, ...]:
  """Returns the arrays of a type, those of nested tuples in order.

  >>> parse_shapes("(f32[2,3]{1,0}, bf16[4]{0:T(256)S(1)})")[1].fast
  True
  """
  found, shapes = list(_ARRAY.finditer(text)), []
  for match, after in zip(found, [*found[1:], None], strict=True):
    layout = text[match.end() : after.start() if after else len(text)]
    dims = (int(n.lstrip("<=")) for n in match[2].split(",") if n)
    shapes.append(Shape(match[1], tuple(dims), "S(1)" in layout))
  return tuple(shapes)


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  width = re.match(r"[a-z]+(\d+)", dtype)
  return int(width[1]) if width else 0


def _num_devices(header: str) -> int:
  counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
  return math.prod(map(int, counts))


def _computations(
  lines: Sequence[str],
) -> tuple[dict[str, Computation], str | None]:
  found: dict[str, Computation] = {}
  entry, name = None, None
  body: dict[str, Instruction] = {}
  root = None
  for line in lines:
    header = _HEADER.match(line)
    if header:
      name, body, root = header[2], {}, None
      entry = name if header[1] else entry
    elif line.startswith("}") and name and root:
      found[name] = Computation(name, body, root)
      name = None
    elif name and (named := _NAMED.match(line)):
      instruction = _instruction(named[2], line[named.end() :])
      body[instruction.name] = instruction
      root = instruction if named[1] else root
  return found, entry


def _instruction(name: str, text: str) -> Instruction:
  """Returns an instruction from `type opcode(operands), attributes`."""
  # A tuple's type has spaces in it, an array's has none.
  end = _closing(text, 0) if text.startswith("(") else text.index(" ")
  shape, text = text[:end], text[end:].lstrip()
  begin = text.index("(")
  end = _closing(text, begin)
  inside = text[begin + 1 : end - 1]
  operands = tuple(_OPERAND.findall(inside))
  return Instruction(name, shape, text[:begin], operands, inside, text[end:])


def _closing(text: str, begin: int) -> int:
  """Returns the place behind the parenthesis that closes the one at begin."""
  depth = 0
  for match in _PARENTHESIS.finditer(text, begin):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.end()
  raise ValueError(f"a parenthesis of the program stays open: {text[:80]!r}.")
