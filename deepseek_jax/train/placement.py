"""Where state and batches live on a mesh of devices."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax import models, parallel
from deepseek_jax.train.exchange import Exchange
from deepseek_jax.train.replicas import Replicas
from deepseek_jax.train.state import TrainState, split


class Placement:
  """Cuts the state by rules, and batches by rows, over a mesh.

  Args:
    mesh: A mesh with axes of `parallel.AXES`, or their sizes; None means all
      devices along "data".
    rules: How to cut parameters and other state of the model, see
      `parallel.specs`; they come before the library's own.
    exchange: How gradients are averaged; None leaves it to XLA.

  Raises:
    ValueError: If the mesh has an axis that is none of those, or its sizes do
      not fit the devices.
  """

  def __init__(
    self,
    mesh: Mesh | parallel.MeshSpec | None = None,
    rules: parallel.Rules = (),
    exchange: Exchange | None = None,
  ):
    if not isinstance(mesh, Mesh):
      mesh = parallel.make_mesh(mesh)
    self.mesh = _with_all_axes(mesh)
    self.rules = tuple(rules)
    self.exchange = exchange
    self.replicated = NamedSharding(self.mesh, PartitionSpec())
    self.rows = NamedSharding(self.mesh, PartitionSpec(parallel.BATCH_AXES))
    self.row_parts = math.prod(
      self.mesh.shape[name] for name in parallel.BATCH_AXES
    )

  def check(self, name: str, rows: int) -> None:
    """Raises when rows cannot be shared out evenly."""
    if rows % self.row_parts:
      raise ValueError(
        f"{name} must be divisible by the {self.row_parts} devices that the "
        f"mesh cuts rows over, got {rows}."
      )

  def reading(self, rows: int) -> dict[str, Any]:
    """Returns arguments of `data.batches`: what to read, and where to put it.

    Processes whose devices work on the same rows, as those along "tensor", read
    the same ones.

    Args:
      rows: Of a batch, over all processes; a multiple of `row_parts`.
    """
    if self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu":
      # The jitted step takes NumPy arrays faster than anything else could hand
      # them over.
      return {"transfer": None}
    index, count = self._share(rows)
    return {
      "process_index": index,
      "process_count": count,
      "transfer": functools.partial(self._put, rows),
    }

  def shardings(
    self, state: TrainState, model: nnx.Module | None = None
  ) -> Any:
    """Returns how every leaf of a state lies on the mesh.

    Args:
      state: Arrays, or their shapes.
      model: Decides which of the library's tables holds; None: the general one.

    Raises:
      ValueError: If a rule does not fit; by path.
    """
    params, rest = self._specs(state.params, state.rest, model)
    specs = jax.tree.map(lambda _: PartitionSpec(), state)._replace(
      params=params,
      rest=rest,
      opt_state=parallel.state_specs(
        state.opt_state, state.params, params, self.mesh
      ),
    )
    found = jax.tree.map(
      functools.partial(NamedSharding, self.mesh),
      specs,
      is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    if self.exchange is None:
      return found
    replicas = Replicas(self.exchange, self.mesh, params)
    return found._replace(
      opt_state=replicas.shardings(state.opt_state, state.params)
    )

  def replicas(self, model: nnx.Module) -> Replicas | None:
    """Returns the devices that exchange gradients of a model, if they do.

    Args:
      model: With arrays, or their shapes.
    """
    if self.exchange is None:
      return None
    _, params, rest = split(model)
    return Replicas(
      self.exchange, self.mesh, self._specs(params, rest, model)[0]
    )

  def _specs(self, params: Any, rest: Any, model: nnx.Module | None):
    """Returns how parameters, and other state of the model, lie."""
    rules = parallel.merge(self.rules, _table(model))
    return parallel.joint_specs((params, rest), rules, self.mesh)

  def on_host(self, arrays: Any) -> Any:
    """Returns NumPy arrays of what may lie on devices of other processes.

    Every process has to ask.
    """
    if jax.process_count() > 1:
      arrays = _copy_to(self.replicated)(arrays)
    return jax.device_get(arrays)

  def _share(self, rows: int) -> tuple[int, int]:
    """Returns which of how many equal parts of a batch this process needs."""
    needed = parallel.local_rows(rows, self.mesh)
    size, first = len(needed), int(needed[0])
    in_one_piece = needed[-1] - first + 1 == size
    if in_one_piece and first % size == 0 and rows % size == 0:
      return first // size, rows // size
    return 0, 1  # Scattered: reading all of them is simple, and right.

  def _put(self, rows: int, batch: Mapping[str, Any]) -> dict[str, Any]:
    if jax.process_count() == 1:
      return jax.device_put(dict(batch), self.rows)
    return {
      name: jax.make_array_from_process_local_data(
        self.rows, np.asarray(x), (rows, *x.shape[1:])
      )
      for name, x in batch.items()
    }


def on_one_device(arrays: Any) -> Any:
  """Returns copies on a device of this process of what a mesh may hold.

  Every process of the mesh has to ask.

  Args:
    arrays: All of them on one mesh, or on one device.
  """
  found = [x.sharding for x in jax.tree.leaves(arrays)]
  spread = [s for s in found if isinstance(s, NamedSharding)]
  if not spread:
    return arrays
  whole = NamedSharding(spread[0].mesh, PartitionSpec())
  copies = _copy_to(whole)(arrays)
  return jax.tree.map(lambda x: x.addressable_data(0), copies)


def _table(model: nnx.Module | None) -> parallel.Rules:
  """Returns the library's rules for a model."""
  if isinstance(model, models.LanguageModel):
    return parallel.LANGUAGE_MODEL
  if isinstance(model, models.Classifier):
    return parallel.CLASSIFIER
  return parallel.DEFAULT


def _with_all_axes(mesh: Mesh) -> Mesh:
  """Returns the same devices along all axes, in the library's order."""
  names = mesh.axis_names
  if unknown := sorted(set(names) - set(parallel.AXES)):
    raise ValueError(
      f"mesh must have axes of {parallel.AXES}, got {unknown[0]!r}."
    )
  if names == parallel.AXES and set(mesh.axis_types) == {AxisType.Auto}:
    return mesh
  ordered = [name for name in parallel.AXES if name in names]
  devices = mesh.devices.transpose([names.index(name) for name in ordered])
  devices = devices.reshape([mesh.shape.get(name, 1) for name in parallel.AXES])
  types = (AxisType.Auto,) * len(parallel.AXES)
  return Mesh(devices, parallel.AXES, axis_types=types)


@functools.cache
def _copy_to(sharding: NamedSharding):
  return jax.jit(lambda arrays: arrays, out_shardings=sharding)
