"""Compiles a step for chips that are not there.

The real compiler of TPUs needs none of them (`pip install deepseek-jax[tpu]`
brings it). Without it, as many fake CPU devices as there would be chips stand
in: the same partitions and collectives, but other fusions, other layouts and no
word on what a TPU would keep.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from deepseek_jax.parallel import xla_flags
from deepseek_jax.parallel.mesh import MeshSpec, make_mesh
from deepseek_jax.parallel.topology import Topology

Build = Callable[[Mesh], tuple[Callable[..., Any], Sequence[Any]]]
"""Makes, for a mesh, a step and its arguments as shapes with shardings."""

Compiler = Literal["tpu", "cpu"]
# "Used 20G of 15G hbm", or "temporaries (20G) exceeds available HBM (15G)".
_FULL = re.compile(
  r"(?:Used |\()([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM) "
  r"\(?([\d.]+)([KMGT]?)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Else the compiler looks for chips, for others who use them, or complains that
# it does not know which it runs on: it need not, and compiles for any.
_ALONE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a step takes of one device's memory, in bytes.

  Attributes:
    arguments: what goes in: parameters, optimizer state, batch.
    outputs: what comes out into memory of its own, not into a donated argument.
    temporary: what it needs while it runs: activations, gradients.
    code: the program.
  """

  arguments: int
  outputs: int
  temporary: int
  code: int

  @property
  def total(self) -> int:
    """All of them: what has to fit."""
    return self.arguments + self.outputs + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What a compiler made of a step.

  Attributes:
    compiler: which one, in words.
    memory: of one device.
    text: the program; None if the compiler gave up for want of memory.
    room: bytes that a program may take, as the compiler said when it gave up.
  """

  compiler: str
  memory: Memory
  text: str | None
  room: int | None = None


def best_compiler() -> Compiler:
  """Returns "tpu" where its compiler is installed, else "cpu"."""
  return "tpu" if importlib.util.find_spec("libtpu") else "cpu"


def memory_of(compiled: jax.stages.Compiled) -> Memory:
  """Returns what a compiled function takes of one device's memory.

  >>> x = jax.ShapeDtypeStruct((256,), "float32")
  >>> memory_of(jax.jit(lambda x: x + 1).lower(x).compile()).arguments
  1024

  Args:
    compiled: what `jax.jit(f).lower(...).compile()` gives.

  Raises:
    ValueError: if its compiler does not say.
  """
  stats = compiled.memory_analysis()
  if stats is None:
    raise ValueError("the compiler of compiled says nothing about memory.")
  return Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    temporary=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )


def compile_step(
  build: Build,
  topology: Topology,
  spec: MeshSpec,
  compiler: Compiler,
  options: Mapping[str, str] | None,
) -> Compiled:
  """Returns the step, compiled for the topology.

  Args:
    build: as in `preflight.run`.
    topology: the chips.
    spec: the mesh, with sizes that fit them.
    compiler: which one.
    options: of the compiler.

  Raises:
    ValueError: if there are too few fake CPU devices in this process.
  """
  if compiler == "tpu":
    with _environment(_ALONE):
      devices, name = _chips(topology), _tpu_compiler()
  else:
    devices, name = _fake_devices(topology), "fake CPU devices"
  mesh = make_mesh(spec, devices)
  with as_if_on(compiler):
    step, arguments = build(mesh)
    jitted: Any = step if hasattr(step, "lower") else jax.jit(step)
    lowered = jitted.lower(*arguments)
  try:
    compiled = lowered.compile(_options(compiler, options))
  except jax.errors.JaxRuntimeError as error:
    return too_large(error, name, arguments)
  return Compiled(name, memory_of(compiled), compiled.as_text())


def _options(
  compiler: Compiler, options: Mapping[str, str] | None
) -> dict[str, str] | None:
  """Returns the options to compile with: those that a job would run with."""
  if options is None and compiler == "tpu":
    options = dict.fromkeys(xla_flags.TPU, "true")
  return dict(options) if options else None


@contextlib.contextmanager
def as_if_on(platform: str) -> Iterator[None]:
  """Lets code that asks `jax.default_backend()` believe in a platform.

  It is what chooses kernels while a step is traced. Not for several threads.

  >>> with as_if_on("tpu"):
  ...   jax.default_backend()
  'tpu'
  """
  real = jax.default_backend
  jax.default_backend = lambda: platform
  try:
    yield
  finally:
    jax.default_backend = real


def allow_devices(count: int) -> bool:
  """Gives this process so many fake CPU devices, if it is not too late.

  Args:
    count: how many are needed.

  Returns:
    Whether there are.
  """
  with contextlib.suppress(RuntimeError):  # JAX has made its devices already.
    jax.config.update("jax_num_cpu_devices", count)
  return len(jax.devices("cpu")) >= count


def _chips(topology: Topology) -> Sequence[Any]:
  slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
  name = topology.name.partition("*")[0]
  found = topologies.get_topology_desc(name, "tpu", **slices)
  return found.devices


def _tpu_compiler() -> str:
  version = importlib.metadata.version("libtpu")
  return f"the TPU compiler (libtpu {version})"


def _fake_devices(topology: Topology) -> Sequence[Any]:
  devices = jax.devices("cpu")
  if len(devices) < topology.num_devices:
    raise ValueError(
      f"topology {topology.name!r} needs {topology.num_devices} fake CPU "
      f"devices, got {len(devices)}: set JAX_NUM_CPU_DEVICES before JAX starts."
    )
  return devices[: topology.num_devices]


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
  """Sets variables that the user has not set."""
  values = {k: v for k, v in values.items() if k not in os.environ}
  os.environ.update(values)
  try:
    yield
  finally:
    for name in values:
      del os.environ[name]


def too_large(
  error: Exception, name: str, arguments: Sequence[Any]
) -> Compiled:
  """Returns what a compiler says that found too little memory.

  Raises:
    Exception: the error itself, if it is another one.
  """
  found = _FULL.search(str(error))
  if found is None:
    raise error
  used = int(float(found[1]) * _UNITS[found[2]])
  room = int(float(found[3]) * _UNITS[found[4]])
  inside = sum(map(_bytes_on_device, jax.tree.leaves(arguments)))
  memory = Memory(inside, 0, max(0, used - inside), 0)
  return Compiled(name, memory, None, room)


def _bytes_on_device(leaf: Any) -> int:
  shape = leaf.shape
  if getattr(leaf, "sharding", None) is not None:
    shape = leaf.sharding.shard_shape(shape)
  size = 1
  for length in shape:
    size *= length
  return size * leaf.dtype.itemsize
