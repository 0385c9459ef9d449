"""State of exchanges, and how it lies on a mesh."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float32

from deepseek_jax.comm.axes import AxisName
from deepseek_jax.core.typing import Count, PyTree


class PerDevice(NamedTuple):
  """What each device keeps for itself.

  Every array has a leading axis: of one element inside `jax.shard_map`, of all
  devices outside.
  """

  arrays: PyTree


class ExchangeState(NamedTuple):
  """State of a gradient exchange."""

  count: Count  # shape=(), dtype=int32: exchanges done
  errors: PerDevice  # what was not sent yet, and what else a device remembers
  relative_error: Float32[Array, ""]  # of the latest: what is left / all
  sent_bytes: Float32[Array, ""]  # by a device, in the latest


def state_specs(state: PyTree, axis_name: AxisName) -> PyTree:
  """Returns a `PartitionSpec` for every array of a state.

  Of what each device keeps for itself the leading axis is cut over the axes of
  the exchange; all else is whole. For `in_specs` and `out_specs`.

  >>> state = {"a": PerDevice(jax.numpy.zeros((8, 3))), "b": jax.numpy.zeros(3)}
  >>> state_specs(state, "data")
  {'a': PerDevice(arrays=P('data',)), 'b': P()}

  Args:
    state: Of `init`, or of its shapes; any transforms may surround exchanges.
    axis_name: As given to the exchange; of several in any order.
  """
  names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
  is_own = lambda x: isinstance(x, PerDevice)

  def place(node: Any) -> Any:
    spec = PartitionSpec(names) if is_own(node) else PartitionSpec()
    return jax.tree.map(lambda _: spec, node)

  return jax.tree.map(place, state, is_leaf=is_own)


def init(
  tx: optax.GradientTransformation,
  params: PyTree,
  mesh: Mesh | AbstractMesh,
  axis_name: AxisName,
  specs: PyTree | None = None,
) -> PyTree:
  """Returns the state of a transform that exchanges, for parameters on a mesh.

  `tx.init` must know the sizes of the axes, and so be called where they are:

  >>> from deepseek_jax.comm import int_all_reduce
  >>> mesh = jax.make_mesh((8,), ("data",))
  >>> tx = int_all_reduce("data")
  >>> state = init(tx, {"kernel": jax.numpy.zeros((512, 256))}, mesh, "data")
  >>> state.errors.arrays["left"]["kernel"].worker.shape
  (8, 8, 64, 256)

  Args:
    tx: Any Optax transform, with exchanges in it.
    params: Arrays; under `jax.eval_shape` their shapes.
    mesh: The mesh.
    axis_name: As given to the exchange.
    specs: Of the parameters, as for `jax.shard_map`; whole when None.

  Returns:
    The state; arrays that are one device's own, there.
  """
  specs = PartitionSpec() if specs is None else specs
  apply = lambda out_specs: jax.shard_map(
    tx.init, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False
  )
  shapes = jax.eval_shape(apply(PartitionSpec()), params)
  return jax.jit(apply(state_specs(shapes, axis_name)))(params)


def find(state: PyTree, kind: type) -> list[Any]:
  """Returns the nodes of a type in a state."""
  is_kind = lambda x: isinstance(x, kind)
  return [x for x in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(x)]
