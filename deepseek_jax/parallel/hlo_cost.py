"""What a compiled program computes and moves: products and bytes of memory.

A compiler's own cost analysis counts a loop's body once; here it counts as
often as it runs. Products are those of matrices: what else is computed runs
beside them or waits for memory. Bytes are those that instructions take from and
give to the large memory: what fusions keep inside, slices leave out, and fast
memory holds is not counted. Collectives are the network's business.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping

import numpy as np

from deepseek_jax.parallel import hlo, hlo_loops
from deepseek_jax.parallel.wire import COLLECTIVES

_KERNEL = "tpu_custom_call"
_FREE = frozenset(
  {
    "after-all",
    "async-done",
    "async-start",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "copy-done",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
  }
)
"""Instructions that move nothing, or whose parts are counted."""
_MOVED = frozenset(COLLECTIVES) | {
  f"{kind}-{end}" for kind in COLLECTIVES for end in ("start", "done")
}
_VIEWS = ("bitcast", "reshape", "copy", "convert", "transpose")
"""Instructions of a fusion behind which a slice of its operand may hide."""


@dataclasses.dataclass(frozen=True)
class Work:
  """What instructions do, as often as they run.

  Attributes:
    flops: of matrix products, by instruction.
    bytes: from and to the large memory, by instruction.
    unknown: kernels that do not say how many products they compute.
    open_loops: loops that depend on data; each is counted as one trip.
  """

  flops: Mapping[str, float]
  bytes: Mapping[str, float]
  unknown: tuple[str, ...]
  open_loops: tuple[str, ...]

  @property
  def total_flops(self) -> float:
    """Floating point operations of all products."""
    return math.fsum(self.flops.values())

  @property
  def total_bytes(self) -> float:
    """Bytes of all instructions."""
    return math.fsum(self.bytes.values())

  def seconds(self, flops: int | float, bandwidth: int | float) -> float:
    """Returns how long all take in turn, each as long as its slower half.

    Args:
      flops: that the device computes in a second.
      bandwidth: bytes that its memory moves in a second.
    """
    names = self.flops.keys() | self.bytes.keys()
    return math.fsum(
      max(self.flops.get(x, 0) / flops, self.bytes.get(x, 0) / bandwidth)
      for x in names
    )


def work(program: hlo.Program) -> Work:
  """Returns what a program computes and moves.

  >>> import jax
  >>> x = jax.ShapeDtypeStruct((64, 32), "float32")
  >>> compiled = jax.jit(lambda x: x @ x.T).lower(x).compile()
  >>> int(work(hlo.parse(compiled)).total_flops) == 2 * 64 * 32 * 64
  True

  Args:
    program: of `hlo.parse`.
  """
  unknown = []

  def leaf(one, site):
    if one.opcode in _FREE or one.opcode in _MOVED:
      return {}
    name = f"{site.computation.name}/{one.name}"
    flops = _flops(program, one, site.computation)
    if flops is None:
      unknown.append(one.name)
    moved = _bytes(program, one, site.computation)
    return {("flops", name): flops or 0, ("bytes", name): moved}

  total, open_loops = hlo_loops.count(program, leaf, fusions=False)
  pick = lambda what: {
    name: float(n) for (kind, name), n in total.items() if kind == what and n
  }
  return Work(
    pick("flops"), pick("bytes"), tuple(dict.fromkeys(unknown)), open_loops
  )


def _flops(
  program: hlo.Program, one: hlo.Instruction, computation: hlo.Computation
) -> int | float | None:
  """Returns the products of an instruction, None if a kernel keeps them."""
  if one.opcode == "dot":
    return _dot_flops(one, computation)
  if one.opcode == "convolution":
    return _convolution_flops(one, computation)
  if one.opcode == "custom-call" and _KERNEL in one.tail:
    return _estimate(one, "flops")
  if one.opcode == "fusion":
    inner = program.computations[one.calls("calls")[0]]
    return sum(
      _flops(program, x, inner) or 0 for x in inner.instructions.values()
    )
  return 0


def _dot_flops(one: hlo.Instruction, computation: hlo.Computation) -> int:
  left = _operand(one, computation, 0)
  match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.tail)
  summed = [int(i) for i in match[1].split(",") if i] if match else []
  return 2 * one.shapes[0].size * math.prod(left.dims[i] for i in summed)


def _convolution_flops(
  one: hlo.Instruction, computation: hlo.Computation
) -> int:
  """Returns products of a convolution: the TPU's name for a dot.

  Padding is not multiplied: of each spatial dimension it is the pairs of places
  in the output and in the kernel that meet a place in the input.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.tail)
  if labels is None:
    return 0
  data, kernel = (_operand(one, computation, i) for i in (0, 1))
  out = one.shapes[0]
  pairs = 1
  window = _window(one.tail, sum(c.isdigit() for c in labels[3]))
  for dim, (size, stride, low, inner, spread) in enumerate(window):
    n_in = data.dims[labels[1].index(str(dim))]
    n_out = out.dims[labels[3].index(str(dim))]
    pairs *= _meetings(n_in, n_out, size, stride, low, inner, spread)
  rows = out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")]
  return 2 * rows * kernel.dims[labels[2].index("i")] * pairs


