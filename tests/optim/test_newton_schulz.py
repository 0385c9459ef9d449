"""Orthogonalization against the singular value decomposition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.optim.newton_schulz import POLYNOMIALS, orthogonalize
from deepseek_jax.optim.whitening import scale_by_whitening

SHAPES = [(5, 5), (9, 4), (4, 9), (2, 3, 6, 4)]
solve = jax.jit(orthogonalize, static_argnames="steps")


def with_singular_values(shape, low):
  """Matrices whose singular values run from 1 down to `low`, in float64."""
  random = np.random.default_rng(0)
  u, s, vt = np.linalg.svd(random.normal(size=shape), full_matrices=False)
  return (u * np.geomspace(1, low, s.shape[-1])) @ vt


def polar_factor(matrices):
  u, _, vt = np.linalg.svd(matrices, full_matrices=False)
  return u @ vt


def grown(values, steps):
  """What the polynomials make of singular values, in float64."""
  for step in range(steps):
    a, b, c = POLYNOMIALS[min(step, len(POLYNOMIALS) - 1)]
    values = a * values + b * values**3 + c * values**5
  return values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("low", [0.5, 2.5e-3])
def test_moves_singular_values_close_to_one(shape, low):
  x = with_singular_values(shape, low)
  norm = np.linalg.norm(x, axis=(-2, -1), keepdims=True)
  assert np.all(low / norm > 1e-3)  # what the docstring promises this for
  found = np.linalg.svd(solve(jnp.float32(x)), compute_uv=False)
  assert found.min() > 0.87
  assert found.max() < 1.13


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("low", "atol"), [(0.5, 2e-5), (2.5e-3, 3e-4)])
def test_more_steps_reach_the_polar_factor(shape, low, atol):
  x = with_singular_values(shape, low)
  np.testing.assert_allclose(
    solve(jnp.float32(x), steps=8), polar_factor(x), atol=atol
  )


def test_the_steps_close_in_on_one_from_a_thousandth_on():
  values = np.geomspace(1e-3, 1, 10_000) / 1.01
  gaps = [np.abs(grown(values, n) - 1).max() for n in range(1, 8)]
  assert np.all(np.diff(gaps) < 0)
  assert gaps[4] < 0.13
  assert gaps[5] < 0.002


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-30, 2.0**100])
def test_does_not_depend_on_the_scale(scale):
  x = jnp.float32(with_singular_values((5, 4), 0.1))
  np.testing.assert_array_equal(solve(scale * x), solve(x))


def test_zero_stays_zero_and_leaves_its_neighbours_alone():
  x = jnp.float32(with_singular_values((2, 5, 4), 0.1))
  stack = jnp.concatenate([x, jnp.zeros((1, 5, 4))])
  np.testing.assert_array_equal(solve(stack)[2], 0.0)
  np.testing.assert_allclose(solve(stack)[:2], solve(x), atol=1e-6)


def test_computes_in_float32_whatever_the_type():
  x = jnp.asarray(with_singular_values((5, 4), 0.1), jnp.bfloat16)
  found = solve(x)
  assert found.dtype == jnp.bfloat16
  expected = solve(x.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(found, expected)


def test_no_steps_are_an_error():
  with pytest.raises(ValueError, match="at least 1, got steps=0"):
    orthogonalize(jnp.eye(2), steps=0)


@pytest.mark.parametrize(
  "bad", [jnp.eye(2, dtype=int), jnp.ones(3), 1j * jnp.eye(2)]
)
def test_what_is_no_real_matrix_is_named(bad):
  # The annotations refuse these first, where they are checked.
  unchecked = getattr(orthogonalize, "__wrapped__", orthogonalize)
  with pytest.raises(ValueError, match=f"floating, .* got {bad.dtype} of"):
    unchecked(bad)


def transcription(grads, variance, b1, b2, eps, update_rms, steps):
  """All updates, by decompositions in NumPy and float64."""
  mu, spread, updates = 0.0, 0.0, []
  for grad in grads:
    mu = b1 * mu + (1 - b1) * grad
    u, s, vt = np.linalg.svd(b1 * mu + (1 - b1) * grad, full_matrices=False)
    update = (u * grown(s / (1.01 * np.linalg.norm(s)), steps)) @ vt
    if variance is not None:
      now = update**2
      now = now.mean(1, keepdims=True) if variance == "row" else now
      spread = b2 * spread + (1 - b2) * now
      update /= np.sqrt(spread) + eps * np.sqrt(spread.mean())
    updates.append(update * update_rms / np.sqrt(np.mean(update**2)))
  return np.stack(updates)


def updates_of(tx, grads):
  """All updates of a transform, in one program."""

  def step(state, grad):
    updates, state = tx.update(grad, state)
    return state, updates

  run = lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads)[1]
  return jax.jit(run)(jnp.asarray(grads, jnp.float32))


def gradients(steps, shape, drift=0.5):
  """Gradients with a mean of their own and rows of unequal size."""
  random = np.random.default_rng(1)
  rows = np.geomspace(1, 20, shape[0])[:, None]
  mean = drift * random.normal(size=shape)
  return rows * (mean + random.normal(size=(steps, *shape)))


@pytest.mark.parametrize(
  ("variance", "shape"),
  [("row", (6, 4)), ("row", (4, 7)), ("full", (6, 4)), (None, (6, 4))],
)
def test_equals_its_transcription(variance, shape):
  settings = {
    "b1": 0.8, "b2": 0.9, "eps": 0.05, "update_rms": 0.3, "steps": 4
  }  # fmt: skip
  grads = gradients(25, shape)
  expected = transcription(grads, variance, **settings)
  found = updates_of(scale_by_whitening(variance=variance, **settings), grads)
  np.testing.assert_allclose(found, expected, atol=2e-4)


def test_without_variance_it_turns_with_the_gradient():
  grads = gradients(6, (5, 4))
  random = np.random.default_rng(2)
  left = np.linalg.qr(random.normal(size=(5, 5)))[0]
  right = np.linalg.qr(random.normal(size=(4, 4)))[0]
  run = functools.partial(updates_of, scale_by_whitening(variance=None))
  np.testing.assert_allclose(
    run(left @ grads @ right), left @ run(grads) @ right, atol=2e-5
  )
