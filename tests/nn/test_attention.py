import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import nn

BATCH, STEPS, FEATURES, HEADS, HEAD_DIM = 3, 5, 6, 2, 4


@pytest.fixture
def tokens():
  shape = (BATCH, STEPS, FEATURES)
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.fixture
def mask():
  rows = ["11111", "01101", "00000"]
  return jnp.array([[digit == "1" for digit in row] for row in rows])


@pytest.fixture
def attention():
  return nn.MultiHeadAttention(
    FEATURES, num_heads=HEADS, head_dim=HEAD_DIM, rngs=nnx.Rngs(0)
  )


def reference(attention, tokens, mask):
  """Attention in float64, one example, one head and one step at a time."""

  def linear(layer, x):
    kernel, bias = layer.kernel[...], layer.bias[...]
    return x @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)

  result = np.zeros((BATCH, STEPS, FEATURES))
  for row in range(BATCH):
    x, seen = np.asarray(tokens[row], np.float64), np.asarray(mask[row])
    if not seen.any():
      continue
    heads = []
    for head in range(HEADS):
      part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
      q, k, v = (
        linear(layer, x)[:, part]
        for layer in (attention.query, attention.key, attention.value)
      )
      weights = np.exp(q @ k[seen].T / np.sqrt(HEAD_DIM))
      weights /= weights.sum(axis=1, keepdims=True)
      heads.append(weights @ v[seen])
    result[row] = linear(attention.out, np.concatenate(heads, axis=1))
  return result


def test_attention_equals_a_float64_reference(attention, tokens, mask):
  # A bias that is not zero, or the law of the empty row would hold by luck.
  attention.out.bias[...] = jnp.arange(FEATURES, dtype=jnp.float32)
  np.testing.assert_allclose(
    attention(tokens, mask),
    reference(attention, tokens, mask),
    rtol=1e-5,
    atol=1e-6,
  )


def test_attention_without_positions_is_equivariant(attention, tokens):
  order = jnp.array([3, 0, 4, 1, 2])
  np.testing.assert_allclose(
    attention(tokens[:, order]),
    attention(tokens)[:, order],
    rtol=1e-5,
    atol=1e-6,
  )


def test_block_adds_what_attention_reads(tokens, mask):
  block = nn.AttentionBlock(FEATURES, num_heads=HEADS, rngs=nnx.Rngs(0))
  x = np.asarray(tokens, np.float64)
  centered = x - x.mean(axis=-1, keepdims=True)
  normalized = centered / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
  read = block.attention(jnp.asarray(normalized, jnp.float32), mask)
  np.testing.assert_allclose(
    block(tokens, mask), x + np.asarray(read), rtol=1e-4, atol=1e-5
  )


def test_heads_that_do_not_divide_are_named():
  with pytest.raises(ValueError, match=r"divide features .* num_heads=4"):
    nn.MultiHeadAttention(6, num_heads=4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  "wrong", [{"num_heads": 0}, {"head_dim": 0}, {"dropout": 1.0}], ids=str
)
def test_values_out_of_range_are_named(wrong):
  (name,) = wrong
  with pytest.raises(ValueError, match=f"^{name} must be"):
    nn.AttentionBlock(8, **wrong, rngs=nnx.Rngs(0))