def _window(tail: str, count: int) -> list[tuple[int, int, int, int, int]]:
  """Returns size, stride, padding, dilation of input and kernel by dim."""
  match = re.search(r"window=\{([^}]*)\}", tail)
  fields = dict(x.split("=") for x in match[1].split()) if match else {}

  def read(name: str, default: str) -> list[int]:
    values = fields[name].split("x") if name in fields else [default] * count
    return [int(value.split("_")[0]) for value in values]

  names = {"size": "1", "stride": "1", "pad": "0_0"}
  names |= {"lhs_dilate": "1", "rhs_dilate": "1"}
  return list(zip(*(read(*item) for item in names.items()), strict=True))


def _meetings(
  n_in: int, n_out: int, size: int, stride: int, low: int, inner: int,
  spread: int,
) -> int:  # fmt: skip
  """Returns how many (output, kernel) places meet a place of the input."""
  places, taps = np.arange(n_out)[:, None], np.arange(size)[None]
  at = places * stride + taps * spread - low
  inside = (at >= 0) & (at < n_in * inner)
  return int((inside & (at % inner == 0)).sum())


def _estimate(one: hlo.Instruction, what: str) -> float | None:
  """Returns what the writer of a kernel says that it costs."""
  match = re.search(r'"cost_estimate":(\{[^}]*\})', one.tail)
  return None if match is None else float(json.loads(match[1]).get(what, 0))


def _operand(
  one: hlo.Instruction, computation: hlo.Computation, index: int
) -> hlo.Shape:
  return computation.instructions[one.operands[index]].shapes[0]


def _bytes(
  program: hlo.Program, one: hlo.Instruction, computation: hlo.Computation
) -> int | float:
  """Returns the bytes an instruction takes from and gives to large memory."""
  taken = [computation.instructions[name] for name in one.operands]
  if one.opcode == "fusion":
    return _fusion_bytes(program, one, taken)
  if one.opcode == "custom-call":
    said = _estimate(one, "bytes_accessed")
    if said is not None:
      return said
    if _KERNEL not in one.tail:
      return 0
  if one.opcode == "copy-start":
    return _large(taken[0].shapes) + _large(one.shapes[:1])
  if one.opcode in ("dynamic-slice", "gather", "slice"):
    return 2 * _large(one.shapes)
  if one.opcode == "dynamic-update-slice":
    return 2 * _large(taken[1].shapes)
  return _large(one.shapes) + sum(_large(x.shapes) for x in taken)


def _large(shapes: tuple[hlo.Shape, ...]) -> int:
  return sum(shape.bytes for shape in shapes if not shape.fast)


def _fusion_bytes(
  program: hlo.Program, one: hlo.Instruction, taken: list[hlo.Instruction]
) -> int:
  inner = program.computations[one.calls("calls")[0]]
  by_number = {number: name for name, number in inner.parameters.items()}
  read = sum(
    _read(program, inner, by_number[number], _large(operand.shapes))
    for number, operand in enumerate(taken)
    if number in by_number
  )
  given = inner.root
  ends = given.operands if given.opcode == "tuple" else (given.name,)
  return read + sum(_written(inner, name) for name in ends)


def _read(
  program: hlo.Program, inner: hlo.Computation, name: str, whole: int
) -> int:
  """Returns how much of an operand a fusion reads."""
  read = 0
  for user in inner.users.get(name, ()):
    if user.opcode in ("dynamic-slice", "gather", "slice"):
      first = user.operands[0] == name
      read += sum(x.bytes for x in user.shapes) if first else 0
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      continue  # Written in place.
    elif user.opcode == "tuple" or user.opcode in _MOVED:
      continue  # Handed on, or the network's.
    elif user.opcode in _VIEWS and user.name != inner.root.name:
      read += _read(program, inner, user.name, whole)
    elif user.opcode == "fusion":
      deeper = program.computations[user.calls("calls")[0]]
      for number, operand in enumerate(user.operands):
        if operand == name:
          names = {n: x for x, n in deeper.parameters.items()}
          read += _read(program, deeper, names[number], whole)
    else:
      return whole
  return min(read, whole)


def _written(inner: hlo.Computation, name: str) -> int:
  """Returns how many bytes of a fusion's result are new."""
  one = inner.instructions[name]
  while one.opcode in _VIEWS:
    one = inner.instructions[one.operands[0]]
  if one.opcode == "dynamic-update-slice":
    return _large(inner.instructions[one.operands[1]].shapes)
  if one.opcode == "parameter" or one.opcode in _MOVED:
    return 0
  return _large(inner.instructions[name].shapes)
