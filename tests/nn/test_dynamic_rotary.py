"""Rotary positions against complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import nn


def draw(time=7, heads=3, size=8, dtype=jnp.float32):
  x = np.random.default_rng(0).normal(size=(2, time, heads, size))
  return jnp.asarray(x, dtype)


def in_complex_numbers(x, positions, base):
  x = np.asarray(x, np.float64)
  half = x.shape[-1] // 2
  z = x[..., :half] + 1j * x[..., half:]
  frequency = float(base) ** (-np.arange(half) / half)
  z = z * np.exp(1j * np.asarray(positions)[:, :, None, None] * frequency)
  return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("base", [10_000.0, 100])
def test_it_is_a_product_of_complex_numbers(base):
  x = draw()
  positions = jnp.array([[0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 0, 1, 900, 901]])
  np.testing.assert_allclose(
    nn.rotate_by_position(x, positions, base),
    in_complex_numbers(x, positions, base),
    atol=1e-4,  # 900 radians in float32.
  )


def test_products_depend_on_the_distance_alone():
  q, k = draw(), draw()[:, ::-1]
  positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
  products = lambda by: jnp.einsum(
    "bqnh,bknh->bnqk",
    *(nn.rotate_by_position(x, positions + by) for x in (q, k)),
  )
  np.testing.assert_allclose(products(0), products(50), atol=1e-4)


def test_lengths_and_types_stay():
  x = draw(dtype=jnp.bfloat16)
  positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
  turned = nn.rotate_by_position(x, positions)
  assert turned.dtype == jnp.bfloat16
  length = lambda x: np.linalg.norm(np.float32(x), axis=-1)
  np.testing.assert_allclose(length(turned), length(x), rtol=1e-2)


def test_odd_sizes_and_bases_are_named():
  positions = jnp.zeros((2, 7), jnp.int32)
  with pytest.raises(ValueError, match=r"^head_dim must be even .* head_dim=5"):
    jax.eval_shape(nn.rotate_by_position, draw(size=5), positions)
  with pytest.raises(ValueError, match=r"^rotary_base must be at least 1"):
    nn.rotate_by_position(draw(), positions, 0.5)
