"""Whitening in eigenbases against NumPy, and when the bases turn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.optim import soap as soap_lib
from deepseek_jax.optim.whitening import scale_by_whitening

soap = functools.partial(scale_by_whitening, "soap")


def gradients(steps, shape):
  """Well-conditioned gradients that keep a direction and turn about it.

  Their singular values are 1 to 2, so that rounding decides no basis.
  """
  random = np.random.default_rng(3)
  drift = random.normal(size=shape)
  u, s, vt = np.linalg.svd(
    drift + random.normal(size=(steps, *shape)), full_matrices=False
  )
  return (u * np.linspace(2, 1, s.shape[-1])) @ vt


def follow(basis, square, b2, turns):
  """One power iteration on an average, in NumPy and float64."""
  if basis is None:
    return None
  covariance, vectors = basis
  covariance = b2 * covariance + (1 - b2) * square
  if turns:
    vectors = np.linalg.qr(covariance @ vectors)[0]
  return covariance, vectors


def transcription(grads, sides, b1, b2, eps, update_rms, every):
  """All updates; `sides` says which of rows and columns have a basis."""
  start = [
    (np.zeros((n, n)), np.eye(n)) if has else None
    for n, has in zip(grads.shape[1:], sides, strict=True)
  ]
  (rows, columns), mu, nu, updates = start, 0.0, 0.0, []
  for t, grad in enumerate(grads, start=1):
    turns = t <= 20 or t % every == 0
    rows = follow(rows, grad @ grad.T, b2, turns)
    columns = follow(columns, grad.T @ grad, b2, turns)
    left = np.eye(len(grad)) if rows is None else rows[1]
    right = np.eye(len(grad.T)) if columns is None else columns[1]
    nu = b2 * nu + (1 - b2) * (left.T @ grad @ right) ** 2
    mu = b1 * mu + (1 - b1) * grad
    ahead = left.T @ (b1 * mu + (1 - b1) * grad) @ right
    ahead /= np.sqrt(nu) + eps * np.sqrt(nu.mean())
    update = left @ ahead @ right.T
    updates.append(update * update_rms / np.sqrt(np.mean(update**2)))
  return np.stack(updates)


def run(tx, grads):
  """All updates of a transform and its states, in one program."""

  def step(state, grad):
    updates, state = tx.update(grad, state)
    return state, (updates, state)

  scan = lambda grads: jax.lax.scan(step, tx.init(grads[0]), grads)[1]
  return jax.jit(scan)(jnp.asarray(grads, jnp.float32))


def run_soap(grads, **settings):
  """All updates and the states of all bases."""
  updates, states = run(soap(**settings), grads)
  return updates, own_state(states)


def own_state(state):
  return state[1].inner_states["soap"].inner_state


@pytest.mark.parametrize(
  ("shape", "sides"),
  [
    ((5, 5), (True, True)),
    ((5, 6), (True, True)),
    ((9, 4), (False, True)),
    ((4, 9), (True, False)),
  ],
)
def test_equals_its_transcription(shape, sides):
  settings = {
    "b1": 0.8, "b2": 0.9, "eps": 0.05, "update_rms": 0.3, "every": 5
  }  # fmt: skip
  grads = gradients(27, shape)
  expected = transcription(grads, sides, **settings)
  found, _ = run_soap(grads, **settings)
  np.testing.assert_allclose(found, expected, atol=5e-4)


@pytest.mark.parametrize(("every", "late"), [(1, 7), (3, 3), (5, 1), (30, 0)])
def test_bases_turn_in_all_early_updates_then_every_few(every, late):
  _, state = run_soap(gradients(27, (4, 4)), every=every)
  for basis in (state.rows, state.columns):
    moves = np.abs(np.diff(basis.vectors, axis=0)).max((1, 2, 3)) > 0
    after = np.arange(2, 28)  # the number of the update behind each move
    np.testing.assert_array_equal(moves, (after <= 20) | (after % every == 0))
    assert moves[after > 20].sum() == late
    assert np.all(np.abs(np.diff(basis.covariance, axis=0)).max((1, 2, 3)) > 0)


def test_bases_stay_orthonormal():
  _, state = run_soap(gradients(27, (5, 6)), every=1)
  for basis in (state.rows, state.columns):
    last = np.asarray(basis.vectors[-1, 0], np.float64)
    np.testing.assert_allclose(last.T @ last, np.eye(len(last)), atol=1e-5)


def test_bases_become_eigenvectors_of_the_covariance():
  grads = np.broadcast_to(gradients(1, (4, 4)), (200, 4, 4))
  _, state = run_soap(grads, every=1)
  covariance = state.rows.covariance[-1, 0]
  vectors = state.rows.vectors[-1, 0]
  turned = np.abs(vectors.T @ covariance @ vectors)
  np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-4)


@pytest.mark.parametrize(
  ("shape", "max_side", "sides"),
  [
    ((8, 6), 8, (8, 6)),
    ((8, 6), 7, (None, 6)),
    ((6, 8), 7, (6, None)),
    ((8, 6), 5, (None, None)),
    ((8, 4), 8, (8, 4)),
    ((9, 4), 9, (None, 4)),  # more than twice as long
    ((4, 9), 9, (4, None)),
  ],
)
def test_long_sides_hold_no_basis(shape, max_side, sides):
  tx = soap(max_side=max_side)
  state = own_state(jax.eval_shape(tx.init, jnp.zeros(shape)))
  sizes = [
    None if basis is None else basis.vectors.shape
    for basis in (state.rows, state.columns)
  ]
  assert sizes == [None if n is None else (1, n, n) for n in sides]


def test_without_a_basis_it_is_adam_of_a_set_size():
  grads = gradients(6, (4, 4))
  found, _ = run_soap(grads, max_side=2, b1=0.0, eps=0.0)
  adam, _ = run(optax.scale_by_adam(b1=0.0, b2=0.95, eps=0.0), grads)
  size = jnp.sqrt(jnp.mean(adam**2, (1, 2), keepdims=True))
  np.testing.assert_allclose(found, 0.2 * adam / size, rtol=1e-4)


def test_no_large_gradient_stays_in_an_average():
  grads = gradients(4, (5, 5)).astype(np.float32)
  grads[1] *= np.float32(1.5e19)  # its square is finite, a sum of them is not
  updates, state = run_soap(grads)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
  assert np.all(np.abs(updates[-1]).max() > 0)


def test_mean_squares_have_range_enough_for_float16():
  # Squares of gradients of 0.0001 and 1000 are no float16.
  tx = soap()
  state, update = tx.init(jnp.zeros((4, 4), jnp.float16)), jax.jit(tx.update)
  grad = jnp.asarray(gradients(1, (4, 4))[0], jnp.float16)
  small, _ = update(jnp.float16(1e-4) * grad, state)
  large, _ = update(jnp.float16(1e3) * grad, state)
  assert small.dtype == large.dtype == jnp.float16
  np.testing.assert_allclose(
    np.float32(small), np.float32(large), atol=5e-3, rtol=0.0
  )


@pytest.mark.skipif(
  not soap_lib._STACKS_HANG, reason="this version of XLA does not hang"
)
def test_matrices_of_a_stack_are_factored_one_by_one_on_cpus():
  # Working on several at once, in several stacks, threads wait for each other
  # for ever. By chance: so only the cause is looked at.
  stack = jax.random.normal(jax.random.key(0), (8, 6, 6))
  text = jax.jit(soap_lib._orthogonal).lower(stack).as_text()
  calls = [line for line in text.splitlines() if "custom_call" in line]
  assert calls
  assert not any("8x6x6" in line for line in calls)
  np.testing.assert_array_equal(
    jax.jit(soap_lib._orthogonal)(stack), jnp.linalg.qr(stack)[0]
  )


def test_matrices_of_a_stack_are_factored_together_on_tpus():
  stack = jax.random.normal(jax.random.key(0), (8, 6, 6))
  traced = jax.jit(soap_lib._orthogonal).trace(stack)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "8x6x6" in "".join(
    line for line in text.splitlines() if "custom_call" in line
  )
