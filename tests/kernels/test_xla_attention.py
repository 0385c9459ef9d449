"""Laws of the implementation in plain JAX, beside those that all share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.kernels.block_sparse_attention import xla
from deepseek_jax.kernels.block_sparse_attention.problem import (
  Layout,
  Tokens,
  usable_ids,
)


@pytest.mark.parametrize(
  "tuning",
  [
    xla.Tuning(4, 3, 2, 1, True),
    xla.Tuning(2, 5, 4, 3, False),
  ],
)
@pytest.mark.slow
def test_how_much_is_done_at_a_time_changes_nothing(tuning):
  layout = Layout(block=4, reach=1, is_causal=True, ramp=3.0, scale=0.5)
  keys = jax.random.split(jax.random.key(0), 6)
  shape = (2, 32, 2, 2)
  tokens = Tokens(
    q=jax.random.normal(keys[0], (*shape, 4)),
    k=jax.random.normal(keys[1], (*shape[:3], 4)),
    v=jax.random.normal(keys[2], (*shape[:3], 4)),
    span=3 * jax.random.uniform(keys[3], shape),
    offset=jax.random.uniform(keys[4], shape),
    segments=None,
  )
  ids = jax.random.randint(keys[5], (2, 2, 32, 3), 0, 8)
  ids = jnp.moveaxis(usable_ids(ids, layout, 8), 1, 2)

  def run(tuning, tokens):
    out, lse = xla.attend(layout, tuning, tokens, ids)
    return jnp.vdot(out, tokens.q) + (lse**2).sum()

  usual = xla.tuning(layout, tokens)
  gradients = jax.jit(jax.grad(run, 1), static_argnums=0)
  found, expected = gradients(tuning, tokens), gradients(usual, tokens)
  for name, one, other in zip(
    Tokens._fields, found[:5], expected[:5], strict=False
  ):
    np.testing.assert_allclose(one, other, atol=2e-5, err_msg=name)
