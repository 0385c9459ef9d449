"""Where state and batches live: data parallelism over one mesh axis."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Placement:
  """Replicates the state and shards batches over the mesh axis "data".

  Args:
    mesh: A mesh with one axis, "data"; None means all devices.

  Raises:
    ValueError: If the mesh has other axes, or there are other processes.
  """

  def __init__(self, mesh: Mesh | None = None):
    if jax.process_count() > 1:
      raise ValueError(
        "the trainer runs in one process so far, got "
        f"{jax.process_count()=}; use the transforms in a step of your own."
      )
    if mesh is None:
      mesh = jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)
      )
    if mesh.axis_names != ("data",):
      raise ValueError(
        f"mesh must have the one axis 'data', got {mesh.axis_names=}."
      )
    self.mesh = mesh
    self.replicated = NamedSharding(mesh, PartitionSpec())
    self.rows = NamedSharding(mesh, PartitionSpec("data"))

  @property
  def transfer(self) -> Callable[[Mapping[str, Any]], dict[str, Any]] | None:
    """What puts a batch on the devices.

    None for a single CPU: there the jitted step takes NumPy arrays faster than
    anything else could hand them over.
    """
    if self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu":
      return None
    return self._transfer

  def check(self, name: str, rows: int) -> None:
    """Raises when rows cannot be shared out evenly."""
    if rows % self.mesh.size:
      raise ValueError(
        f"{name} must be divisible by the {self.mesh.size} devices of the "
        f"mesh, got {rows}."
      )

  def _transfer(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    return jax.device_put(dict(batch), self.rows)
