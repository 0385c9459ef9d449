"""Exchanges on meshes: what the tests of this room run and look at.

Devices come first in the arrays of gradients, updates and errors, in the order
of the mesh: what one device alone has or gets is at its place.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from deepseek_jax import comm
from deepseek_jax.comm.delayed import DelayedState

P = jax.sharding.PartitionSpec
STEPS = 4  # in one run
SHAPES = {
  "bias": (8,),
  "first": (12, 8),
  "second": (2, 6, 8),
  "small": (2, 3),
  "whole": (5, 7),
}
# As matrices, two are of one shape.
CUTS = {"bias": 0, "first": 0, "second": 2}
SMALL = {"min_size": 16}


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh, the axes of the exchange, and whether parameters are cut."""

  shape: tuple[int, ...]
  names: tuple[str, ...]
  axis_name: str | tuple[str, ...]
  cut: bool = False

  @property
  def axes(self):
    own = self.axis_name
    return (own,) if isinstance(own, str) else own

  @functools.cached_property
  def mesh(self):
    count = int(np.prod(self.shape))
    kinds = (AxisType.Auto,) * len(self.shape)
    devices = jax.devices()[:count]
    return jax.make_mesh(self.shape, self.names, kinds, devices=devices)

  @property
  def sizes(self):
    return dict(zip(self.names, self.shape, strict=True))

  @property
  def devices(self):
    return int(np.prod([self.sizes[name] for name in self.axes]))

  @property
  def parts(self):
    return self.sizes["fsdp"] if self.cut else 1

  @property
  def specs(self):
    if not self.cut:
      return None
    cut_along = lambda dim: P(*(None,) * dim, "fsdp")
    return {x: cut_along(CUTS[x]) if x in CUTS else P() for x in SHAPES}

  def part_shape(self, name):
    shape = list(SHAPES[name])
    if self.cut and name in CUTS:
      shape[CUTS[name]] //= self.parts
    return tuple(shape)

  def whole(self, name, by_device):
    """The array that parts make; the replicas of each have to be equal."""
    if not (self.cut and name in CUTS):
      return the_same(by_device)
    sizes = [self.sizes[axis] for axis in self.axes]
    by_axis = by_device.reshape(*sizes, *by_device.shape[1:])
    by_part = np.moveaxis(by_axis, self.axes.index("fsdp"), 0)
    by_part = by_part.reshape(self.parts, -1, *by_device.shape[1:])
    return np.concatenate([the_same(x) for x in by_part], CUTS[name])


PLACEMENTS = {
  "data": Placement((4,), ("data",), "data"),
  "fsdp": Placement((4,), ("fsdp",), "fsdp", cut=True),
  "both": Placement((2, 2), ("data", "fsdp"), ("data", "fsdp"), cut=True),
  "replica": Placement((2, 2), ("replica", "fsdp"), "replica"),
}


def the_same(replicas):
  """One of the replicas, all of which are equal bit for bit."""
  replicas = np.asarray(replicas)
  for other in replicas[1:]:
    np.testing.assert_array_equal(replicas[0], other)
  return replicas[0]


