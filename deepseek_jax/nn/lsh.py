"""Locality-sensitive hashing of vectors, and summaries of blocks by bucket."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def hash_projections(
  key: Array, num_hashes: int, head_dim: int, hash_bits: int
) -> Float[Array, "rounds H bits"]:
  """Draws the directions that vectors are hashed along.

  Those of a round are orthogonal, so that its bits say different things.

  Args:
    key: a random key.
    num_hashes: rounds of hashing, at least 1.
    head_dim: H, size of a vector.
    hash_bits: signs in a hash, from 0 (one bucket for all) to H.

  >>> hash_projections(jax.random.key(0), 4, 16, 3).shape
  (4, 16, 3)
  """
  shape = (num_hashes, head_dim, hash_bits)
  if not hash_bits:
    return jnp.zeros(shape)
  return jnp.linalg.qr(jax.random.normal(key, shape))[0]


def hash_buckets(
  x: Float[Array, "*batch H"], projections: Float[Array, "rounds H bits"]
) -> Int[Array, "*batch rounds"]:
  """Returns the bucket of every vector in every round, from 0 to 2^bits - 1.

  A bucket is the signs of the projections, read as a number. Vectors at an
  angle a share a bit with probability 1 - a / π: near ones often fall into the
  same bucket in one round at least, others seldom in any.

  >>> directions = jnp.eye(2)[None]
  >>> print(hash_buckets(jnp.array([[1.0, -1.0], [-1.0, 1.0]]), directions))
  [[1]
   [2]]

  References:
    Charikar, "Similarity Estimation Techniques from Rounding Algorithms", 2002,
    https://doi.org/10.1145/509907.509965
  """
  along = jnp.einsum("...h,rhb->...rb", x, projections)
  powers = 2 ** jnp.arange(projections.shape[-1])
  return (along > 0).astype(powers.dtype) @ powers


class BlockSummary(NamedTuple):
  """Sums of the keys of every block, bucket by bucket; float32.

  A sum rather than a mean, so that a token can be added at any time.
  """

  total: Float[Array, "*batch blocks rounds buckets H"]
  count: Float[Array, "*batch blocks rounds buckets"]

  def centroids(self) -> Float[Array, "*batch blocks rounds buckets H"]:
    """Returns the mean key of every bucket; 0 for an empty one."""
    return self.total / jnp.maximum(self.count, 1)[..., None]


def summarize_blocks(
  k: Float[Array, "T H"],
  projections: Float[Array, "rounds H bits"],
  block_size: int,
  valid: Bool[Array, " T"] | None = None,
) -> BlockSummary:
  """Adds up the keys of every block, bucket by bucket.

  Args:
    k: keys of one head; T is a multiple of `block_size`.
    projections: see `hash_projections`.
    block_size: keys in a block.
    valid: False for keys that no block should count.
  """
  buckets = 2 ** projections.shape[-1]
  hashes = hash_buckets(k, projections)
  member = jax.nn.one_hot(hashes, buckets, dtype=jnp.float32)
  if valid is not None:
    member *= valid[:, None, None]
  member = member.reshape(-1, block_size, *member.shape[1:])
  blocks = k.reshape(-1, block_size, k.shape[-1]).astype(jnp.float32)
  return BlockSummary(
    total=jnp.einsum("njrc,njh->nrch", member, blocks), count=member.sum(1)
  )
