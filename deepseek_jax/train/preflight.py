"""An experiment against a pod that is not there."""

import dataclasses
import math
from typing import TYPE_CHECKING

from deepseek_jax import parallel
from deepseek_jax.parallel import preflight, preflight_report, topology
from deepseek_jax.train.plan import Plan

if TYPE_CHECKING:
  from deepseek_jax.train.config import Experiment

_FEWEST = 8  # Chips of the smallest of a table of scaling.


def preflight_text(
  experiment: "Experiment", name: str, *, scaling: bool = False
) -> tuple[str, bool]:
  """Returns what a pod would make of an experiment, and whether it fits.

  Args:
    experiment: What is to be trained; its batch is that of the whole pod.
    name: Of the pod, such as "v5p:8x8x16".
    scaling: Whether to add a table from 8 chips to all of them, the batch
      growing with them.

  Raises:
    ValueError: If there is no such pod, or the mesh, the batch or a rule does
      not fit it.
  """
  place = topology.parse(name)
  plan = Plan.of(experiment)
  report = _report(plan, place, plan.mesh)
  text = preflight_report.render(report)
  if not (scaling and report.fits):
    return text, report.fits
  smaller = topology.scales(place.chip, _FEWEST, place.num_chips // 2)
  reports = [
    _report(
      plan.grown(other.num_devices / place.num_devices),
      other,
      smaller_mesh(plan.mesh.resolve(place.num_devices), other.num_devices),
    )
    for other in smaller
  ]
  table = preflight_report.render_scaling([*reports, report])
  return (
    f"{text}\n\nthe same work a device on more and more of them\n{table}",
    True,
  )


def smaller_mesh(spec: parallel.MeshSpec, devices: int) -> parallel.MeshSpec:
  """Returns the mesh for fewer devices: fewer copies, then fewer parts.

  >>> smaller_mesh(parallel.MeshSpec(data=4, fsdp=8, tensor=2), 16)
  MeshSpec(replica=1, stage=1, data=1, fsdp=8, expert=1, sequence=1, tensor=2)

  Args:
    spec: Sizes for more devices.
    devices: How many there are.
  """
  sizes = spec.sizes
  for name in (
    "replica",
    "data",
    "fsdp",
    "stage",
    "expert",
    "sequence",
    "tensor",
  ):
    while math.prod(sizes.values()) > devices and sizes[name] % 2 == 0:
      sizes[name] //= 2
  return parallel.MeshSpec(**sizes).resolve(devices)


def _report(
  plan: Plan, place: topology.Topology, spec: parallel.MeshSpec
) -> preflight.Report:
  flops = plan.model_flops
  return preflight.run(
    dataclasses.replace(plan, mesh=spec).build_step,
    place,
    spec,
    model_flops=None if flops is None else lambda _: flops,
  )
