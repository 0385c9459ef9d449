"""Search region by region: what it may choose, and what it finds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import nn
from deepseek_jax.nn.long_selection import region_blocks

BLOCK, WINDOW, SIZE = 8, 16, 16
TIME = 1024


@functools.partial(jax.jit, static_argnames=("is_causal", "num_remote"))
def choose(q, k, segment_ids=None, *, is_causal=True, num_remote=3):
  return nn.choose_blocks(
    q, k, block_size=BLOCK, window=WINDOW, num_remote=num_remote,
    is_causal=is_causal, segment_ids=segment_ids, two_level=True,
  )  # fmt: skip


def draw(time=TIME, heads=2, kv_heads=1, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  q = jax.random.normal(keys[0], (1, time, heads, SIZE))
  return q, jax.random.normal(keys[1], (1, time, kv_heads, SIZE))


@pytest.mark.parametrize(
  ("is_causal", "time"), [(True, TIME - 37), (False, TIME)]
)
def test_choices_are_distinct_open_and_as_many_as_there_are(is_causal, time):
  ids = np.asarray(choose(*draw(time), is_causal=is_causal))[0, :, 0]
  own = np.arange(time)[:, None] // BLOCK
  behind = own - ids
  reach = WINDOW // BLOCK - 1
  fine = behind > reach if is_causal else abs(behind) > reach
  assert np.all(fine | (ids == -1))
  assert np.all(ids <= (time - 1) // BLOCK)
  ordered = np.sort(ids, 1)
  assert np.all((np.diff(ordered, axis=1) > 0) | (ordered[:, 1:] == -1))
  # Whoever could choose among the blocks beside its region has all choices.
  if is_causal:
    assert np.all(
      (ids >= 0).sum(1)
      >= np.minimum(own[:, 0] - reach, 3) * (own[:, 0] > reach)
    )


def test_what_comes_after_a_token_has_no_say():
  q, k = draw()
  ids = choose(q, k)
  for cut in (300, 513, 1000):
    other_q, other_k = draw(seed=1)
    mixed = choose(
      q.at[:, cut:].set(other_q[:, cut:]), k.at[:, cut:].set(other_k[:, cut:])
    )
    np.testing.assert_array_equal(mixed[:, :cut], ids[:, :cut])
    assert np.any(np.asarray(mixed[:, cut:] != ids[:, cut:]))


def needles(time, count, cosine, size=64, seed=0):
  """Returns queries, keys, and which token looks for which key."""
  rng = np.random.default_rng(seed)
  q, k = rng.normal(size=(2, 1, time, 1, size)).astype(np.float32)
  seekers = rng.choice(np.arange(time // 2, time), count, replace=False)
  hidden = np.array([rng.integers(0, t - 2 * WINDOW) for t in seekers])
  key = k[0, hidden, 0]
  key = key / np.linalg.norm(key, axis=1, keepdims=True)
  other = rng.normal(size=key.shape)
  other -= (other * key).sum(1, keepdims=True) * key
  other /= np.linalg.norm(other, axis=1, keepdims=True)
  q[0, seekers, 0] = 8 * (cosine * key + np.sqrt(1 - cosine**2) * other)
  return jnp.asarray(q), jnp.asarray(k), seekers, hidden


@pytest.mark.slow
def test_it_finds_more_needles_than_scoring_every_block():
  q, k, seekers, hidden = needles(4096, 400, cosine=0.9)
  found = {}
  for two_level in (True, False):
    ids = nn.choose_blocks(
      q, k, block_size=BLOCK, window=WINDOW, num_remote=4, two_level=two_level
    )
    right = np.asarray(ids)[0, seekers, 0] == (hidden // BLOCK)[:, None]
    found[two_level] = right.any(1).mean()
  assert found[True] >= 0.8, found
  assert found[True] > found[False], found


def test_far_choices_stay_in_the_segment():
  q, k = draw()
  segments = jnp.where(jnp.arange(TIME) < TIME // 2, 0, 1)[None]
  ids = np.asarray(choose(q, k, segments))[0, :, 0]
  half = TIME // 2 // BLOCK
  chosen = ids[TIME // 2 :]
  assert np.all((chosen >= half) | (chosen == -1))
  assert np.any(chosen >= half)


@pytest.mark.parametrize("numbers", [(0, 1), (5, 2)], ids=str)
def test_what_a_document_chooses_does_not_hang_on_another(numbers):
  q, k = draw()
  begin = TIME // 2 + 3  # Within a block and a region.
  mine = jnp.arange(TIME) >= begin
  segments = jnp.where(mine, numbers[1], numbers[0])[None]
  other = jnp.where(mine[None, :, None, None], k, 9 * k[:, ::-1])
  before, after = choose(q, k, segments), choose(q, other, segments)
  np.testing.assert_array_equal(after[:, begin:], before[:, begin:])


def test_keys_of_padding_are_never_found():
  q, k = draw()
  segments = jnp.where(jnp.arange(TIME) < TIME // 2, -1, 0)[None]
  ids = np.asarray(choose(q, k, segments))[0, TIME // 2 :, 0]
  assert np.all((ids >= TIME // 2 // BLOCK) | (ids == -1))


def test_a_region_is_longer_than_the_window():
  assert region_blocks(64, 3) == 8
  assert region_blocks(512, 3) == 32
  assert region_blocks(16, 7) == 8
  assert region_blocks(4, 1) == 2
