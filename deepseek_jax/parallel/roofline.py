"""How fast a step could be: what its products, memory and network take.

Two bounds. With everything overlapped, a step takes as long as the slowest of
its products, its memory and all of its collectives together. With nothing
overlapped, instructions run in turn, each as long as the slower of its products
and its memory, and the collectives come on top. No device reaches its peak, so
that even the second is seldom met; what it is good for is to compare, and to
say what limits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.parallel import hlo, hlo_cost, wire
from deepseek_jax.parallel.mesh import MeshSpec
from deepseek_jax.parallel.network import Network
from deepseek_jax.parallel.topology import Topology


@dataclasses.dataclass(frozen=True)
class Transfer:
  """One kind of collective along some axes.

  Attributes:
    kind: such as "all-gather".
    place: axes of the mesh, such as "data+fsdp".
    calls: how often it starts.
    sent: bytes that a device sends.
    seconds: what they take.
  """

  kind: str
  place: str
  calls: int
  sent: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Roofline:
  """What limits a step, in seconds; all per device.

  Attributes:
    products: of matrices, at the peak.
    memory: bytes, at the bandwidth of the large memory.
    in_turn: instructions one by one, each its slower half.
    collectives: by kind and axes, the slowest first.
    network: all collectives together; opposite permutations at once.
    flops: of products, as counted.
    bytes: of memory, as counted.
    model_flops: of the products that the model asks for, None if not told.
    peak: floating point operations a second.
    unknown: kernels whose products nobody told: they count as none.
    open_loops: loops that depend on data: they count as one trip.
  """

  products: float
  memory: float
  in_turn: float
  collectives: tuple[Transfer, ...]
  network: float
  flops: float
  bytes: float
  model_flops: float | None
  peak: float
  unknown: tuple[str, ...] = ()
  open_loops: tuple[str, ...] = ()

  @property
  def overlapped(self) -> float:
    """Seconds of a step that does everything at once."""
    return max(self.products, self.memory, self.network)

  @property
  def apart(self) -> float:
    """Seconds of a step that does one thing at a time."""
    return self.in_turn + self.network

  @property
  def limit(self) -> str:
    """Which of its three parts takes longest."""
    parts = {
      "products": self.products,
      "memory": self.memory,
      "network": self.network,
    }
    return max(parts, key=lambda name: parts[name])

  def utilization(self, *, overlapped: bool) -> float | None:
    """Returns the model's share of the peak (MFU), None if it is not told.

    Args:
      overlapped: whether everything overlaps; nothing does if False.
    """
    if self.model_flops is None:
      return None
    seconds = self.overlapped if overlapped else self.apart
    return self.model_flops / (self.peak * seconds)


def roofline(
  compiled: Any,
  topology: Topology,
  spec: MeshSpec,
  *,
  model_flops: int | float | None = None,
) -> Roofline:
  """Returns how fast a compiled step could be on these chips.

  Args:
    compiled: what `jax.jit(f).lower(...).compile()` gives, its text, or a
      program of `hlo.parse`.
    topology: the chips; as many as it was compiled for.
    spec: the mesh it was compiled for.
    model_flops: of the products of one step that the model asks for, of all
      devices; what is recomputed or masked is not among them.

  Raises:
    ValueError: if the program, the chips and the mesh do not fit.
  """
  is_program = isinstance(compiled, hlo.Program)
  program = compiled if is_program else hlo.parse(compiled)
  network = Network(topology, spec)
  sent = wire.traffic(program, network.mesh)
  done = hlo_cost.work(program)
  chip, cores = topology.chip, topology.chip.cores
  peak, bandwidth = chip.flops / cores, chip.hbm_bandwidth / cores
  share = None if model_flops is None else model_flops / topology.num_devices
  return Roofline(
    products=done.total_flops / peak,
    memory=done.total_bytes / bandwidth,
    in_turn=done.seconds(peak, bandwidth),
    collectives=_transfers(sent, network),
    network=_network_seconds(sent, network),
    flops=done.total_flops,
    bytes=done.total_bytes,
    model_flops=share,
    peak=peak,
    unknown=done.unknown,
    open_loops=done.open_loops,
  )


def _transfers(traffic: wire.Traffic, network: Network) -> tuple[Transfer, ...]:
  found: dict[tuple[str, str], Transfer] = {}
  for one, sent in traffic.sent.items():
    key = one.kind, one.place
    calls, seconds = traffic.calls[one], network.seconds(one, sent)
    if key in found:
      old = found[key]
      calls, sent = calls + old.calls, sent + old.sent
      seconds += old.seconds
    found[key] = Transfer(*key, calls, sent, seconds)
  return tuple(sorted(found.values(), key=lambda x: -x.seconds))


def _network_seconds(traffic: wire.Traffic, network: Network) -> float:
  """Returns the time of all collectives, one after the other.

  But for permutations there and back: each has links of its own.
  """
  total, ways = 0.0, dict.fromkeys((False, True), 0.0)
  for one, sent in traffic.sent.items():
    seconds = network.seconds(one, sent)
    if one.shift:
      ways[one.shift < 0] += seconds
    else:
      total += seconds
  return total + max(ways.values())


def efficiency(
  seconds: Mapping[int, int | float], work: Mapping[int, int | float]
) -> dict[int, float]:
  """Returns for numbers of devices the speed of one, against the fewest.

  >>> efficiency({8: 1.0, 64: 1.25}, {8: 1.0, 64: 1.0})
  {8: 1.0, 64: 0.8}

  Args:
    seconds: of a step, by number of devices.
    work: of one device in a step, in any unit, by number of devices.
  """
  speed = {n: work[n] / seconds[n] for n in seconds}
  first = speed[min(speed)]
  return {n: one / first for n, one in speed.items()}