def params(shapes: Mapping[str, Any] = SHAPES, dtype: Any = jnp.float32):
  return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def gradients(
  devices: int,
  steps: int = STEPS,
  seed: int = 0,
  shapes: Mapping[str, Any] = SHAPES,
  dtype: Any = np.float32,
):
  """Gradients of all steps and devices, of sizes that differ by leaf."""
  random = np.random.default_rng(seed)
  return {
    name: np.asarray(
      10.0 ** (i % 3 - 1) * random.normal(size=(steps, devices, *shape)), dtype
    )
    for i, (name, shape) in enumerate(shapes.items())
  }


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A transform on a mesh, that goes through the steps of a run at once."""

  tx: Any
  placement: Placement
  params: Any

  @functools.cached_property
  def start(self):
    at = self.placement
    return comm.init(self.tx, self.params, at.mesh, at.axis_name, at.specs)

  @functools.cached_property
  def state_specs(self):
    return comm.state_specs(self.start, self.placement.axis_name)

  @functools.cached_property
  def program(self) -> Callable[..., Any]:
    """Takes [steps, devices, ...] gradients and a state; gives updates too."""
    at = self.placement
    own, specs = P(None, at.axes), P() if at.specs is None else at.specs

    def run(grads, state, params):
      def step(state, grad):
        updates, state = self.tx.update(grad, state, params)
        return state, updates

      mine = jax.tree.map(lambda x: x[:, 0], grads)
      state, updates = jax.lax.scan(step, state, mine)
      return jax.tree.map(lambda x: x[:, None], updates), state

    return jax.jit(
      jax.shard_map(
        run,
        mesh=at.mesh,
        in_specs=(own, self.state_specs, specs),
        out_specs=(own, self.state_specs),
        axis_names=set(at.axes),
        check_vma=False,
      )
    )

  def __call__(self, grads, state=None):
    state = self.start if state is None else state
    return jax.block_until_ready(self.program(grads, state, self.params))

  def restore(self, saved):
    """Puts arrays of NumPy back to where the state lies."""
    place = lambda x, spec: jax.device_put(
      x, NamedSharding(self.placement.mesh, spec)
    )
    return jax.tree.map(place, saved, self.state_specs)


def exchange(method, at):
  """One of the exchanges of the table."""
  cut = {"specs": at.specs}
  arguments = SMALL | cut
  methods = {
    "bf16": lambda: comm.bf16_all_reduce(
      at.axis_name, error_feedback=True, **arguments
    ),
    "int8": lambda: comm.int_all_reduce(at.axis_name, block=16, **arguments),
    "int4": lambda: comm.int_all_reduce(
      at.axis_name, bits=4, block=16, **arguments
    ),
    "one_bit": lambda: comm.one_bit(
      at.axis_name, block=16, warmup=1, refresh=2, **arguments
    ),
    "top_k": lambda: comm.top_k(
      at.axis_name, fraction=0.25, block=16, warmup=1, **arguments
    ),
    "power_sgd": lambda: comm.power_sgd(at.axis_name, 2, **arguments),
    "delayed": lambda: comm.delayed(
      exchange("int8", at), 2, axis_name=at.axis_name, **cut
    ),
  }
  return methods[method]()


METHODS = ("bf16", "int8", "int4", "one_bit", "top_k", "power_sgd", "delayed")


@functools.cache
def prepared(method, place):
  at = PLACEMENTS[place]
  start = params()
  if place == "replica":  # The other axis is XLA's: parameters lie along it.
    spec = NamedSharding(at.mesh, P(None, "fsdp"))
    start["first"] = jax.device_put(start["first"], spec)
  return Run(exchange(method, at), at, start)


def joined(at, updates):
  """Updates of whole parameters, [steps, ...]; replicas have to agree."""
  each = lambda name, x: np.stack([at.whole(name, step) for step in x])
  return {name: each(name, np.asarray(x)) for name, x in updates.items()}


def mean(grads):
  """The mean over devices, in float64."""
  return {name: x.mean(1, dtype=np.float64) for name, x in grads.items()}


def held(at, state):
  """What the errors of all devices hold of the mean, by leaf."""
  if isinstance(state, DelayedState):
    waits = {
      name: np.asarray(x, np.float64).sum(1).mean(0)
      for name, x in state.pending.arrays.items()
    }
    inner = held(at, state.exchange)
    return {name: x + inner.get(name, 0) for name, x in waits.items()}
  own = state.errors.arrays
  if "factors" in own:
    return _unsent_matrices(own["left"])
  return {name: _unsent(at, name, x) for name, x in own["left"].items()}


def _unsent(at, name, errors):
  chunks = np.asarray(errors.worker, np.float64).mean(0)
  if errors.server is not None:
    # Of device (data, fsdp) the chunk of the part "fsdp" comes first.
    order = np.arange(at.devices).reshape([at.sizes[x] for x in at.axes])
    if at.cut:
      order = np.moveaxis(order, at.axes.index("fsdp"), 0)
    server = np.asarray(errors.server, np.float64)[order.reshape(-1), 0]
    chunks = chunks + server
  parts = at.parts if at.cut and name in CUTS else 1
  flat, shape = chunks.reshape(parts, -1), at.part_shape(name)
  size = int(np.prod(shape))
  assert not flat[:, size:].any(), "What fills chunks up stays zero."
  pieces = [x[:size].reshape(shape) for x in flat]
  return np.concatenate(pieces, CUTS[name]) if parts > 1 else pieces[0]


def _unsent_matrices(errors):
  found = {}
  for stack in errors.values():
    means = np.asarray(stack, np.float64).mean(0)
    names = [x for x in SHAPES if _matrix(x) == means.shape[1:]]
    for name, one in zip(names, means, strict=True):
      found[name] = one.reshape(SHAPES[name])
  return found


def _matrix(name):
  shape = SHAPES[name]
  return np.prod(shape[:-1], dtype=int), shape[-1]


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  same = lambda x, y: np.testing.assert_array_equal(
    np.asarray(x), np.asarray(y)
  )
  jax.tree.map(same, a, b)
