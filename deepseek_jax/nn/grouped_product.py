"""Products of consecutive rows with a matrix for each group of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def block_size(rows: int, num_groups: int) -> int:
  """Returns into how many rows groups are best rounded up.

  About a quarter of what a group has on average, so that an eighth of the rows
  are padding; 1 where groups have few rows.

  >>> block_size(4096, 8), block_size(2, 8)
  (128, 1)
  """
  return 2 ** max(0, (rows // (4 * num_groups)).bit_length() - 1)


def block_count(rows: int, num_groups: int, block: int) -> int:
  """Returns how many blocks are enough, however the rows are shared out.

  >>> block_count(4096, 8, 128), block_count(2, 8, 1)
  (39, 2)
  """
  return (rows + min(rows, num_groups) * (block - 1)) // block


@jax.custom_vjp
def grouped_product(
  x: Float[Array, "blocks block C"],
  matrices: Float[Array, "E C D"],
  counts: Int32[Array, " E"],
) -> Float[Array, "blocks block D"]:
  """Returns every row times the matrix of its group.

  Rows of a group are consecutive and fill whole blocks. On TPU this is one
  `jax.lax.ragged_dot`. Elsewhere XLA would make that E products of all rows,
  most of them masked away (on CPU, 8 groups: six times as slow, measured), and
  so it would on TPU for the gradient of the matrices: there every block has its
  own copy of the matrix instead, and its own gradient.

  >>> x = jnp.ones((2, 1, 1))
  >>> y = grouped_product(x, jnp.array([[[2.0]], [[3.0]]]), jnp.array([1, 1]))
  >>> print(y.reshape(-1))
  [2. 3.]

  Args:
    x: rows in blocks; those beyond the last group count to it.
    matrices: one a group.
    counts: blocks of every group.
  """
  # JAX has no `vmap` of a ragged product whose groups are mapped, too.
  ragged = jax.custom_batching.sequential_vmap(_ragged)
  return jax.lax.platform_dependent(
    x, matrices, counts, tpu=ragged, default=_blocked
  )


def _blocked(x, matrices, counts):
  own = matrices[_groups(len(x), counts)]
  return jnp.einsum("bnc,bcd->bnd", x, own)


def _ragged(x, matrices, counts):
  blocks, block, size = x.shape
  # A row without a group would be undefined.
  counts = counts.at[-1].add(blocks - counts.sum())
  y = jax.lax.ragged_dot(x.reshape(-1, size), matrices, block * counts)
  return y.reshape(blocks, block, -1)


def _groups(blocks: int, counts: Int32[Array, " E"]) -> Int32[Array, " blocks"]:
  """Returns the group of every block."""
  is_after = jnp.arange(blocks)[:, None] >= jnp.cumsum(counts)[None]
  return jnp.minimum(is_after.sum(1, dtype=jnp.int32), len(counts) - 1)


def _forward(x, matrices, counts):
  return grouped_product(x, matrices, counts), (x, matrices, counts)


def _backward(kept, grad):
  x, matrices, counts = kept
  of_blocks = jnp.einsum(
    "bnc,bnd->bcd", x, grad, preferred_element_type=jnp.float32
  )
  total = jax.ops.segment_sum(
    of_blocks, _groups(len(x), counts), len(matrices), indices_are_sorted=True
  )
  back = grouped_product(grad, jnp.swapaxes(matrices, 1, 2), counts)
  return back, total.astype(matrices.dtype), None


grouped_product.defvjp(_forward, _backward)
