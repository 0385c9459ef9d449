"""A step of which every device computes its own part, up to an exchange.

Inside `jax.shard_map` over the axes of an exchange, each device has its own
rows, and a gradient of its own. Over the other axes of the mesh XLA decides, as
ever.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from deepseek_jax import comm, parallel
from deepseek_jax.core import leaf_paths, map_with_paths
from deepseek_jax.train import metrics as metrics_lib
from deepseek_jax.train.exchange import Exchange
from deepseek_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Replicas:
  """The devices of a mesh that exchange gradients.

  Attributes:
    exchange: What was asked for.
    mesh: With all axes.
    specs: Of the parameters.
  """

  exchange: Exchange
  mesh: Mesh
  specs: Any

  @property
  def names(self) -> tuple[str, ...]:
    """Axes that are exchanged over."""
    return self.exchange.names(self.mesh)

  @property
  def free(self) -> tuple[str, ...]:
    """The other axes of more than one device."""
    sizes = self.mesh.shape
    return tuple(x for x in sizes if x not in self.names and sizes[x] > 1)

  @property
  def taken(self) -> set[str]:
    """Axes that the step takes from XLA; all, where it has nothing to do."""
    return set(self.names) if self.free else set(self.mesh.axis_names)

  def transform(
    self, tx: optax.GradientTransformation
  ) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer with the exchange.

    Its `init` is for the whole mesh, its `update` for use inside the step.
    """
    built = self.exchange.build(tx, self.names, self._within)

    def init(params):
      shapes = jax.eval_shape(self._map(built.init, PartitionSpec()), params)
      return self._map(built.init, self.state_specs(shapes))(params)

    update = optax.with_extra_args_support(built).update
    return optax.GradientTransformationExtraArgs(init, update)

  def state_specs(self, opt_state: Any) -> Any:
    """Returns how a state lies over the axes of the exchange alone."""
    return comm.state_specs(opt_state, self.names)

  def shardings(self, opt_state: Any, params: Any) -> Any:
    """Returns how a state lies over the whole mesh.

    Args:
      opt_state: Shapes.
      params: Shapes of the parameters.
    """
    own = jax.tree.map(
      lambda node: jax.tree.map(lambda _: _is_own(node), node),
      opt_state,
      is_leaf=_is_own,
    )
    single = jax.tree.map(
      lambda x, is_own: jax.ShapeDtypeStruct(x.shape[is_own:], x.dtype),
      opt_state,
      own,
    )
    specs = parallel.state_specs(single, params, self.specs, self.mesh)

    def place(x, is_own, spec):
      if is_own and x.shape[0] == self.count:
        spec = PartitionSpec(self.names, *spec)
      elif is_own:
        spec = PartitionSpec((*self.names, *self.free))
      return NamedSharding(self.mesh, spec)

    return jax.tree.map(place, opt_state, own, specs)

  def step(
    self, local_step: Callable[[TrainState, Any], TrainState]
  ) -> Callable[[TrainState, Any], TrainState]:
    """Returns the step of the whole mesh, from that of one device."""

    def step(state: TrainState, batch: Any) -> TrainState:
      whole = jax.tree.map(lambda _: PartitionSpec(), state)
      specs = whole._replace(opt_state=self.state_specs(state.opt_state))
      return jax.shard_map(
        local_step,
        mesh=self.mesh.abstract_mesh,
        in_specs=(specs, PartitionSpec(self.names)),
        out_specs=specs,
        axis_names=self.taken,
        check_vma=False,
      )(state, batch)

    return step

  def mean(self, x: Array) -> Array:
    """Returns the mean over the devices that exchange."""
    return jax.lax.pmean(x, self.names)

  def total(self, x: Array) -> Array:
    """Returns the sum over them."""
    return jax.lax.psum(x, self.names)

  @property
  def count(self) -> int:
    """How many they are."""
    return math.prod(self.mesh.shape[name] for name in self.names)

  def own_streams(self, rest: Any) -> Any:
    """Returns the model's other state with random streams of this device."""
    index = jax.lax.axis_index(self.names)
    fold = lambda x: jax.random.fold_in(x, index) if _is_key(x) else x
    return jax.tree.map(fold, rest)

  def joined(self, before: Any, after: Any) -> Any:
    """Returns the model's other state, the same on all devices.

    Running statistics are averaged; what is counted is the same everywhere.
    """

    def join(old, new):
      if _is_key(old):
        return old
      if jnp.issubdtype(new.dtype, jnp.floating):
        return self.mean(new)
      return jax.lax.pmax(new, self.names) if new.dtype != bool else new

    return jax.tree.map(join, before, after)

  def metrics(self, found: metrics_lib.Metrics) -> metrics_lib.Metrics:
    """Returns the metrics of the rows of all devices."""
    return jax.tree.map(self.total, found)

  @functools.cached_property
  def report(self) -> Callable[[Any], dict[str, Array]]:
    """From a state to the bytes a device sends a step, and what was lost."""
    return jax.jit(self._report)

  def _report(self, opt_state: Any) -> dict[str, Array]:
    kinds = comm.ExchangeState | comm.PlainState
    is_one = lambda x: isinstance(x, kinds)
    nodes = jax.tree.leaves(opt_state, is_leaf=is_one)
    nodes = [x for x in nodes if is_one(x)]
    sent = jnp.sum(jnp.stack([x.sent_bytes for x in nodes]))
    errors = [
      x.relative_error for x in nodes if isinstance(x, comm.ExchangeState)
    ]
    found = {"exchange/sent_bytes": sent / self.exchange.period}
    if errors:
      found["exchange/relative_error"] = jnp.max(jnp.stack(errors))
    return found

  def _map(self, function: Callable, out_specs: Any) -> Callable:
    return jax.shard_map(
      function,
      mesh=self.mesh.abstract_mesh,
      in_specs=(PartitionSpec(),),
      out_specs=out_specs,
      axis_names=self.taken,
      check_vma=False,
    )

  def _within(
    self, tx: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """Returns a transform that works on this device's parts of arrays.

    Each device along the other axes exchanges its part with its like.
    """
    if not self.free:
      return tx
    tx = optax.with_extra_args_support(tx)
    specs = jax.tree.map(self._of_free, self.specs, is_leaf=_is_spec)
    own = lambda state: comm.state_specs(state, self.free)
    mapped = functools.partial(
      jax.shard_map, axis_names=set(self.free), check_vma=False
    )

    def init(params):
      part = _like(specs, params)
      shapes = jax.eval_shape(
        mapped(tx.init, in_specs=(part,), out_specs=PartitionSpec()), params
      )
      return mapped(tx.init, in_specs=(part,), out_specs=own(shapes))(params)

    def update(updates, state, params=None, **extra_args):
      del extra_args
      part, kept = _like(specs, params), own(state)

      def of_parts(*args):
        updates, state = tx.update(*args)
        return updates, _with_worst_error(state, self.free)

      return mapped(
        of_parts,
        in_specs=(part, kept, part),
        out_specs=(part, kept),
      )(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)

  def _of_free(self, spec: PartitionSpec) -> PartitionSpec:
    """Returns what a spec says of the other axes."""
    split = [(x,) if isinstance(x, str) else x or () for x in spec]
    kept = [tuple(x for x in names if x in self.free) for names in split]
    return PartitionSpec(*(names or None for names in kept))


def own_paths(tree: Any) -> set[str]:
  """Returns the paths of what every device keeps for itself."""
  flags = jax.tree.map(
    lambda node: jax.tree.map(lambda _: _is_own(node), node),
    tree,
    is_leaf=_is_own,
  )
  found = zip(leaf_paths(flags), jax.tree.leaves(flags), strict=True)
  return {path for path, is_own in found if is_own}


def replicated(sharding: Any) -> Any:
  """Returns the sharding on the same devices of what is whole on each."""
  if isinstance(sharding, NamedSharding):
    return NamedSharding(sharding.mesh, PartitionSpec())
  return sharding


def _with_worst_error(state: Any, names: tuple[str, ...]) -> Any:
  """Returns a state whose error is the largest of all parts of parameters."""
  is_one = lambda x: isinstance(x, comm.ExchangeState)
  worst = lambda x: x._replace(
    relative_error=jax.lax.pmax(x.relative_error, names)
  )
  return jax.tree.map(
    lambda x: worst(x) if is_one(x) else x, state, is_leaf=is_one
  )


def _like(specs: Any, params: Any) -> Any:
  """Returns the specs of what may be some of the parameters, by path."""
  known = dict(
    zip(
      leaf_paths(specs, is_leaf=_is_spec),
      jax.tree.leaves(specs, is_leaf=_is_spec),
      strict=True,
    )
  )
  return map_with_paths(lambda path, _: known[path], params)


def _is_spec(x: Any) -> bool:
  return isinstance(x, PartitionSpec)


def _is_key(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_own(x: Any) -> bool:
  return isinstance(x, comm.PerDevice)
