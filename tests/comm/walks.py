"""Workers that walk to targets of their own, in JAX and in NumPy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from exchanges import PLACEMENTS

from deepseek_jax import comm

P = jax.sharding.PartitionSpec
AT = PLACEMENTS["data"]
WORKERS = 4
STEPS = 12
RATE = 0.125
SHAPES = {"bias": (5,), "kernel": (6, 4)}


def targets(seed=0):
  """Where each worker is drawn to at each step, [steps, workers, ...]."""
  random = np.random.default_rng(seed)
  return {
    name: random.normal(size=(STEPS, WORKERS, *shape)).astype(np.float32)
    for name, shape in SHAPES.items()
  }


def beginning(dtype: Any = jnp.float32):
  return {name: jnp.ones(shape, dtype) for name, shape in SHAPES.items()}


@dataclasses.dataclass(frozen=True)
class Walk:
  """What came of every step; devices come after steps."""

  params: Any  # equal on all devices, before which this was made sure of
  updates: Any
  workers: Any
  sent: Any
  end: Any  # parameters and state, of all devices


@dataclasses.dataclass(frozen=True, eq=False)
class Walker:
  """A transform with workers, that goes through many steps at once."""

  tx: Any
  dtype: Any = jnp.float32

  @functools.cached_property
  def start(self):
    params = beginning(self.dtype)
    return params, comm.init(self.tx, params, AT.mesh, "data")

  @functools.cached_property
  def program(self):
    specs = comm.state_specs(self.start[1], "data")
    own = P(None, "data")

    def walk(params, state, goals):
      def step(carry, goal):
        params, state = carry
        local = comm.local_params(state, params)
        grads = jax.tree.map(
          lambda x, g: (x - g[0]).astype(x.dtype), local, goal
        )
        updates, state = self.tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen = params, updates, comm.local_params(state, params)
        sent = state.sent_bytes
        return (params, state), (jax.tree.map(lambda x: x[None], seen), sent)

      return jax.lax.scan(step, (params, state), goals)

    return jax.jit(
      jax.shard_map(
        walk,
        mesh=AT.mesh,
        in_specs=(P(), specs, own),
        out_specs=((P(), specs), ((own, own, own), P())),
        check_vma=False,
      )
    )

  def __call__(self, goals, start=None):
    start = self.start if start is None else start
    end, (seen, sent) = jax.block_until_ready(self.program(*start, goals))
    params, updates, workers = jax.tree.map(np.asarray, seen)
    for leaf in jax.tree.leaves((params, updates)):
      assert (leaf == leaf[:, :1]).all(), "All devices must agree."
    one = lambda tree: {name: x[:, 0] for name, x in tree.items()}
    return Walk(one(params), one(updates), workers, np.asarray(sent), end)


def assert_same_walk(a, b, **tolerance):
  tolerance = {"rtol": 0, "atol": 2e-6} | tolerance
  for name in SHAPES:
    np.testing.assert_allclose(a.params[name], b.params[name], **tolerance)
    np.testing.assert_allclose(a.workers[name], b.workers[name], **tolerance)


def saved(end):
  """Parameters and state as they come from a file."""
  params, state = jax.tree.map(np.array, end)
  place = lambda x, spec: jax.device_put(x, jax.NamedSharding(AT.mesh, spec))
  return params, jax.tree.map(place, state, comm.state_specs(state, "data"))
