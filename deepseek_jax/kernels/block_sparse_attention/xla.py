"""Block-sparse attention in plain JAX, forward and backward.

One head after the other, so that what stands between stays in cache: first the
tiles of `dispatch`, whose queries share a block of keys, then the windows,
which also fetch what their tokens got from the tiles. Heads are read and
written where they lie between the others. The backward pass recomputes the
weights from the log-sum-exp. It scatters nothing: the gradient of a query is
fetched from the tiles, and as the tiles of a block follow each other, those of
keys and values add up where they lie.

Shape letters: B sequences of T tokens, K heads of keys, G heads of queries that
share them, H head size; M tiles of L tokens, R chosen blocks of J keys, W keys
in a window, C tiles or query blocks that are handled together.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention.problem import Layout, Tokens
from deepseek_jax.kernels.block_sparse_attention.xla_parts import (
  Above,
  Head,
  Partial,
  Tuning,
)
from deepseek_jax.kernels.block_sparse_attention.xla_tiles import (
  make_plan,
  tiles_backward,
  tiles_forward,
)
from deepseek_jax.kernels.block_sparse_attention.xla_windows import (
  windows_backward,
  windows_forward,
)

_BLOCKS = 32  # Query blocks in a step: a few megabytes of logits.
_TILES = 32
_PARTS = 2  # The CPU runtime gives products to cores, but does not cut them.


def padded_blocks(blocks: int) -> int:
  """Returns the least number of blocks that cuts into equal steps."""
  steps = -(-blocks // _BLOCKS)
  return steps * -(-blocks // steps)


def tuning(layout: Layout, tokens: Tokens) -> Tuning:
  """Returns how much to do at a time on this kind of device."""
  _, time, _, group, _ = tokens.q.shape
  blocks = time // layout.block
  per_step = blocks // -(-blocks // _BLOCKS)
  rows = max(1, layout.block // group)
  on_cpu = jax.default_backend() == "cpu"
  return Tuning(rows, _TILES, per_step, _PARTS if on_cpu else 1, not on_cpu)


def attend(
  layout: Layout, tuning: Tuning, tokens: Tokens, ids: Int[Array, "B T K R"]
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K G"]]:
  """Returns attention and its log-sum-exp.

  T is a multiple of the block. The `ids` of a token are distinct blocks that
  its window does not hold, nor the future; -1 stands for none.
  """
  if not tuning.together:
    return _attend(layout, tuning, tokens, ids)

  def one(tree):
    tokens, ids = jax.tree.map(lambda x: x[None, :, None], tree)
    found = _attend(layout, tuning, tokens, ids)
    return jax.tree.map(lambda x: x[0, :, 0], found)

  return jax.vmap(jax.vmap(one, 1, 1))((tokens, ids))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(layout, tuning, tokens, ids):
  return _forward(layout, tuning, tokens, ids)[0]


def _forward(layout: Layout, tuning: Tuning, tokens: Tokens, ids: Array):
  q = tokens.q
  plan = make_plan(tuning, ids, tokens.k.shape[1] // layout.block)
  remote = Partial.room(q, (plan.num_rows, *q.shape[3:]))

  def turn(number, carry):
    head, (remote, out) = Head.of(number, q), carry
    remote = tiles_forward(layout, tuning, tokens, plan, head, remote)
    out = windows_forward(layout, tuning, tokens, plan, head, remote, out)
    return remote, out

  carry = (remote, Partial.room(q, q.shape, q.dtype))
  _, out = jax.lax.fori_loop(0, Head.count(q), turn, carry)
  return tuple(out), plan


def _attend_fwd(layout, tuning, tokens, ids):
  (out, lse), plan = _forward(layout, tuning, tokens, ids)
  return (out, lse), (tokens, plan, out, lse)


def _attend_bwd(layout, tuning, residuals, cotangents):
  tokens, plan, out, lse = residuals
  d_out, d_lse = cotangents
  # With weights p and their gradient dp, logits get p·(dp - delta). As a
  # product, since sums over an axis of so many dimensions are slow on CPU.
  ones = jnp.ones(out.shape[-1:], jnp.float32)
  delta = (d_out.astype(jnp.float32) * out) @ ones - d_lse
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # Saw nothing: p is 0.
  above = Above(d_out, lse, delta)
  q = tokens.q
  d_remote = Partial.room(q, (plan.num_rows, *q.shape[3:])).out

  def turn(number, carry):
    head, (d_remote, grads) = Head.of(number, q), carry
    d_remote, grads = tiles_backward(
      layout, tuning, tokens, plan, above, head, d_remote, grads
    )
    grads = windows_backward(
      layout, tuning, tokens, plan, above, head, d_remote, grads
    )
    return d_remote, grads

  moved = tokens._replace(segments=None)
  grads = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), moved)
  _, grads = jax.lax.fori_loop(0, Head.count(q), turn, (d_remote, grads))
  return jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, moved), None


_attend.defvjp(_attend_fwd, _attend_bwd)
