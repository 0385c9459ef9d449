"""Laws of hashing and of block summaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import nn

ROUNDS, SIZE, BITS = 3, 8, 2


def normal(*shape, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


@pytest.fixture(scope="module")
def projections():
  return nn.hash_projections(jax.random.key(0), ROUNDS, SIZE, BITS)


def test_directions_of_a_round_are_orthogonal_and_rounds_differ(projections):
  gram = jnp.einsum("rhb,rhc->rbc", projections, projections)
  np.testing.assert_allclose(
    gram, np.tile(np.eye(BITS), (ROUNDS, 1, 1)), atol=1e-6
  )
  assert np.abs(projections[0] - projections[1]).max() > 0.1
  assert nn.hash_projections(jax.random.key(0), 2, SIZE, 0).shape == (
    2,
    SIZE,
    0,
  )


def test_buckets_are_signs_and_know_no_length(projections):
  x = normal(5, SIZE)
  buckets = nn.hash_buckets(x, projections)
  signs = np.einsum("th,rhb->trb", x, projections) > 0
  np.testing.assert_array_equal(buckets, signs @ (1 << np.arange(BITS)))
  np.testing.assert_array_equal(nn.hash_buckets(7 * x, projections), buckets)
  opposite = nn.hash_buckets(-x, projections)
  np.testing.assert_array_equal(opposite, 2**BITS - 1 - buckets)


def test_a_bit_is_shared_as_often_as_the_angle_says():
  projections = nn.hash_projections(jax.random.key(1), 4000, SIZE, 1)
  x = normal(2, SIZE)
  cosine = x[0] @ x[1] / jnp.linalg.norm(x[0]) / jnp.linalg.norm(x[1])
  buckets = nn.hash_buckets(x, projections)
  shared = np.mean(buckets[0] == buckets[1])
  np.testing.assert_allclose(shared, 1 - np.arccos(cosine) / np.pi, atol=0.03)


def test_summaries_are_sums_over_buckets(projections):
  k, block = normal(12, SIZE), 4
  valid = jnp.arange(12) != 5
  summary = nn.summarize_blocks(k, projections, block, valid)
  buckets = np.asarray(nn.hash_buckets(k, projections))
  total = np.zeros((3, ROUNDS, 2**BITS, SIZE))
  count = np.zeros((3, ROUNDS, 2**BITS))
  for t in range(12):
    for r in range(ROUNDS):
      if valid[t]:
        total[t // block, r, buckets[t, r]] += k[t]
        count[t // block, r, buckets[t, r]] += 1
  np.testing.assert_allclose(summary.total, total, atol=1e-5)
  np.testing.assert_array_equal(summary.count, count)
  mean = total / np.maximum(count, 1)[..., None]
  np.testing.assert_allclose(summary.centroids(), mean, atol=1e-5)


def test_one_bucket_holds_the_mean_of_the_block():
  k = normal(8, SIZE)
  summary = nn.summarize_blocks(k, jnp.zeros((1, SIZE, 0)), 4)
  means = np.asarray(k).reshape(2, 4, SIZE).mean(1)
  np.testing.assert_allclose(summary.centroids()[:, 0, 0], means, atol=1e-6)
