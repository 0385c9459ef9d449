"""What travels between devices that hold parts of one sequence.

The parts are consecutive and equal. A device sees more than its own: blocks
that it asked others for, and the halo, the neighbours' blocks that windows
reach into. All of it is one short sequence,

    [fetched | halo before | own | halo after]

in which the fetched blocks lie before the own ones and in no window of theirs.

Shape letters: S devices, L blocks in a part, P heads (batch · key-value heads),
C blocks that a device may ask another for, J keys in a block, R choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from deepseek_jax.kernels.block_sparse_attention.problem import Layout


class Parts(NamedTuple):
  """How a sequence is cut over the devices along an axis of the mesh.

  Attributes:
    axis_name: of the axis.
    devices: S, along it.
    blocks: L, in a part.
    capacity: C, blocks that a device may ask another for.
    layout: of windows and blocks.
  """

  axis_name: str
  devices: int
  blocks: int
  capacity: int
  layout: Layout

  @property
  def me(self) -> Int[Array, ""]:
    """The number of this device."""
    return jax.lax.axis_index(self.axis_name)

  @property
  def total(self) -> int:
    """Blocks in the whole sequence."""
    return self.devices * self.blocks

  @property
  def slots(self) -> int:
    """Blocks that a device fetches at most, from all others."""
    return (self.devices - 1) * self.capacity

  @property
  def around(self) -> tuple[int, int]:
    """Blocks that a device sees before its own, and after them."""
    return self.slots + self.layout.reach, self.layout.ahead

  @property
  def seen(self) -> int:
    """Blocks that a device sees."""
    return sum(self.around) + self.blocks


class Requests(NamedTuple):
  """What a device asks for, and where it will lie.

  Attributes:
    wanted: blocks asked of every device, by their number there; L for none.
    place: of every block of the sequence in what the device sees; -1 for none.
  """

  wanted: Int[Array, "S P C"]
  place: Int[Array, "P blocks"]

  def places(self, ids: Int[Array, "P T R"]) -> Int[Array, "P T R"]:
    """Returns where chosen blocks lie; -1 for those that are not there."""
    # A negative index would count from the end.
    ids = jnp.where(ids < 0, self.place.shape[1], ids)
    find = lambda place, ids: place.at[ids].get(mode="fill", fill_value=-1)
    return jax.vmap(find)(self.place, ids)


def plan_requests(parts: Parts, ids: Int[Array, "P T R"]) -> Requests:
  """Asks every device for the blocks that most own tokens chose.

  Of two that as many chose, the earlier one is asked for.
  """
  heads = ids.shape[0]
  near = parts.around[0] + jnp.arange(parts.total) - parts.me * parts.blocks
  is_here = (near >= parts.slots) & (near < parts.seen)
  votes = jnp.where(is_here[None], 0, _count(ids, parts.total))
  votes = votes.reshape(heads, parts.devices, parts.blocks)
  order = jnp.argsort(-votes, axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)
  is_asked = (votes > 0) & (rank < parts.capacity)
  wanted = jnp.where(
    jnp.take_along_axis(is_asked, order, -1), order, parts.blocks
  )
  # The next device comes first; the own, of which nothing is asked, last.
  group = (jnp.arange(parts.devices) - parts.me - 1) % parts.devices
  far = jnp.where(is_asked, group[None, :, None] * parts.capacity + rank, -1)
  place = jnp.where(is_here[None], near[None], far.reshape(heads, -1))
  wanted = jnp.moveaxis(wanted[..., : parts.capacity], 1, 0)
  return Requests(wanted.astype(jnp.int32), place.astype(jnp.int32))


def _count(ids: Int[Array, "P T R"], blocks: int) -> Int[Array, "P blocks"]:
  """Returns how many tokens chose every block."""
  if not ids.size:
    return jnp.zeros((ids.shape[0], blocks), jnp.int32)
  ids = jnp.sort(ids.reshape(ids.shape[0], -1))
  count = lambda ids: jnp.diff(jnp.searchsorted(ids, jnp.arange(blocks + 1)))
  return jax.vmap(count)(ids)


def gather_around(
  parts: Parts, x: Shaped[Array, "P L J D"], requests: Requests
) -> Shaped[Array, "P seen J D"]:
  """Returns the own blocks among all others that the device sees.

  Blocks that nobody asked for, or beside the sequence, are 0.
  """
  seen = [*_with_halo(parts, x)]
  if parts.slots:
    swap = lambda x: jax.lax.all_to_all(x, parts.axis_name, 0, 0)
    sent = _take(x, swap(requests.wanted))
    seen.insert(0, _of_others(parts, swap(sent)))
  return jnp.concatenate(seen, axis=1)


def segments_around(
  parts: Parts, segments: Int[Array, "P time"], requests: Requests
) -> Int[Array, "P seen_time"]:
  """Returns the segments of what a device sees; -1 where nothing is.

  Args:
    parts: how the sequence is cut.
    segments: of the whole sequence.
    requests: which blocks are fetched.
  """
  layout = parts.layout
  ends = layout.reach * layout.block, layout.ahead * layout.block
  length = parts.blocks * layout.block
  here = jnp.pad(segments, ((0, 0), ends), constant_values=-1)
  here = jax.lax.dynamic_slice_in_dim(
    here, parts.me * length, length + sum(ends), axis=1
  )
  if not parts.slots:
    return here
  first = jnp.arange(parts.devices)[:, None, None] * parts.blocks
  wanted = requests.wanted
  wanted = jnp.where(wanted < parts.blocks, first + wanted, parts.total)
  blocks = segments.reshape(-1, parts.total, layout.block)
  fetched = _of_others(parts, _take(blocks, wanted, -1))
  return jnp.concatenate([fetched.reshape(len(here), -1), here], axis=1)


def _with_halo(parts: Parts, x: Shaped[Array, "P L J D"]):
  """Yields blocks of the neighbour before, the own and of that after."""
  reach, ahead = parts.layout.reach, parts.layout.ahead
  pairs = [(i, i + 1) for i in range(parts.devices - 1)]
  send = lambda x, pairs: jax.lax.ppermute(x, parts.axis_name, pairs)
  if reach:
    yield send(x[:, parts.blocks - reach :], pairs)
  yield x
  if ahead:
    yield send(x[:, :ahead], [(after, before) for before, after in pairs])


def _take(
  x: Shaped[Array, "P blocks ..."], block: Int[Array, "S P C"], fill: int = 0
) -> Shaped[Array, "S P C ..."]:
  """Returns blocks by number; `fill` for numbers beyond them."""
  take = lambda x, block: x.at[block].get(mode="fill", fill_value=fill)
  return jax.vmap(take, (0, 1), 1)(x, block)


def _of_others(
  parts: Parts, x: Shaped[Array, "S P C ..."]
) -> Shaped[Array, "P slots ..."]:
  """Lines up what came of all devices but the own, the next one first."""
  order = (parts.me + 1 + jnp.arange(parts.devices - 1)) % parts.devices
  x = jnp.moveaxis(x[order], 0, 1)
  return x.reshape(x.shape[0], parts.slots, *x.shape[3:])
