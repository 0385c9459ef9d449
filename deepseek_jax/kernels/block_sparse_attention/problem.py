"""A problem in the forms that implementations share: heads, blocks, ids."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """How the keys of a head are cut.

  Attributes:
    block: J, keys in a block.
    reach: blocks that a window holds on a side of the own one.
    is_causal: whether none lies in the future.
    ramp: tokens over which a window fades.
    scale: of logits, for an implementation whose queries are not scaled yet.
  """

  block: int
  reach: int
  is_causal: bool
  ramp: int | float
  scale: float = 1.0

  @property
  def ahead(self) -> int:
    """Blocks of a window that lie in the future."""
    return 0 if self.is_causal else self.reach

  @property
  def band(self) -> int:
    """Blocks of a window, the own one included."""
    return self.reach + 1 + self.ahead


class Heads(NamedTuple):
  """P = B·K heads with keys of their own, each for G heads of queries.

  T is a multiple of the block. `q` is scaled already. Tokens see each other if
  their segments are equal and not negative.
  """

  q: Float[Array, "*P T G H"]
  k: Float[Array, "*P T H"]
  v: Float[Array, "*P T H"]
  span: Float[Array, "*P T G"] | None
  offset: Float[Array, "*P T G"] | None
  segments: Int[Array, "*P T"] | None


class Tokens(NamedTuple):
  """The same as `Heads`, token by token, as users have it: `q` unscaled."""

  q: Float[Array, "B T K G H"]
  k: Float[Array, "B T K H"]
  v: Float[Array, "B T K H"]
  span: Float[Array, "B T K G"] | None
  offset: Float[Array, "B T K G"] | None
  segments: Int[Array, "B T K"] | None

  def heads(self, scale: float) -> Heads:
    """Returns it head by head, `q` scaled."""
    scaled = self._replace(q=self.q * scale)
    return jax.tree.map(by_head, Heads(*scaled))


def by_head(x: Array) -> Array:
  """[B, T, K, ...] to [B·K, T, ...]."""
  batch, time, heads = x.shape[:3]
  return jnp.moveaxis(x, 2, 1).reshape(batch * heads, time, *x.shape[3:])


def by_token(x: Array, heads: int) -> Array:
  """[B·K, T, ...] to [B, T, K, ...]."""
  x = x.reshape(-1, heads, *x.shape[1:])
  return jnp.moveaxis(x, 1, 2)


def usable_ids(
  block_ids: Int[Array, "*batch T R"], layout: Layout, num_blocks: int
) -> Int[Array, "*batch T R"]:
  """Returns the ids with -1 for what adds no key.

  That is a block that does not exist, that the window of the token holds, that
  lies in its future if causal, or that it named before.

  >>> layout = Layout(block=2, reach=0, is_causal=True, ramp=1.0)
  >>> print(usable_ids(jnp.array([[0, 1], [0, 0], [0, 0], [0, 0]]), layout, 2))
  [[-1 -1]
   [-1 -1]
   [ 0 -1]
   [ 0 -1]]
  """
  time = block_ids.shape[-2]
  own = (jnp.arange(time) // layout.block)[:, None]
  behind = jnp.broadcast_to(own, block_ids.shape) - block_ids
  near = (behind <= layout.reach) & (behind >= -layout.ahead)
  usable = (block_ids >= 0) & (block_ids < num_blocks) & ~near
  if layout.is_causal:
    usable &= behind > 0
  same = block_ids[..., :, None] == block_ids[..., None, :]
  again = jnp.tril(same, -1).any(-1)
  return jnp.where(usable & ~again, block_ids, -1)
