import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.train import losses


def softmax64(logits):
  logits = np.asarray(logits, np.float64)
  p = np.exp(logits - logits.max(axis=1, keepdims=True))
  return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_equals_the_definition(smoothing):
  rng = np.random.default_rng(0)
  logits, labels = 3 * rng.normal(size=(7, 5)), rng.integers(0, 5, 7)
  target = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
  want = -(target * np.log(softmax64(logits))).sum(axis=1)
  loss = losses.CrossEntropy(label_smoothing=smoothing)
  got = loss(jnp.asarray(logits, jnp.float32), jnp.asarray(labels))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_cross_entropy_is_finite_for_extreme_logits():
  logits = jnp.array([[1e30, -1e30], [-1e30, 1e30]], jnp.float32)
  loss = losses.CrossEntropy()(logits, jnp.array([0, 0]))
  assert np.isfinite(np.asarray(loss)).all()


def test_class_weights_weigh_examples_by_their_class():
  loss = losses.CrossEntropy(class_weights=(1.0, 0.25, 0.0))
  np.testing.assert_array_equal(
    loss.weights(jnp.array([2, 0, 1, 1])), [0, 1, 0.25, 0.25]
  )


@given(st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_squared_error_equals_the_definition(n, k):
  rng = np.random.default_rng(n * 10 + k)
  outputs = rng.normal(size=(n, k)).astype(np.float32)
  targets = rng.normal(size=(n, k)).astype(np.float32)
  got = losses.MeanSquaredError()(jnp.asarray(outputs), jnp.asarray(targets))
  want = ((outputs - targets) ** 2).mean(axis=1)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_penalty_touches_weights_and_spares_vectors():
  params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([5.0])}
  grads = jax.grad(losses.penalty)(params, 0.5, 0.1)
  np.testing.assert_allclose(grads["kernel"], [[0.6, -0.7]], rtol=1e-6)
  np.testing.assert_array_equal(grads["bias"], [0.0])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
    ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\)"),
    ({"class_weights": (1.0, -1.0)}, "class_weights must be finite"),
    ({"class_weights": (0.0, 0.0)}, "not all 0"),
    ({"class_weights": (1.0, float("nan"))}, "class_weights must be finite"),
  ],
)
def test_cross_entropy_refuses_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    losses.CrossEntropy(**arguments)
