"""Laws of the gated feed-forward layer beyond those of all modules."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import nn

FEATURES, HIDDEN = 6, 10


def layer(**kwargs):
  return nn.GatedFeedForward(FEATURES, HIDDEN, **kwargs, rngs=nnx.Rngs(0))


def normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_it_is_its_formula():
  module, x = layer(activation="relu"), normal(2, 3, FEATURES)
  gate, inward, outward = map(
    np.asarray,
    (module.gate.kernel[...], module.inward[...], module.outward.kernel[...]),
  )
  expected = (np.maximum(x @ gate, 0) * (x @ inward.T)) @ outward
  np.testing.assert_allclose(module(jnp.asarray(x)), expected, atol=1e-5)


def test_it_has_three_matrices_and_nothing_else():
  leaves = {
    "/".join(map(str, path)): leaf[...].shape
    for path, leaf in nnx.to_flat_state(nnx.state(layer()))
  }
  rows = (HIDDEN, FEATURES)
  assert leaves == {
    "gate/kernel": rows[::-1], "inward": rows, "outward/kernel": rows,
  }  # fmt: skip


def test_all_matrices_begin_at_the_scale_of_their_inputs():
  module = nn.GatedFeedForward(64, 160, rngs=nnx.Rngs(0))
  spread = lambda x: float(jnp.std(x[...]))
  assert spread(module.gate.kernel) == pytest.approx(64**-0.5, rel=0.05)
  assert spread(module.inward) == pytest.approx(64**-0.5, rel=0.05)
  assert spread(module.outward.kernel) == pytest.approx(160**-0.5, rel=0.05)


def test_of_a_unit_that_gives_zero_nothing_is_needed():
  module, x = layer(activation="relu"), jnp.asarray(normal(1, FEATURES))
  closed = np.asarray(module.activation(module.gate(x)))[0] == 0
  assert closed.any()
  assert not closed.all()
  before = module(x)
  spoil = jnp.where(closed, 1e3, 1.0)
  module.inward[...] *= spoil[:, None]
  module.outward.kernel[...] *= spoil[:, None]
  np.testing.assert_allclose(module(x), before, rtol=1e-5)


def test_any_number_of_axes_may_come_before_the_features():
  module, x = layer(), jnp.asarray(normal(2, 3, 4, FEATURES))
  rows = module(x.reshape(-1, FEATURES)).reshape(x.shape)
  np.testing.assert_allclose(module(x), rows, atol=1e-6)
  np.testing.assert_allclose(module(x[0, 0, 0]), rows[0, 0, 0], atol=1e-6)


def test_a_threshold_is_its_own_and_learns_in_training_only():
  make = lambda: layer(
    activation="dynamic_sparse_relu",
    activation_options={"threshold": 0.25, "rate": 0.5},
  )
  first, second = make(), make()
  threshold = lambda module: float(module.activation.threshold[...])
  x = jnp.asarray(10 * normal(4, FEATURES))
  first.train()
  first(x)
  assert threshold(first) > 0.3
  assert threshold(second) == 0.25
  first.eval()
  kept = threshold(first)
  first(x)
  assert threshold(first) == kept


WRONG = {
  "features": ({"features": 0}, "^features must be .*got features=0"),
  "hidden": ({"hidden": 2.5}, "^hidden must be .*got hidden=2.5"),
  "activation": ({"activation": "rely"}, "^activation must be .*nearest: relu"),
  "options of a function": (
    {"activation_options": {"rate": 0.1}},
    "^options must be empty for activation='silu'",
  ),
  "options": (
    {
      "activation": "dynamic_sparse_relu",
      "activation_options": {"rate": 2.0},
    },
    "^rate must be in",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  wrong, message = WRONG[name]
  arguments = {"features": FEATURES, "hidden": HIDDEN} | wrong
  with pytest.raises(ValueError, match=message):
    nn.GatedFeedForward(**arguments, rngs=nnx.Rngs(0))
