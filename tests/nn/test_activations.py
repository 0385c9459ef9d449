import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import nn


@pytest.mark.parametrize("name", nn.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_activations_keep_shape_and_dtype(name, dtype):
  x = jnp.linspace(-3, 3, 6, dtype=dtype).reshape(2, 3)
  y = nn.activation(name)(x)
  assert (y.shape, y.dtype) == (x.shape, x.dtype)
  assert np.isfinite(np.asarray(y, np.float32)).all()


def test_a_function_is_its_own_activation():
  assert nn.activation(jax.nn.relu) is jax.nn.relu


@pytest.mark.parametrize(
  ("typo", "nearest"), [("rellu", "relu"), ("GELU", "gelu"), ("silo", "silu")]
)
def test_unknown_names_are_answered_with_the_nearest(typo, nearest):
  with pytest.raises(ValueError, match=f"nearest: .*{nearest}"):
    nn.activation(typo)


def test_a_name_far_from_all_is_answered_with_all():
  with pytest.raises(ValueError, match=r"one of elu, .*no name is near"):
    nn.activation("quux")
