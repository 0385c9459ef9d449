"""Many steps of each worker for itself, and then one of all together."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from deepseek_jax.comm import workers as workers_lib
from deepseek_jax.comm.axes import Axes, AxisName
from deepseek_jax.comm.plain import float_all_reduce, sum_sent
from deepseek_jax.comm.state import PerDevice
from deepseek_jax.core.arguments import require_static
from deepseek_jax.core.tree import leaf_paths
from deepseek_jax.core.typing import Count, PyTree


class DilocoState(NamedTuple):
  """State of `diloco`."""

  count: Count  # shape=(), dtype=int32: steps done
  workers: PerDevice  # `Workers`: parameters and inner optimizer of each device
  outgoing: PerDevice | None  # what is on its way, if exchanges overlap
  outer: tuple[optax.OptState, ...]  # one a fragment; equal on all devices
  exchange: tuple[optax.OptState, ...]  # likewise
  sent_bytes: Float32[Array, ""]  # by a device, in the latest step


def diloco(
  inner: optax.GradientTransformation,
  axis_name: AxisName,
  *,
  outer: optax.GradientTransformation | None = None,
  period: int = 10,
  compression: optax.GradientTransformation | None = None,
  fragments: int = 1,
  overlap: bool = False,
  local_steps: Sequence[int] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Lets every worker take `period` steps before the workers meet.

  Each device steps from the common parameters with an optimizer of its own.
  After `period` steps the mean way that they went is the gradient of an outer
  optimizer, whose step gives the new common parameters, from which all go on:

      θ_w ← θ_w + inner(∇loss(θ_w))      every step, on each worker w
      θ ← θ + outer(mean_w(θ - θ_w)), θ_w ← θ      every `period` steps

  What goes over the wire is that mean: `period` times less than every step.

  `params` and the updates are those of θ, equal on all devices; updates are
  zero between meetings. The gradient is that of a worker's own parameters, a
  part of the state:

      @partial(jax.shard_map, mesh=mesh, in_specs=(P(), specs, P("data")),
               out_specs=(P(), specs), check_vma=False)
      def step(params, opt_state, batch):
        local = comm.local_params(opt_state, params)
        grads = jax.grad(loss)(local, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

  with `opt_state = comm.init(tx, params, mesh, "data")` and its `state_specs`.

  Args:
    inner: The optimizer of a worker, such as `optax.adamw`; not an exchange.
    axis_name: The mesh axis, or axes, over which workers lie.
    outer: The optimizer of the meetings; `optax.sgd(0.7, momentum=0.9,
      nesterov=True)` when None.
    period: Steps between meetings, at least 1.
    compression: How the mean is taken, such as `int_all_reduce`, with its error
      feedback; in float32 when None.
    fragments: Into how many parts parameters are cut, of about equal size, that
      meet at different steps, from 1 to `period`: the wire is busy more evenly.
    overlap: Whether a meeting takes a step longer: the exchange depends on
      nothing of that step, and may run beside its forward and backward pass.
      What workers do meanwhile is kept.
    local_steps: For each worker how many steps of a period it works, from 1 to
      `period`; then it waits. For workers of unequal speed. None: all of them.

  Returns:
    An `optax.GradientTransformationExtraArgs`; extra arguments reach `inner`.

  Raises:
    ValueError: If an argument is out of its range; at `init` and `update`,
      outside of a `shard_map` with these axes, or if `local_steps` has not one
      number for each worker.

  References:
    Douillard et al., "DiLoCo: Distributed Low-Communication Training of
    Language Models", 2023, https://arxiv.org/abs/2311.08105
    Douillard et al., "Streaming DiLoCo with overlapping communication", 2025,
    https://arxiv.org/abs/2501.18512 (fragments, and overlap; there local and
    common parameters are mixed, here the way since is kept)
  """
  require_static(1, period=period, fragments=fragments)
  if fragments > period:
    raise ValueError(
      f"fragments must be at most period, got {fragments=} for {period=}."
    )
  _check_steps(local_steps, period)
  job = _Diloco(
    axes=Axes.of(axis_name),
    inner=optax.with_extra_args_support(inner),
    outer=optax.with_extra_args_support(
      optax.sgd(0.7, momentum=0.9, nesterov=True) if outer is None else outer
    ),
    compression=optax.with_extra_args_support(
      float_all_reduce(axis_name) if compression is None else compression
    ),
    period=period,
    fragments=fragments,
    overlap=overlap,
    local_steps=local_steps,
  )
  return optax.GradientTransformationExtraArgs(job.init, job.update)


