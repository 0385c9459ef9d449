"""Workers of unequal speed that meet one by one."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int32

from deepseek_jax.comm import workers as workers_lib
from deepseek_jax.comm.axes import Axes, AxisName
from deepseek_jax.comm.plain import float_all_reduce, sum_sent
from deepseek_jax.comm.state import PerDevice
from deepseek_jax.core.arguments import require_in, require_static
from deepseek_jax.core.typing import Count, PyTree


class Clock(NamedTuple):
  """What all workers have done; equal on all devices."""

  ticks: Count  # shape=(), dtype=int32: steps of the fastest worker
  steps: Int32[Array, " workers"]  # of the round a worker is in
  rounds: Int32[Array, " workers"]  # that a worker has ended
  versions: Int32[Array, " workers"]  # rounds that were in what it began from
  stalest: Int32[Array, ""]  # most rounds that a worker began and ended apart


class AsynchronousState(NamedTuple):
  """State of `asynchronous`."""

  clock: Clock
  workers: PerDevice  # `Workers`, and the parameters each began its round from
  momentum: PyTree  # float32, like the parameters; equal on all devices
  waiting: PyTree  # contributions since the momentum moved; likewise
  exchange: optax.OptState
  sent_bytes: Float32[Array, ""]  # by a device, in the latest step


def asynchronous(
  inner: optax.GradientTransformation,
  axis_name: AxisName,
  *,
  speeds: Sequence[int | float],
  period: int = 10,
  max_staleness: int = 4,
  outer_rate: int | float = 0.7,
  momentum: int | float = 0.9,
  even: bool = True,
  compression: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Lets every worker hand in its work when it is ready, without the others.

  A worker takes some steps of its own from the common parameters θ as it found
  them, hands in the way g that it went, takes θ as it is then, and goes on. N
  workers that hand in at different times move θ with a delayed momentum, as
  Nesterov's at every one of them would run away:

      θ ← θ - outer_rate·g/N                       at each contribution
      m ← momentum·m + mean of the last N contributions,
      θ ← θ - outer_rate·momentum·m                at every Nth of them

  Time is that of the fastest worker: an update is one tick, in which a worker
  of speed s takes a step with the frequency s. That makes a run a function of
  its seed, whatever the machines do, so that it can be repeated and resumed;
  on machines of one speed it is a simulation. Where no worker hands in, nothing
  is sent. It is used as `diloco` is, with `local_params`.

  Args:
    inner: The optimizer of a worker.
    axis_name: The mesh axis, or axes, over which workers lie.
    speeds: Of each worker, relative to the fastest, in (0, 1].
    period: Steps of a round of the fastest worker, at least 1.
    max_staleness: Rounds that a worker may have ended more than the slowest and
      still go on, at least 0; with more it waits. It bounds what others hand in
      while a worker waits and is at its round, to 2·(max_staleness + 1)·(N - 1)
      rounds.
    outer_rate: Above 0.
    momentum: In [0, 1).
    even: Whether slow workers take fewer steps a round, in proportion, so that
      all hand in about equally often; else all take `period`.
    compression: How the sum over workers is taken, such as `int_all_reduce`; in
      float32 when None.

  Returns:
    An `optax.GradientTransformationExtraArgs`; extra arguments reach `inner`.

  Raises:
    ValueError: If an argument is out of its range; at `init` and `update`,
      outside of a `shard_map` with these axes, or if `speeds` has not one
      number for each worker.

  References:
    Liu et al., "Asynchronous Local-SGD Training for Language Modeling", 2024,
    https://arxiv.org/abs/2401.09135 (delayed Nesterov, dynamic local updates)
    Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel
    Parameter Server", 2013 (the bound)
  """
  require_static(1, period=period)
  require_static(0, max_staleness=max_staleness)
  require_in("(0, inf)", outer_rate=outer_rate)
  require_in("[0, 1)", momentum=momentum)
  for i, speed in enumerate(speeds):
    require_in("(0, 1]", **{f"speeds[{i}]": speed})
  axes = Axes.of(axis_name)
  inner = optax.with_extra_args_support(inner)
  compression = optax.with_extra_args_support(
    float_all_reduce(axis_name) if compression is None else compression
  )
  count = len(speeds)
  rates = np.asarray(speeds, np.float32)
  rounds = [max(1, math.ceil(period * s)) if even else period for s in speeds]
  lengths = np.asarray(rounds, np.int32)

  def init_fn(params: PyTree) -> Any:
    found = axes.devices
    if found != count:
      raise ValueError(
        f"speeds must have one number for each of {found} workers, got {count}."
      )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    none = jnp.zeros(count, jnp.int32)
    start = workers_lib.start(inner, params)
    return AsynchronousState(
      clock=Clock(none[0], none, none, none, none[0]),
      workers=PerDevice((start, start.params)),
      momentum=zeros,
      waiting=zeros,
      exchange=compression.init(params),
      sent_bytes=jnp.zeros((), jnp.float32),
    )

  def update_fn(
    updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
  ) -> tuple[PyTree, Any]:
    if params is None:
      raise ValueError("params must be given: where workers start from.")
    clock, works, ready = _tick(state.clock, rates, lengths, max_staleness)
    me = axes.index
    before, begun = state.workers.arrays
    worker = workers_lib.step(inner, before, updates, works[me], extra_args)

    def meet(worker, begun):
      went = jax.tree.map(jnp.subtract, begun, worker.params)
      mine = jax.tree.map(
        lambda x: jnp.where(ready[me], x[0], 0).astype(jnp.float32), went
      )
      share, exchange = compression.update(mine, state.exchange, params)
      total = clock.rounds.sum()
      turns = total // count > (total - ready.sum()) // count
      waiting = jax.tree.map(jnp.add, state.waiting, share)
      moved = jax.tree.map(
        lambda m, d: jnp.where(turns, momentum * m + d, m),
        state.momentum, waiting,
      )  # fmt: skip
      waiting = jax.tree.map(lambda d: jnp.where(turns, 0, d), waiting)
      push = jnp.where(turns, momentum, 0.0)
      change = jax.tree.map(
        lambda g, m, p: (-outer_rate * (g + push * m)).astype(p.dtype),
        share, moved, params,
      )  # fmt: skip
      after = jax.tree.map(jnp.add, params, change)
      anew = lambda new, old: jnp.where(ready[me], new[None], old)
      local = jax.tree.map(anew, after, worker.params)
      begun = jax.tree.map(anew, after, begun)
      sent = sum_sent(exchange)
      return change, local, begun, moved, waiting, exchange, sent

    def go_on(worker, begun):
      zeros = jax.tree.map(jnp.zeros_like, params)
      rest = state.momentum, state.waiting, state.exchange, jnp.zeros(())
      return zeros, worker.params, begun, *rest

    change, local, begun, moved, waiting, exchange, sent = jax.lax.cond(
      jnp.any(ready), meet, go_on, worker, begun
    )
    return change, AsynchronousState(
      clock=clock,
      workers=PerDevice((worker._replace(params=local), begun)),
      momentum=moved,
      waiting=waiting,
      exchange=exchange,
      sent_bytes=sent,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _tick(
  clock: Clock, rates: np.ndarray, lengths: np.ndarray, bound: int
) -> tuple[Clock, Array, Array]:
  """Returns the next time, and which workers step and which hand in."""
  now = jnp.floor((clock.ticks + 1) * rates)
  can = now > jnp.floor(clock.ticks * rates)
  works = can & (clock.rounds - clock.rounds.min() <= bound)
  steps = clock.steps + works
  ready = works & (steps >= lengths)
  rounds = clock.rounds + ready
  # Those of others, handed in between its start and the moment before its end.
  apart = jnp.where(ready, clock.rounds.sum() - clock.versions, 0)
  return (
    Clock(
      ticks=jnp.asarray(optax.safe_increment(clock.ticks)),
      steps=jnp.where(ready, 0, steps),
      rounds=rounds,
      versions=jnp.where(ready, rounds.sum(), clock.versions),
      stalest=jnp.maximum(clock.stalest, apart.max()),
    ),
    works,
    ready,
  )
