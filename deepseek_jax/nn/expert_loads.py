"""How equally busy the experts of a model are."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from deepseek_jax.nn.annealing import TrainingCalls

_MEMORY = 0.01  # Share of the newest call in running means, once warm.


class ExpertLoad(nnx.Variable):
  """Running mean of what experts get, 1 being their mean; float32, [E]."""


class BusiestLoad(nnx.Variable):
  """Running mean of what a batch's busiest expert gets; float32, []."""


class DroppedShare(nnx.Variable):
  """Running share of choices that found no room; float32, []."""


class ExpertLoads(NamedTuple):
  """What is read of one mixture of experts; NaN before the first call.

  Attributes:
    busiest: what the busiest expert of a batch gets, as a multiple of the mean.
    experts: what each expert gets in the long run, likewise.
    dropped: share of the choices that found no room.
  """

  busiest: float
  experts: tuple[float, ...]
  dropped: float


class LoadReading(nnx.Module):
  """Running means over about the last hundred calls in training mode.

  Args:
    num_experts: E.
  """

  def __init__(self, num_experts: int):
    self.calls = TrainingCalls(jnp.zeros((), jnp.int32))
    self.load = ExpertLoad(jnp.zeros(num_experts, jnp.float32))
    self.busiest = BusiestLoad(jnp.zeros((), jnp.float32))
    self.dropped = DroppedShare(jnp.zeros((), jnp.float32))

  def take(self, counts: Int32[Array, " E"], dropped: Int32[Array, ""]) -> None:
    """Takes note of one call.

    Args:
      counts: choices by expert, of the whole batch.
      dropped: choices that found no room.
    """
    most = jnp.iinfo(jnp.int32).max
    self.calls[...] = jnp.minimum(self.calls[...], most - 1) + 1
    pace = jnp.maximum(_MEMORY, 1 / self.calls[...].astype(jnp.float32))
    total = counts.sum().astype(jnp.float32)
    load = counts.size * counts.astype(jnp.float32) / total
    for variable, now in (
      (self.load, load),
      (self.busiest, load.max()),
      (self.dropped, dropped.astype(jnp.float32) / total),
    ):
      variable[...] += pace * (now - variable[...])

  def read(self, layer: tuple[int, ...] = ()) -> ExpertLoads:
    """Returns what was read, of one layer where this holds several."""
    variables = (self.busiest, self.load, self.dropped)
    busiest, load, dropped = (np.asarray(x[...])[layer] for x in variables)
    if not self.calls[...][layer]:
      busiest, load, dropped = (x * np.nan for x in (busiest, load, dropped))
    return ExpertLoads(float(busiest), tuple(load.tolist()), float(dropped))


def expert_loads(model: nnx.Module) -> dict[str, ExpertLoads]:
  """Returns how busy experts were, in every mixture of a model.

  Of about the last hundred calls in training mode.

  >>> layer = LoadReading(2)
  >>> layer.take(jnp.array([3, 1]), jnp.array(1))
  >>> expert_loads(nnx.List([layer]))
  {'0': ExpertLoads(busiest=1.5, experts=(1.5, 0.5), dropped=0.25)}

  Args:
    model: any module.

  Returns:
    The path of each mixture, such as "layers/layers/0/feed_forward", to what
    was read; layers that are stacked for a scan each by themselves, as
    "layers/layers/0/feed_forward[3]".
  """
  found: dict[str, ExpertLoads] = {}
  for path, layer in nnx.iter_graph(model):
    if not isinstance(layer, LoadReading):
      continue
    owner = path[:-1] if path[-1:] == ("reading",) else path
    name = "/".join(map(str, owner))
    for place in np.ndindex(layer.calls[...].shape):
      mark = "".join(f"[{i}]" for i in place)
      found[name + mark] = layer.read(place)
  return found
