"""Rows of units that are zero are not read, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import nn
from deepseek_jax.nn import active_units


def parts(units, features, zeros, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  hidden = jax.random.normal(keys[0], (units,))
  hidden = jnp.where(jax.random.uniform(keys[1], (units,)) < zeros, 0, hidden)
  x = jax.random.normal(keys[2], (features,))
  inward, outward = jax.random.normal(keys[3], (2, units, features))
  return hidden, x, inward, outward


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("units", [1, 16, 50])
def test_it_is_the_product_with_all_units(units, zeros):
  hidden, x, inward, outward = parts(units, 8, zeros)
  wanted = (hidden * (inward @ x)) @ outward
  found = nn.combine_active(hidden, x, inward, outward)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_zeros_are_not_read():
  hidden, x, inward, outward = parts(64, 8, 0.9)
  poison = jnp.where(hidden[:, None] == 0, jnp.nan, 1)
  found = nn.combine_active(hidden, x, inward * poison, outward * poison)
  assert jnp.isfinite(found).all()


@pytest.mark.parametrize("threshold", [-100.0, 1.5, 100.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_decodes_what_it_computes_at_once(
  threshold, dtype, monkeypatch
):
  monkeypatch.setattr(active_units, "_LARGE", 1)
  layer = nn.GatedFeedForward(
    32, 64, activation=lambda x: jnp.where(x > threshold, x, 0),
    dtype=dtype, rngs=nnx.Rngs(0),
  )  # fmt: skip
  x = jax.random.normal(jax.random.key(1), (1, 1, 32))
  graph = str(jax.make_jaxpr(layer.decode)(x))
  assert "cond" in graph
  found, wanted = jax.jit(lambda x: (layer.decode(x), layer(x)))(x)
  assert found.dtype == wanted.dtype
  tolerance = 1e-4 if dtype == jnp.float32 else 3e-2
  np.testing.assert_allclose(
    np.asarray(found, np.float32),
    np.asarray(wanted, np.float32),
    rtol=tolerance,
    atol=tolerance,
  )


@pytest.mark.parametrize(
  ("shape", "large"), [((2, 1, 16), 1), ((1, 1, 16), 2**21)]
)
def test_many_tokens_and_small_layers_keep_to_the_products(
  shape, large, monkeypatch
):
  monkeypatch.setattr(active_units, "_LARGE", large)
  layer = nn.GatedFeedForward(16, 64, activation="relu", rngs=nnx.Rngs(0))
  graph = str(jax.make_jaxpr(layer.decode)(jnp.ones(shape)))
  assert "cond" not in graph
