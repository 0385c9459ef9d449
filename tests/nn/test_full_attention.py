"""Laws of full attention: what JAX computes, in stripes or by blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.nn.full_attention import full_attention

BATCH, HEADS, SIZE = 2, 4, 6
slow = pytest.mark.slow


def draw(time, dtype=jnp.float32, kv_heads=2):
  """Queries, keys, values and the weights of all outputs in a loss."""
  rng = np.random.default_rng(time)
  heads = (HEADS, kv_heads, kv_heads, HEADS)
  return [
    jnp.asarray(rng.normal(size=(BATCH, time, n, SIZE)), dtype) for n in heads
  ]


def draw_segments(time):
  """Three documents a row, and padding: behind them, or in the midst."""
  rng = np.random.default_rng(time)
  numbers = np.sort(rng.integers(0, 3, (BATCH, time)), axis=1)
  numbers[0, time - time // 4 :] = -1
  if time > 8:
    numbers[1, 3:5] = -2
  return jnp.asarray(numbers, jnp.int32)


def ours(q, k, v, segment_ids, **options):
  options = {"block_size": 32, "window": 32, "is_causal": True} | options
  return full_attention(q, k, v, segment_ids=segment_ids, **options)


def theirs(q, k, v, segment_ids, is_causal=True):
  mask = None
  if segment_ids is not None:
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
  y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)
  if segment_ids is None:
    return y
  return jnp.where((segment_ids >= 0)[..., None, None], y, 0)


@functools.cache
def with_grads(attend):
  """Returns the output and the gradients of a loss that weighs all of it."""

  @jax.jit
  def run(q, k, v, weights, segment_ids):
    def loss(q, k, v):
      y = attend(q, k, v, segment_ids)
      return (y * weights).astype(jnp.float32).sum(), y

    (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
      q, k, v
    )
    return y, *grads

  return run


def assert_agree(first, second, atol=2e-5):
  for a, b in zip(first, second, strict=True):
    np.testing.assert_allclose(np.float32(a), np.float32(b), atol=atol)


# Stripes of 128 rows: less than one, one, and those whose last is not whole.
@pytest.mark.parametrize("segmented", [False, True], ids=["alone", "packed"])
@pytest.mark.parametrize(
  "time",
  [1, 129, *(pytest.param(t, marks=slow) for t in (2, 127, 128, 256, 300))],
)
def test_stripes_give_what_jax_does(time, segmented):
  arrays = draw(time)
  segments = draw_segments(time) if segmented else None
  found = with_grads(ours)(*arrays, segments)
  assert_agree(found, with_grads(theirs)(*arrays, segments))


def test_padding_reads_nothing_and_gets_no_gradient():
  time = 129
  arrays, segments = draw(time), draw_segments(time)
  blind = np.asarray(segments) < 0
  for part in with_grads(ours)(*arrays, segments):
    part = np.asarray(part)
    assert np.isfinite(part).all()
    assert not part[blind].any()
    assert part[~blind].any()


def test_the_future_and_other_documents_change_no_bit():
  time, start = 129, 77
  q, k, v, _ = draw(time)
  segments = draw_segments(time)
  run = jax.jit(ours)
  before = np.asarray(run(q, k, v, segments))
  later = [x.at[:, start:].multiply(-50) for x in (q, k, v)]
  np.testing.assert_array_equal(
    run(*later, segments)[:, :start], before[:, :start]
  )
  mine = np.asarray(segments == 1)
  others = [
    jnp.where(mine[..., None, None], x, 50 * x[::-1]) for x in (q, k, v)
  ]
  np.testing.assert_array_equal(
    np.asarray(run(*others, segments))[mine], before[mine]
  )


@pytest.mark.parametrize("peak", [1e3, -1e3])
def test_large_logits_stay_finite(peak):
  q, k, v, weights = draw(129)
  parts = with_grads(ours)(q * peak, k, v, weights, None)
  assert all(np.isfinite(part).all() for part in parts)
  expected = with_grads(theirs)(q * peak, k, v, weights, None)
  assert_agree(parts[:1], expected[:1], atol=1e-3)


def test_bfloat16_is_near():
  arrays = draw(129, jnp.bfloat16)
  segments = draw_segments(129)
  found = with_grads(ours)(*arrays, segments)
  assert {part.dtype for part in found} == {jnp.dtype(jnp.bfloat16)}
  wide = [x.astype(jnp.float32) for x in arrays]
  expected = with_grads(theirs)(*wide, segments)
  assert_agree(found[:1], expected[:1], atol=2e-2)
  assert_agree(found[1:], expected[1:], atol=8e-2)


@pytest.mark.parametrize("kv_heads", [4, pytest.param(1, marks=slow)])
def test_heads_may_have_keys_of_their_own_or_share_one(kv_heads):
  arrays = draw(20, kv_heads=kv_heads)
  expected = with_grads(theirs)(*arrays, None)
  assert_agree(with_grads(ours)(*arrays, None), expected)


@slow
@pytest.mark.parametrize(
  "is_causal", [True, False], ids=["causal", "both ways"]
)
@pytest.mark.parametrize("segmented", [False, True], ids=["alone", "packed"])
def test_blocks_give_what_stripes_do(is_causal, segmented):
  time = 150
  arrays = draw(time)
  segments = draw_segments(time) if segmented else None
  blocks = functools.partial(ours, implementation="xla", is_causal=is_causal)
  plain = functools.partial(theirs, is_causal=is_causal)
  expected = with_grads(plain)(*arrays, segments)
  assert_agree(with_grads(blocks)(*arrays, segments), expected)


@slow
@pytest.mark.parametrize("time", [1024, 1025])
def test_both_sides_of_the_longest_stripes_agree(time):
  arrays, segments = draw(time), draw_segments(time)
  expected = with_grads(theirs)(*arrays, segments)
  assert_agree(with_grads(ours)(*arrays, segments), expected, atol=5e-5)
  by_blocks = functools.partial(ours, implementation="xla")
  assert_agree(with_grads(by_blocks)(*arrays, segments), expected, atol=5e-5)


@slow
def test_vmap_is_a_loop():
  one, two = draw(130)[:3], [x[::-1] for x in draw(130)[:3]]
  run = jax.jit(lambda *x: ours(*x, None))
  both = jax.jit(jax.vmap(lambda *x: ours(*x, None)))(
    *(jnp.stack(pair) for pair in zip(one, two, strict=True))
  )
  for found, arrays in zip(both, (one, two), strict=True):
    np.testing.assert_allclose(found, run(*arrays), atol=1e-5)