class _Met(NamedTuple):
  """What a meeting changes of a fragment."""

  change: list[Array]  # of the common parameters
  local: list[Array]  # parameters of this worker
  outer: optax.OptState
  exchange: optax.OptState
  sent_bytes: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Diloco:
  """The transform; its attributes are the arguments of `diloco`."""

  axes: Axes
  inner: optax.GradientTransformationExtraArgs
  outer: optax.GradientTransformationExtraArgs
  compression: optax.GradientTransformationExtraArgs
  period: int
  fragments: int
  overlap: bool
  local_steps: Sequence[int] | None

  def init(self, params: PyTree) -> Any:
    """Returns workers that stand where `params` are."""
    _check_workers(self.local_steps, self.axes)
    pieces = [_take(params, ids) for ids in cut(params, self.fragments)]
    start = workers_lib.start(self.inner, params)
    still = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), params)
    return DilocoState(
      count=jnp.zeros((), jnp.int32),
      workers=PerDevice(start),
      outgoing=PerDevice((still, start.params)) if self.overlap else None,
      outer=tuple(self.outer.init(piece) for piece in pieces),
      exchange=tuple(self.compression.init(piece) for piece in pieces),
      sent_bytes=jnp.zeros((), jnp.float32),
    )

  def update(
    self, updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, Any]:
    """Takes a step of this worker, and of all when they meet."""
    if params is None:
      raise ValueError("params must be given: where workers started from.")
    worker = workers_lib.step(
      self.inner, state.workers.arrays, updates, self._works(state.count),
      extra_args,
    )  # fmt: skip
    local = workers_lib.single(worker.params)
    if self.overlap:
      way, since = workers_lib.single(state.outgoing.arrays)
    else:
      way, since = jax.tree.map(jnp.subtract, params, local), local
    change = jax.tree.leaves(jax.tree.map(jnp.zeros_like, params))
    own, structure = jax.tree.flatten(local)
    results = []
    for fragment, ids in enumerate(cut(params, self.fragments)):
      met = self._meet(fragment, ids, params, way, since, own, state)
      results.append(met)
      for i, one, other in zip(ids, met.change, met.local, strict=True):
        change[i], own[i] = one, other
    change, local = structure.unflatten(change), structure.unflatten(own)
    outgoing = None
    if self.overlap:
      # From the common parameters as they will be.
      after = jax.tree.map(jnp.add, params, change)
      way = jax.tree.map(jnp.subtract, after, local)
      outgoing = PerDevice(workers_lib.stacked((way, local)))
    return change, DilocoState(
      count=jnp.asarray(optax.safe_increment(state.count)),
      workers=PerDevice(worker._replace(params=workers_lib.stacked(local))),
      outgoing=outgoing,
      outer=tuple(met.outer for met in results),
      exchange=tuple(met.exchange for met in results),
      sent_bytes=jnp.sum(jnp.stack([met.sent_bytes for met in results])),
    )

  def _meet(
    self,
    fragment: int,
    ids: Sequence[int],
    params: PyTree,
    way: PyTree,
    since: PyTree,
    own: Sequence[Array],
    state: DilocoState,
  ) -> _Met:
    """Returns what becomes of a fragment, be this its step to meet or not."""
    piece, way, since = (_take(tree, ids) for tree in (params, way, since))
    outer, exchange = state.outer[fragment], state.exchange[fragment]

    def meet(local: list[Array]) -> _Met:
      mean_way, exchanged = self.compression.update(way, exchange, piece)
      changes, moved = self.outer.update(mean_way, outer, piece)
      change = [jnp.asarray(x) for x in jax.tree.leaves(changes)]
      goes_on = [
        begun + moved_by + (now - then)
        for begun, moved_by, now, then in zip(
          jax.tree.leaves(piece),
          change,
          local,
          jax.tree.leaves(since),
          strict=True,
        )
      ]
      return _Met(change, goes_on, moved, exchanged, sum_sent(exchanged))

    def wait(local: list[Array]) -> _Met:
      still = [jnp.zeros_like(x) for x in jax.tree.leaves(piece)]
      return _Met(still, local, outer, exchange, jnp.zeros((), jnp.float32))

    local = [own[i] for i in ids]
    return jax.lax.cond(self._meets(fragment, state.count), meet, wait, local)

  def _meets(self, fragment: int, count: Array) -> Array:
    """Returns whether a fragment meets at the end of this step."""
    # The first one ends the period; the others come before it.
    early = fragment * self.period // self.fragments
    place = self.period - 1 - early + self.overlap
    return (count >= place) & ((count - place) % self.period == 0)

  def _works(self, count: Array) -> Array | bool:
    """Returns whether this worker takes the step."""
    if self.local_steps is None:
      return True
    steps = jnp.asarray(self.local_steps)
    mine = steps[self.axes.index]
    return count % self.period < mine


def cut(params: PyTree, fragments: int) -> list[list[int]]:
  """Returns the leaves of each fragment, of about as many elements each.

  Neighbours stay together, as layers come one after the other.

  >>> cut([jnp.ones(3), jnp.ones(1), jnp.ones(4)], 2)
  [[0, 1], [2]]

  Raises:
    ValueError: If there are fewer leaves than fragments.
  """
  sizes = [x.size for x in jax.tree.leaves(params)]
  if fragments > len(sizes):
    raise ValueError(
      "fragments must be at most the parameters' arrays, got "
      f"{fragments=} for {len(sizes)}."
    )
  groups: list[list[int]] = []
  left, total = list(range(len(sizes))), sum(sizes)
  for f in range(fragments, 0, -1):
    wanted, taken = total / f, 0
    group: list[int] = []
    while left and len(left) > f - 1:
      size = sizes[left[0]]
      if group and taken + size / 2 > wanted and f > 1:
        break
      group.append(left.pop(0))
      taken += size
    groups.append(group)
    total -= taken
  return groups


def _take(tree: PyTree, ids: Sequence[int]) -> dict[str, Array]:
  """Returns leaves by their path, of which exemptions are told."""
  leaves, paths = jax.tree.leaves(tree), leaf_paths(tree)
  return collections.OrderedDict((paths[i], leaves[i]) for i in ids)


def _check_steps(local_steps: Sequence[int] | None, period: int) -> None:
  for i, number in enumerate(local_steps or ()):
    require_static(1, **{f"local_steps[{i}]": number})
    if number > period:
      raise ValueError(
        f"local_steps must be at most period, got {number} for {period=}."
      )


def _check_workers(local_steps: Sequence[int] | None, axes: Axes) -> None:
  count = axes.devices
  if local_steps is not None and len(local_steps) != count:
    raise ValueError(
      f"local_steps must have one number for each of {count} workers, got "
      f"{len(local_steps)}."
    )
