"""Chips by name: what they compute, keep and send.

Numbers are per chip, as their makers or the named measurements publish them.
"""

import dataclasses

_CLOUD = "https://cloud.google.com/tpu/docs/"
_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One kind of chip.

  Attributes:
    name: such as "v5p".
    kind: what `jax.Device.device_kind` says.
    flops: of bfloat16 matrix products, a second.
    hbm: bytes of its large memory that a program may take.
    hbm_bandwidth: bytes a second to and from it.
    link: bytes a second over one link to a neighbour, in one direction.
    dims: of the torus of links.
    ring: a dimension is a ring if its size is a multiple of this; a line else.
    slow: bytes a second over the slow network: its share of what its host has.
    cores: devices that it is to JAX; they share all of the above.
    sources: where the numbers stand.
  """

  name: str
  kind: str
  flops: float
  hbm: int
  hbm_bandwidth: float
  link: float
  dims: int
  ring: int
  slow: float
  cores: int = 1
  sources: tuple[str, ...]


def _gib(count: float) -> int:
  return int(count * 2**30)


# The maker rounds a link to 50, 50, 100 and 112 GB a second; the book's numbers
# are what of it reaches a program. Of the 32, 16, 95 and 32 GB of memory, the
# compiler of libtpu 0.0.42.1 grants a program what stands here.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      kind="TPU v4",
      flops=275e12,
      hbm=2 * _gib(15.25),
      hbm_bandwidth=1.2e12,
      link=4.5e10,
      dims=3,
      ring=4,
      slow=6.25e9,
      cores=2,
      sources=(_CLOUD + "v4", _BOOK),
    ),
    Chip(
      name="v5e",
      kind="TPU v5 lite",
      flops=197e12,
      hbm=_gib(15.75),
      hbm_bandwidth=8.1e11,
      link=4.5e10,
      dims=2,
      ring=16,
      slow=6.25e9,
      sources=(_CLOUD + "v5e", _BOOK),
    ),
    Chip(
      name="v5p",
      kind="TPU v5",
      flops=459e12,
      hbm=_gib(95.74),
      hbm_bandwidth=2.765e12,
      link=9e10,
      dims=3,
      ring=4,
      slow=6.25e9,
      sources=(_CLOUD + "v5p", _BOOK),
    ),
    Chip(
      name="v6e",
      kind="TPU v6 lite",
      flops=918e12,
      hbm=_gib(31.25),
      hbm_bandwidth=1.64e12,
      link=9e10,
      dims=2,
      ring=16,
      slow=6.25e9,
      sources=(_CLOUD + "v6e", _BOOK),
    ),
  )
}
"""Chips that a topology may be of."""
