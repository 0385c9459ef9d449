import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import nn


@pytest.fixture
def images():
  """Images without two equal pixels."""
  shape = (2, 7, 6, 3)
  pixels = np.random.default_rng(0).permutation(np.prod(shape))
  return jnp.asarray(pixels.reshape(shape), jnp.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_max_pool_equals_reduce_window(images, size):
  window = (size, size)
  expected = nnx.max_pool(images, window, strides=window, padding="VALID")
  np.testing.assert_array_equal(nn.max_pool(images, size), expected)


def test_gradient_of_max_pool_equals_select_and_scatter(images):
  def gradient(pool):
    return jax.grad(lambda x: jnp.square(pool(x)).sum())(images)

  expected = gradient(lambda x: nnx.max_pool(x, (2, 2), (2, 2), "VALID"))
  result = gradient(lambda x: nn.max_pool(x, 2))
  np.testing.assert_array_equal(result, expected)


def test_ties_share_the_gradient():
  gradient = jax.grad(lambda x: nn.max_pool(x, 2).sum())
  shares = gradient(jnp.ones((1, 2, 2, 1)))
  np.testing.assert_array_equal(shares, jnp.full((1, 2, 2, 1), 0.25))


def test_stage_is_the_sum_of_its_parts(images):
  stage = nn.ConvolutionStage(3, 4, activation="tanh", rngs=nnx.Rngs(0))
  kernel = np.asarray(stage.convolution.kernel[...], np.float64)
  padded = np.pad(
    np.asarray(images, np.float64), [(0, 0), (1, 1), (1, 1), (0, 0)]
  )
  convolved = sum(
    padded[:, i : i + 7, j : j + 6] @ kernel[i, j]
    for i in range(3)
    for j in range(3)
  )
  expected = np.tanh(convolved)[:, :6].reshape(2, 3, 2, 3, 2, 4).max((2, 4))
  np.testing.assert_allclose(stage(images), expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_keeps_running_statistics_in_training_only(images):
  stage = nn.ConvolutionStage(3, 4, norm="batch", rngs=nnx.Rngs(0))
  statistics = lambda: np.asarray(stage.norm.mean[...])
  start = statistics()
  stage.eval()
  stage(images)
  np.testing.assert_array_equal(statistics(), start)
  stage.train()
  stage(images)
  assert np.any(statistics() != start)


def test_window_larger_than_the_image_is_named(images):
  with pytest.raises(ValueError, match=r"\[1, 6\] .* 7x6 pixels, got size=7"):
    nn.max_pool(images, 7)


@pytest.mark.parametrize(
  "wrong",
  [
    {"out_channels": 0},
    {"kernel_size": 0},
    {"pool": 0},
    {"dropout": -0.1},
    {"activation": "rellu"},
  ],
  ids=str,
)
def test_values_out_of_range_are_named(wrong):
  (name,) = wrong
  arguments = {"in_channels": 3, "out_channels": 4} | wrong
  with pytest.raises(ValueError, match=f"^{name} must be"):
    nn.ConvolutionStage(**arguments, rngs=nnx.Rngs(0))
