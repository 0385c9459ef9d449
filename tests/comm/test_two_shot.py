"""Blockwise exchanges against their rule in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchanges import (
  PLACEMENTS,
  SMALL,
  STEPS,
  Run,
  gradients,
  joined,
  mean,
  params,
  prepared,
)

from deepseek_jax import comm

BLOCK, DEVICES = 16, 4
AT = PLACEMENTS["data"]


def rounded(levels):
  def send(x, mask):
    unit = np.abs(x).max(-1, keepdims=True) / levels
    unit = np.where(unit == 0, 1, unit)
    return np.round(x / unit) * unit

  return send


def halved(x, mask):
  return x.astype(jnp.bfloat16).astype(np.float64)


def signs(x, mask):
  x = np.where(mask, x, 0)
  count = np.maximum(mask.sum(-1, keepdims=True), 1)
  scale = np.abs(x).sum(-1, keepdims=True) / count
  return np.where(mask, np.where(x < 0, -scale, scale), 0)


def largest(kept):
  def send(x, mask):
    least = np.sort(np.abs(x), -1)[..., -kept, None]
    return np.where(np.abs(x) >= least, x, 0)

  return send


@dataclasses.dataclass(frozen=True)
class Rule:
  """How blocks go to the device that sums, and back."""

  first: object
  second: object
  block: int = BLOCK
  warmup: int = 0
  refresh: int = 1


RULES = {
  "bf16": Rule(halved, halved, block=128),
  "int8": Rule(rounded(127), rounded(127)),
  "int4": Rule(rounded(7), rounded(7)),
  "one_bit": Rule(signs, signs, warmup=1, refresh=2),
  "top_k": Rule(largest(4), largest(16), warmup=1),
}


def transcription(rule, grads):
  """Updates of a leaf, [steps, ...], and the errors of workers at the end."""
  steps, devices, *shape = grads.shape
  size = int(np.prod(shape))
  chunk = -(-size // (devices * rule.block)) * rule.block
  flat = grads.reshape(steps, devices, size).astype(np.float64)
  flat = np.pad(flat, ((0, 0), (0, 0), (0, devices * chunk - size)))
  flat = flat.reshape(steps, devices, -1, rule.block)
  worker, server = np.zeros(flat.shape[1:]), np.zeros(flat.shape[2:])
  seen, found = np.zeros(flat.shape[2:], bool), []
  for step, grad in enumerate(flat):
    if step < rule.warmup:
      found.append(grad.mean(0))
      continue
    wanted = grad + worker
    if (step - rule.warmup) % rule.refresh == 0:
      seen = seen | (wanted != 0).any(0)
    sent = rule.first(wanted, np.broadcast_to(seen, wanted.shape))
    worker, total = wanted - sent, sent.mean(0) + server
    found.append(rule.second(total, seen))
    server = total - found[-1]
  found = np.stack(found).reshape(steps, -1)[:, :size]
  return found.reshape(steps, *shape), worker


@pytest.mark.parametrize("method", RULES)
def test_equals_its_transcription(method):
  grads = gradients(DEVICES)
  grads["first"][:, :, 4] = 0
  updates, state = prepared(method, "data")(grads)
  updates = joined(AT, updates)
  for name in ("conv", "first", "whole"):
    expected, errors = transcription(RULES[method], grads[name])
    size = np.abs(grads[name]).max()
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * size}
    np.testing.assert_allclose(updates[name], expected, **tolerance)
    worker = np.asarray(state.errors.arrays["left"][name].worker)
    worker = worker.reshape(errors.shape)
    np.testing.assert_allclose(worker, errors, **tolerance)


@pytest.mark.parametrize("method", ["one_bit", "top_k"])
@pytest.mark.parametrize("place", ["data", "fsdp"])
def test_exchanges_at_the_start_are_exact(method, place):
  at = PLACEMENTS[place]
  grads = gradients(DEVICES)
  updates = joined(at, prepared(method, place)(grads)[0])
  for name, exact in mean(grads).items():
    size = np.abs(grads[name]).max()
    np.testing.assert_allclose(updates[name][0], exact[0], atol=1e-6 * size)
    if exact[0].size >= SMALL["min_size"]:
      assert np.abs(updates[name][1] - exact[1]).max() > 1e-3 * size


def test_a_sign_that_comes_between_two_looks_is_sent_at_the_next():
  # One bit looks for zeros at the steps 1 and 3 of this run.
  grads = gradients(DEVICES)
  place = (3, 2)
  grads["first"][:, :, *place] = 0
  grads["first"][2, 0, *place] = 1.0
  updates = joined(AT, prepared("one_bit", "data")(grads)[0])
  seen = updates["first"][:, *place] != 0
  assert seen.tolist() == [False, False, False, True]


@functools.cache
def run_of(make, **arguments):
  return Run(make("data", **SMALL | arguments), AT, params())


def test_all_of_the_largest_are_the_mean():
  run = run_of(comm.top_k, fraction=1, block=8)
  grads = gradients(DEVICES)
  updates, state = run(grads)
  updates = joined(AT, updates)
  for name, exact in mean(grads).items():
    np.testing.assert_allclose(updates[name], exact, rtol=1e-5, atol=2e-6)
  errors = jax.tree.leaves(state.errors.arrays["left"])
  assert max(np.abs(x).max() for x in errors) < 1e-6


def test_without_error_feedback_nothing_is_remembered():
  run = run_of(comm.int_all_reduce, bits=4, error_feedback=False)
  grads = gradients(DEVICES)
  grads = {name: np.repeat(x[:1], STEPS, 0) for name, x in grads.items()}
  updates, state = run(grads)
  assert not jax.tree.leaves(state.errors)
  for update in joined(AT, updates).values():
    assert (update == update[:1]).all()


def test_what_is_exempt_is_averaged_exactly():
  run = run_of(comm.int_all_reduce, bits=4, exempt=("fir.*", "whole"))
  grads = gradients(DEVICES)
  updates, state = run(grads)
  assert set(state.errors.arrays["left"]) == {"conv", "second"}
  updates = joined(AT, updates)
  for name in ("first", "whole"):
    exact = mean(grads)[name]
    np.testing.assert_allclose(updates[name], exact, rtol=1e-5, atol=1e-5)


def test_the_same_parameters_are_compressed_wherever_they_lie():
  chosen = lambda place: set(
    prepared("int8", place).start.errors.arrays["left"]
  )
  assert chosen("data") == chosen("fsdp") == chosen("both")
  # Of the fewest elements a part has 10, less than `min_size`.
  run = Run(
    comm.int_all_reduce("fsdp", min_size=48, specs=PLACEMENTS["fsdp"].specs),
    PLACEMENTS["fsdp"],
    params(),
  )
  expected = {"conv", "first", "second"}
  assert set(run.start.errors.arrays["left"]) == expected


def test_the_relative_error_is_what_is_left():
  grads = gradients(DEVICES)
  _, state = prepared("int8", "data")(grads)
  assert 0.0005 < state.relative_error < 0.01
  _, rough = prepared("int4", "data")(grads)
  assert 0.02 < rough.relative_error < 0.2
