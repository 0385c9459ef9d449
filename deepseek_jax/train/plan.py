"""An experiment's train step on a mesh, before anything is allocated."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import optax
from jax.sharding import Mesh

from deepseek_jax import data as data_lib
from deepseek_jax import parallel
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.exchange import Exchange, as_exchange
from deepseek_jax.train.initial import Build, abstract_state, without_values
from deepseek_jax.train.placement import Placement
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import StepSpec, jit_once, make_train_step

if TYPE_CHECKING:
  from deepseek_jax.train.config import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a step computes, and on what.

  >>> from deepseek_jax import train
  >>> plan = Plan.of(train.Experiment())
  >>> plan.batch["image"].shape
  (64, 8, 8, 1)

  Attributes:
    build: Makes the model.
    tx: The transform.
    spec: What a step does.
    batch: Shapes of a batch of all processes, by name.
    mesh: Sizes of the mesh's axes.
    model_flops: Operations that the model itself asks for in a step, forward
      and backward, recomputing not counted; None if nobody knows.
    exchange: How gradients are averaged; None leaves it to XLA.
  """

  build: Build
  tx: optax.GradientTransformation
  spec: StepSpec
  batch: dict[str, jax.ShapeDtypeStruct]
  mesh: parallel.MeshSpec
  model_flops: int | float | None = None
  exchange: Exchange | None = None

  @classmethod
  def of(cls, experiment: "Experiment") -> "Plan":
    """Returns the plan of an experiment; reads the schema of its data."""
    data = experiment.data.load()
    # One row tells the shapes of all: a pod's batch may be larger than the data
    # that is at hand here.
    one = next(iter(data_lib.batches(data.train, 1, shuffle=False, prefetch=0)))
    rows = experiment.data.batch_size
    settings = experiment.train
    tx = experiment.build_optimizer(experiment.total_steps(data))
    if settings.clip_norm is not None:
      tx = optax.chain(optax.clip_by_global_norm(settings.clip_norm), tx)
    return cls(
      build=functools.partial(experiment.build_model, data.schema),
      tx=tx,
      spec=StepSpec.of(
        data.schema,
        experiment.build_loss(data.schema),
        accumulate=settings.accumulate,
        l1=settings.l1,
        l2=settings.l2,
        max_skipped=settings.max_skipped,
      ),
      batch={
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
        for name, x in one.items()
      },
      mesh=experiment.mesh,
      model_flops=experiment.model_flops(data.schema),
      exchange=as_exchange(experiment.exchange),
    )

  @property
  def rows(self) -> int:
    """Rows of a batch."""
    return next(iter(self.batch.values())).shape[0]

  def grown(self, times: int | float) -> "Plan":
    """Returns the plan for so many times the rows."""
    rows = round(self.rows * times)
    return dataclasses.replace(
      self,
      batch={
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
        for name, x in self.batch.items()
      },
      model_flops=self.model_flops and self.model_flops * rows / self.rows,
    )

  def build_step(
    self, mesh: Mesh
  ) -> tuple[Any, tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]]:
    """Returns the jitted step and its arguments, shapes with shardings.

    Args:
      mesh: Of devices that need not be there, see `parallel.preflight`.

    Raises:
      ValueError: If rows or rules do not fit the mesh.
    """
    placement = Placement(mesh, exchange=self.exchange)
    placement.check(
      "batch_size / accumulate", self.rows // self.spec.accumulate
    )
    model, tx = without_values(self.build), self.tx
    replicas = placement.replicas(model)
    if replicas is not None:
      tx = replicas.transform(tx)
    shapes, shardings = abstract_state(
      self.build, tx, self.spec.task, placement
    )
    training, _ = state_lib.structures(model)
    step = jit_once(
      make_train_step(training, tx, self.spec, replicas),
      "training step",
      mesh=placement.mesh,
      donate_argnums=0,
      out_shardings=shardings,
    )
    batch = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.rows)
      for name, x in self.batch.items()
    }
    return step, (jax.tree.map(_placed, shapes, shardings), batch)

  def dry_run(self, devices: Sequence[jax.Device]) -> "DryRun":
    """Compiles the step; allocates nothing.

    Args:
      devices: What the mesh is made of, see `devices_for`.

    Raises:
      ValueError: As `build_step`, or if the mesh does not fit the devices.
    """
    mesh = parallel.make_mesh(self.mesh, devices)
    step, (state, batch) = self.build_step(mesh)
    compiled = step.lower(state, batch).compile()
    memory = compiled.memory_analysis()
    return DryRun(
      mesh={name: n for name, n in mesh.shape.items() if n > 1},
      devices=f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
      parameters=sum(x.size for x in jax.tree.leaves(state.params)),
      bytes_of={
        "parameters": parallel.device_bytes(state.params),
        "other state of the model": parallel.device_bytes(state.rest),
        "optimizer": parallel.device_bytes(state.opt_state),
        "batch": parallel.device_bytes(batch),
        "temporary": memory.temp_size_in_bytes,
      },
      sent=parallel.wire_bytes(compiled, mesh),
      leaves=parallel.describe(state.params),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DryRun:
  """What a compiled step says of itself; bytes are those of one device.

  Attributes:
    mesh: Sizes of the axes with more than one device.
    devices: How many of which kind it was compiled for.
    parameters: How many numbers are trained.
    bytes_of: Memory by what is kept in it.
    sent: Bytes sent in a step, by collective and axes, see
      `parallel.wire_bytes`.
    leaves: A table of all parameters.
  """

  mesh: dict[str, int]
  devices: str
  parameters: int
  bytes_of: dict[str, int]
  sent: dict[str, dict[str, float]]
  leaves: str

  def __str__(self) -> str:
    """Returns a page for people."""
    axes = ", ".join(f"{name} {n}" for name, n in self.mesh.items())
    lines = [
      self.leaves,
      "",
      f"mesh: {axes or 'one device'} ({self.devices})",
      f"parameters: {self.parameters:,}",
      "",
      "memory of a device",
      *_table({**self.bytes_of, "together": sum(self.bytes_of.values())}),
      "",
      "bytes that a device sends in a step",
    ]
    sent = {
      f"{kind} over {axes}": count
      for kind, places in self.sent.items()
      for axes, count in places.items()
    }
    if not sent:
      return "\n".join([*lines, "  none"])
    return "\n".join(
      [*lines, *_table({**sent, "together": sum(sent.values())})]
    )


def devices_for(spec: parallel.MeshSpec) -> list[jax.Device]:
  """Returns the devices there are, or as many fake ones as a mesh asks for.

  To be called before anything else touches the devices: there can be fake ones
  only until then.

  Args:
    spec: Sizes; an open one counts as 1 where there are too few devices.
  """
  wanted = math.prod(n for n in spec.sizes.values() if n != -1)
  if jax.config.jax_num_cpu_devices < wanted:  # pyrefly: ignore
    with contextlib.suppress(RuntimeError):
      jax.config.update("jax_num_cpu_devices", wanted)
  devices = jax.devices()
  fits = len(devices) % wanted == 0 and -1 in spec.sizes.values()
  if fits or len(devices) == wanted:
    return devices
  return jax.devices("cpu")[:wanted]


def _placed(
  shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _table(rows: Mapping[str, int | float]) -> list[str]:
  width = max(map(len, rows))
  return [f"  {name:{width}}  {_size(n):>9}" for name, n in rows.items()]


def _size(count: int | float) -> str:
  """Returns bytes in a unit that leaves few digits.

  >>> _size(1_536_000)
  '1.54 MB'
  """
  power = min(int(math.log10(max(count, 1)) / 3), 4)
  unit = ("B", "kB", "MB", "GB", "TB")[power]
  return f"{count / 1000**power:.{2 if power else 0}f} {unit}"
