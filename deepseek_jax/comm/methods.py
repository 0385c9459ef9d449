"""Methods that encode blocks of leaves, each leaf by itself."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from deepseek_jax.comm.axes import Axes
from deepseek_jax.comm.codecs import pack, unpack
from deepseek_jax.comm.exchange import Leaf
from deepseek_jax.comm.layout import Layout
from deepseek_jax.comm.two_shot import TwoShot
from deepseek_jax.core.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Blockwise:
  """Averages every leaf in two shots.

  Attributes:
    shots: How.
    refresh: Of a codec that cannot say zero: exchanges between two looks at
      where gradients are not always zero. 0 for others.
    start: The number of the first exchange.
  """

  shots: TwoShot
  refresh: int = 0
  start: int = 0

  @property
  def axes(self) -> Axes:
    """Over which devices."""
    return self.shots.axes

  def layout(self, leaf: Leaf) -> Layout:
    """Returns how a leaf's gradient is cut."""
    return self.shots.layout(leaf.shape, leaf.dim)

  def init(self, leaves: Sequence[Leaf]) -> PyTree:
    """Returns errors, and masks where there are some."""
    layouts = [self.layout(leaf) for leaf in leaves]
    errors = {
      leaf.path: self.shots.init(layout)
      for leaf, layout in zip(leaves, layouts, strict=True)
    }
    if not self.refresh:
      return {"left": errors}
    seen = {
      leaf.path: jnp.zeros((1, *layout.chunks), bool)
      for leaf, layout in zip(leaves, layouts, strict=True)
    }
    return {"left": errors, "seen": seen}

  def __call__(
    self,
    grads: Sequence[Array],
    leaves: Sequence[Leaf],
    own: PyTree,
    count: Array,
  ) -> tuple[list[Array], PyTree, Array, Array]:
    """Returns means, the state, and squares of what is left and of all."""
    found, left, seen = [], {}, {}
    lost = whole = jnp.zeros((), jnp.float32)
    for grad, leaf in zip(grads, leaves, strict=True):
      layout, mask = self.layout(leaf), None
      if self.refresh:
        known = own["seen"][leaf.path][0]
        wanted = layout.split(grad) + own["left"][leaf.path].worker[0]
        mask = self._union(wanted, known, count)
        seen[leaf.path] = mask[None]
      one = self.shots(grad, layout, own["left"][leaf.path], mask)
      found.append(one.mean)
      left[leaf.path] = one.errors
      lost, whole = lost + one.lost, whole + one.whole
    own = {"left": left} | ({"seen": seen} if self.refresh else {})
    return found, own, lost, whole

  def _union(self, wanted: Array, known: Array, count: Array) -> Array:
    """Returns where any device had or has something to send."""
    look = lambda: _any(known | (wanted != 0), self.axes.names)
    due = (count - self.start) % self.refresh == 0
    return jax.lax.cond(due, look, lambda: known)

  def sent_bytes(self, leaves: Sequence[Leaf]) -> float:
    """Returns the bytes that a device sends, those of masks on average."""
    sent = 0.0
    for leaf in leaves:
      layout = self.layout(leaf)
      sent += self.shots.sent_bytes(layout)
      if self.refresh:
        n, blocks, block = layout.chunks
        sent += 2 * (n - 1) * blocks * block / 8 / self.refresh
    return sent


def _any(bits: Array, names: tuple[str, ...]) -> Array:
  """Returns the union over devices of boolean chunks, sent as bits."""
  every = jax.lax.all_to_all(pack(bits), names, 0, 0, tiled=True)
  own = jax.lax.reduce_or(every, (0,))
  return unpack(jax.lax.all_gather(own, names))
