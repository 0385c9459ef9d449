"""Laws of the choice of blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import nn

TIME, BLOCK, SIZE = 40, 4, 16
BLOCKS = TIME // BLOCK


def normal(*shape, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def scores(q, k, projections):
  """The score of every block for every token, one at a time."""
  q, k, p = (np.asarray(x, np.float64) for x in (q, k, projections))
  hashed = lambda x: (
    (np.einsum("...h,rhb->...rb", x, p) > 0) @ (1 << np.arange(p.shape[-1]))
  )
  q_hash, k_hash = hashed(q), hashed(k)
  found = np.full((TIME, BLOCKS), np.finfo(np.float32).min)
  for t, g in np.ndindex(q.shape[:2]):
    for b, r in np.ndindex(BLOCKS, len(p)):
      keys = slice(b * BLOCK, (b + 1) * BLOCK)
      mine = k[keys][k_hash[keys, r] == q_hash[t, g, r]]
      if len(mine):
        found[t, b] = max(found[t, b], q[t, g] @ mine.mean(0))
  return found


@functools.cache
def chooser(window, num_remote, is_causal):
  choose = functools.partial(
    nn.choose_blocks, block_size=BLOCK, window=window, num_remote=num_remote,
    is_causal=is_causal,
  )  # fmt: skip
  return jax.jit(lambda q, k, **kwargs: choose(q, k, **kwargs))


@pytest.mark.parametrize(
  ("is_causal", "num_remote"),
  [
    (True, 3),
    pytest.param(False, 3, marks=pytest.mark.slow),
    pytest.param(True, 9, marks=pytest.mark.slow),  # By a partial sort.
  ],
)
def test_the_best_open_blocks_are_chosen_best_first(is_causal, num_remote):
  q, k = normal(1, TIME, 2, SIZE), normal(1, TIME, 1, SIZE, seed=1)
  projections = nn.hash_projections(jax.random.key(0), 2, SIZE, 2)
  run = chooser(8, num_remote, is_causal)
  ids = run(q, k, projections=projections)[0, :, 0]
  found = scores(q[0], k[0, :, 0], projections)
  for t, chosen in enumerate(np.asarray(ids)):
    behind = t // BLOCK - np.arange(BLOCKS)
    is_open = behind > 1 if is_causal else np.abs(behind) > 1
    best = sorted(np.flatnonzero(is_open), key=lambda b: (-found[t, b], b))
    best = (best + [-1] * num_remote)[:num_remote]
    np.testing.assert_array_equal(chosen, best)


@pytest.mark.parametrize("name", ["candidates", "choices"])
def test_no_token_after_it_has_a_say(name):
  q, k = normal(1, TIME, 1, SIZE), normal(1, TIME, 1, SIZE, seed=1)
  run, start = chooser(4, 2, True), 22
  before = run(q, k)[:, :start]
  other = 50 * normal(1, TIME, 1, SIZE, seed=2)[:, start:]
  q, k = (
    (q, k.at[:, start:].set(other))
    if name == "candidates"
    else (q.at[:, start:].set(other), k)
  )
  np.testing.assert_array_equal(run(q, k)[:, :start], before)


def test_a_single_needle_is_found_where_the_mean_drowns_it():
  """One key like the query, at cosine 0.9, among 64 others of its block."""
  time, block, needles = 2048, 64, 64
  rng = np.random.default_rng(0)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  k = unit(rng.normal(size=(time, 64)))
  place = rng.choice(time - 8 * block, needles, replace=False)
  asking = time - needles + np.arange(needles)
  noise = unit(rng.normal(size=(needles, 64)))
  noise = unit(noise - (noise * k[place]).sum(1, keepdims=True) * k[place])
  q = np.zeros((time, 64))
  q[asking] = 0.9 * k[place] + np.sqrt(1 - 0.81) * noise
  q, k = (jnp.asarray(x[None, :, None], jnp.float32) for x in (q, k))

  def hits(**choice):
    choose = jax.jit(
      functools.partial(nn.choose_blocks, num_remote=4, **choice)
    )
    ids = np.asarray(choose(q, k))[0, asking, 0]
    return np.mean((ids == (place // block)[:, None]).any(1))

  found = hits(num_hashes=4, hash_bits=3)
  assert found >= 0.8
  assert found > hits(selection="mean") + 0.2


def test_blocks_without_a_token_of_the_segment_are_closed():
  q, k = normal(1, TIME, 1, SIZE), normal(1, TIME, 1, SIZE, seed=1)
  segments = np.repeat([0, 1, 2, -1], [10, 14, 12, 4])[None]
  run = chooser(4, 3, False)
  ids = np.asarray(run(q, k, segment_ids=jnp.asarray(segments)))[0, :, 0]
  for t, chosen in enumerate(ids):
    for b in chosen[chosen >= 0]:
      there = segments[0, b * BLOCK : (b + 1) * BLOCK]
      assert segments[0, t] in there
  assert (ids[segments[0] < 0] == -1).all()


@pytest.mark.parametrize("numbers", [(0, 1, 2), (7, 3, 5)], ids=str)
def test_what_a_document_chooses_does_not_hang_on_another(numbers):
  q, k = normal(1, TIME, 1, SIZE), normal(1, TIME, 1, SIZE, seed=1)
  # No edge of a block, one within which a whole document lies, and a hole.
  segments = np.repeat(numbers, [9, 2, 29])
  segments[14] = -1
  ids = jnp.asarray(segments)[None]
  run = chooser(4, 2, True)
  before = np.asarray(run(q, k, segment_ids=ids))
  for number in numbers:
    mine = segments == number
    other = jnp.where(mine[None, :, None, None], k, 9 * k[:, ::-1])
    after = np.asarray(run(q, other, segment_ids=ids))
    np.testing.assert_array_equal(after[:, mine], before[:, mine])
  # The rest of the block where a document begins is still found.
  assert (before[0, 20:] == 9 // BLOCK).any()


def test_nothing_is_chosen_without_a_choice():
  q = normal(1, 8, 1, SIZE)
  assert nn.choose_blocks(q, q, num_remote=0).shape == (1, 8, 1, 0)
  assert nn.choose_blocks(q, q, selection="none").shape == (1, 8, 1, 0)
