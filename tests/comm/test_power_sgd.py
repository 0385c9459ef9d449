"""Low rank against its rule in NumPy."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from exchanges import (
  PLACEMENTS,
  STEPS,
  Run,
  assert_equal,
  gradients,
  joined,
  mean,
  params,
  prepared,
)

from deepseek_jax import comm
from deepseek_jax.comm.power_sgd import orthogonal

AT = PLACEMENTS["data"]


def transcription(matrices, factor):
  """Means of [steps, devices, rows, columns] by power iteration."""
  errors, found = np.zeros(matrices.shape[1:]), []
  for grad in matrices.astype(np.float64):
    wanted = grad + errors
    basis = np.linalg.qr((wanted @ factor).mean(0))[0]
    factor = (np.swapaxes(wanted, 1, 2) @ basis).mean(0)
    found.append(basis @ factor.T)
    errors = wanted - found[-1]
    # A basis of QR has signs of its own, of which products know nothing.
  return np.stack(found)


def test_equals_its_transcription():
  run, grads = prepared("power_sgd", "data"), gradients(4)
  updates = joined(AT, run(grads)[0])
  places = {"first": ("12x8", 0), "second": ("12x8", 1), "whole": ("5x7", 0)}
  for name, (stack, i) in places.items():
    shape = tuple(map(int, stack.split("x")))
    expected = transcription(
      grads[name].reshape(STEPS, 4, *shape),
      np.asarray(run.start.errors.arrays["factors"][stack][0, i], np.float64),
    )
    size = np.abs(grads[name]).max()
    np.testing.assert_allclose(
      updates[name].reshape(expected.shape), expected, rtol=0, atol=1e-4 * size
    )


def test_every_place_gets_the_same_mean():
  grads = gradients(4)
  places = ("data", "fsdp", "both")
  found = [
    joined(PLACEMENTS[x], prepared("power_sgd", x)(grads)[0]) for x in places
  ]
  for other in found[1:]:
    for name, x in found[0].items():
      size = np.abs(x).max()
      np.testing.assert_allclose(other[name], x, rtol=0, atol=1e-4 * size)


SHAPES = {"tall": (9, 4), "wide": (4, 9), "cube": (3, 3, 4)}


@functools.cache
def full_rank():
  tx = comm.power_sgd("data", rank=4, min_size=0)
  return Run(tx, AT, params(SHAPES))


def test_the_full_rank_is_the_mean():
  grads = gradients(4, shapes=SHAPES)
  updates, state = full_rank()(grads)
  updates = joined(AT, updates)
  for name, exact in mean(grads).items():
    size = np.abs(exact).max()
    np.testing.assert_allclose(updates[name], exact, rtol=0, atol=1e-5 * size)
  # Devices keep how they differ from the mean; of the mean nothing is kept.
  for errors in state.errors.arrays["left"].values():
    assert np.abs(np.asarray(errors).mean(0)).max() < 1e-4


def test_zeros_at_the_start_do_not_stop_it():
  grads = gradients(4, shapes=SHAPES)
  zeros = {name: np.zeros_like(x) for name, x in grads.items()}
  updates, state = full_rank()(zeros)
  assert_equal(updates, zeros)
  assert_equal(
    state.errors.arrays["factors"],
    full_rank().start.errors.arrays["factors"],
  )
  updates = joined(AT, full_rank()(grads, state)[0])
  exact = mean(grads)["tall"]
  np.testing.assert_allclose(updates["tall"], exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_columns_become_orthonormal(scale):
  x = np.random.default_rng(0).normal(size=(3, 10, 4))
  x[1, :, 2] = x[1, :, 0] - 2 * x[1, :, 1]  # Depends on those before.
  x[2, :, 1] = 0
  basis = np.asarray(orthogonal(jnp.asarray(scale * x, jnp.float32)))
  gram = np.swapaxes(basis, 1, 2) @ basis
  expected = np.stack([np.eye(4)] * 3)
  expected[1, 2, 2] = expected[2, 1, 1] = 0
  np.testing.assert_allclose(gram, expected, atol=1e-6)
  projected = basis @ (np.swapaxes(basis, 1, 2) @ x)
  np.testing.assert_allclose(projected, x, atol=1e-4)
