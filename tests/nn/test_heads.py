import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import nn

ROWS = ["1111", "1100", "0110", "0000"]


@pytest.fixture
def tokens():
  shape = (len(ROWS), 4, 3)
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.fixture
def mask():
  return jnp.array([[digit == "1" for digit in row] for row in ROWS])


POOLS = {
  "last": (nn.pool_last, lambda x: x[-1]),
  "mean": (nn.pool_mean, lambda x: x.mean(axis=0)),
  "max": (nn.pool_max, lambda x: x.max(axis=0)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling_sees_what_is_not_padding(name, tokens, mask):
  pool, reference = POOLS[name]
  for row, seen, result in zip(
    np.asarray(tokens), np.asarray(mask), pool(tokens, mask), strict=True
  ):
    expected = reference(row[seen]) if seen.any() else np.zeros(3)
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", POOLS)
def test_no_mask_is_a_full_mask(name, tokens):
  pool, _ = POOLS[name]
  full = jnp.ones(tokens.shape[:2], bool)
  np.testing.assert_allclose(pool(tokens), pool(tokens, full), rtol=1e-6)


def test_attention_pooling_starts_as_the_mean(tokens, mask):
  pool = nn.AttentionPooling(3, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(
    pool(tokens, mask), nn.pool_mean(tokens, mask), rtol=1e-5, atol=1e-6
  )


def test_attention_pooling_follows_its_scores(tokens, mask):
  pool = nn.AttentionPooling(3, rngs=nnx.Rngs(0))
  pool.score.kernel[...] = jnp.array([[2.0], [-1.0], [0.5]])
  scores = np.asarray(tokens, np.float64) @ [2.0, -1.0, 0.5]
  weights = np.exp(scores) * np.asarray(mask)
  weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
  expected = np.einsum("bt,btd->bd", weights, np.asarray(tokens))
  np.testing.assert_allclose(pool(tokens, mask), expected, rtol=1e-5, atol=1e-6)


def test_unknown_pooling_is_named(monkeypatch):
  # As for users, who run without the type checker of the tests.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=r"^pooling must be one of 'last'"):
    nn.ClassificationHead(4, 2, pooling="first", rngs=nnx.Rngs(0))
