"""Whether a step fits a pod, how fast it could be, and what limits it.

Before anybody pays for the pod: the step is compiled for it, not run.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import pickle
from collections.abc import Callable, Mapping, Sequence

import jax

from deepseek_jax.parallel.mesh import MeshSpec
from deepseek_jax.parallel.preflight_compile import (
  Build,
  Compiled,
  Compiler,
  Memory,
  allow_devices,
  best_compiler,
  compile_step,
)
from deepseek_jax.parallel.roofline import Roofline, efficiency, roofline
from deepseek_jax.parallel.topology import Topology, parse

ModelFlops = Callable[[MeshSpec], float]
"""Products that a step asks for on a mesh, of all devices together."""


@dataclasses.dataclass(frozen=True)
class Report:
  """What is known of a step before it runs; all of one device.

  Attributes:
    topology: name of the chips.
    num_devices: how many devices they are.
    mesh: its axes of more than one device, and their sizes.
    compiler: who compiled it.
    memory: what it takes.
    room: bytes of memory that there are.
    roofline: how fast it could be; None if it does not fit the compiler.
  """

  topology: str
  num_devices: int
  mesh: Mapping[str, int]
  compiler: str
  memory: Memory
  room: int
  roofline: Roofline | None

  @property
  def fits(self) -> bool:
    """Whether it has memory enough."""
    return self.memory.total <= self.room

  @property
  def spare(self) -> int:
    """Bytes left over; negative for bytes missing."""
    return self.room - self.memory.total

  @property
  def advice(self) -> str | None:
    """What would make it fit; None if it does."""
    return None if self.fits else _advice(self)


def run(
  build: Build,
  topology: str | Topology,
  spec: MeshSpec | None = None,
  *,
  model_flops: ModelFlops | None = None,
  compiler: Compiler | None = None,
  options: Mapping[str, str] | None = None,
) -> Report:
  """Returns whether a step fits a topology, and how fast it could be.

  The step is traced as if on a TPU, so that it takes the kernels it would take
  there. Start Python with `JAX_PLATFORMS=cpu`, or JAX may look for a TPU.

  Args:
    build: from a mesh to (step, arguments): a function, jitted with the
      donation and the shardings it runs with, and its arguments as
      `jax.ShapeDtypeStruct` with shardings. It must make a new function every
      time. The batch is that of all devices of the mesh.
    topology: such as "v5p:8x8x16", see `topology.parse`.
    spec: sizes of the mesh; everything along "data" if None.
    model_flops: products of a step that the model asks for, for the share of
      the peak; that is not told if None.
    compiler: "tpu", or "cpu" for fake CPU devices, which guess; the former if
      it is installed if None. Where JAX has fewer devices already than the
      topology, "cpu" compiles in a process of its own, for which `build` and
      `model_flops` must be functions of a module.
    options: of the compiler; for "tpu" those of `xla_flags.TPU` if None, as
      `set_xla_flags` gives them to a job.

  Raises:
    ValueError: if there is no such topology, the mesh does not fit it, or
      `build` cannot be sent to another process.
  """
  place = parse(topology) if isinstance(topology, str) else topology
  sizes = (spec or MeshSpec()).resolve(place.num_devices)
  compiler = compiler or best_compiler()
  if compiler == "tpu" or allow_devices(place.num_devices):
    compiled = compile_step(build, place, sizes, compiler, options)
    return _report(compiled, place, sizes, model_flops)
  work = (build, place, sizes, model_flops, options)
  return _elsewhere(work)


def weak_scaling(
  build: Build,
  topologies: Sequence[str | Topology],
  spec_of: Callable[[Topology], MeshSpec],
  *,
  model_flops: ModelFlops | None = None,
  compiler: Compiler | None = None,
  options: Mapping[str, str] | None = None,
) -> list[Report]:
  """Returns a report for every topology, for `scaling_efficiency`.

  Args:
    build: as in `run`; its batch should grow with the mesh.
    topologies: the smallest first, as `topology.scales` gives them.
    spec_of: the mesh for a topology.
    model_flops: as in `run`, and so are the others.
    compiler: which one.
    options: of the compiler.
  """
  places = [parse(x) if isinstance(x, str) else x for x in topologies]
  return [
    run(
      build, place, spec_of(place), model_flops=model_flops, compiler=compiler,
      options=options,
    )
    for place in places
  ]  # fmt: skip


def scaling_efficiency(
  reports: Sequence[Report], *, overlapped: bool
) -> dict[int, float]:
  """Returns by number of devices what is left of the speed of a device.

  Against the smallest; more than 1 where more devices have better links.

  Args:
    reports: of `weak_scaling`, all of which fit.
    overlapped: whether everything overlaps; nothing does if False.
  """
  seconds, work = {}, {}
  for report in reports:
    found = report.roofline
    if found is None:
      raise ValueError(
        f"reports must all fit, got {report.topology} that takes "
        f"{-report.spare:,} bytes too many."
      )
    n = report.num_devices
    seconds[n] = found.overlapped if overlapped else found.apart
    work[n] = found.model_flops or found.flops
  return efficiency(seconds, work)


def _report(
  compiled: Compiled,
  topology: Topology,
  spec: MeshSpec,
  model_flops: ModelFlops | None,
) -> Report:
  flops = None if model_flops is None else float(model_flops(spec))
  found = None
  if compiled.text is not None:
    found = roofline(compiled.text, topology, spec, model_flops=flops)
  chip = topology.chip
  return Report(
    topology=topology.name,
    num_devices=topology.num_devices,
    mesh={name: n for name, n in spec.sizes.items() if n > 1},
    compiler=compiled.compiler,
    memory=compiled.memory,
    room=compiled.room or chip.hbm // chip.cores,
    roofline=found,
  )


def _elsewhere(work: tuple) -> Report:
  """Returns the report of a process with as many devices as it takes."""
  try:
    pickle.dumps(work)
  except (pickle.PicklingError, AttributeError, TypeError) as error:
    count = work[1].num_devices
    raise ValueError(
      "build and model_flops must be functions of a module, to be run in a "
      f"process with {count} fake CPU devices ({error}); or set "
      f"JAX_NUM_CPU_DEVICES={count} before JAX starts."
    ) from error
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(_run_alone, *work).result()


def _run_alone(
  build: Build,
  topology: Topology,
  spec: MeshSpec,
  model_flops: ModelFlops | None,
  options: Mapping[str, str] | None,
) -> Report:
  jax.config.update("jax_platforms", "cpu")
  allow_devices(topology.num_devices)
  compiled = compile_step(build, topology, spec, "cpu", options)
  return _report(compiled, topology, spec, model_flops)


def _advice(report: Report) -> str:
  """Says by how much a step does not fit, and which axis would help.

  A fixed number of devices shares a fixed batch: axes that cut a row leave more
  rows to a device. So the state is what axes make smaller; for activations it
  takes more devices, or less to keep.
  """
  memory, gib = report.memory, 2**30
  missing = f"{-report.spare / gib:.1f} GiB too much"
  rest = memory.total - memory.arguments
  if rest >= report.room:
    return (
      f"{missing}: what a step keeps while it runs takes {rest / gib:.1f} GiB "
      "alone. More devices along data (fewer rows for each), or sequence where "
      "a device has one row, or remat, or a smaller batch."
    )
  factor = 2 ** math.ceil(math.log2(memory.arguments / (report.room - rest)))
  size = report.mesh.get("fsdp", 1) * factor
  took = (memory.arguments / factor + rest) / gib
  if size <= report.num_devices:
    return (
      f"{missing}: parameters and their state take "
      f"{memory.arguments / gib:.1f} GiB. fsdp={size} would cut them in "
      f"{factor}, to about {took:.1f} GiB in all."
    )
  return (
    f"{missing}: parameters and their state take "
    f"{memory.arguments / gib:.1f} GiB, and fsdp={size}, which would do, needs "
    f"more than these {report.num_devices} devices."
  )
