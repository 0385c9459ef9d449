"""Laws of decoding: token by token is all at once."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import nn

BATCH, TIME, FEATURES = 2, 27, 12  # Seven blocks of 4, the last not full.
ROOM = 32
BASE = dict(num_heads=2, head_dim=6, block_size=4, window=8, num_remote=2,
            hash_bits=2)  # fmt: skip
CASES = {
  "groups": BASE | dict(num_heads=4, num_kv_heads=2),
  "more blocks than there are": BASE | dict(num_remote=40, rotary=False),
  "mean, one block": BASE | dict(selection="mean", window=4, num_remote=1),
  "window alone, learned": BASE | dict(selection="none", learn_window=True),
  "annealed": BASE | dict(
    schedule=((0, None), (2, 1)), num_heads=2, num_kv_heads=1,
    learn_window=True, ramp=3,
  ),
}  # fmt: skip
FAST = ("groups",)
cases = pytest.mark.parametrize(
  "case",
  [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in CASES
  ],
)


@functools.cache
def layer(case: str, **changes) -> nn.DynamicAttention:
  arguments = CASES.get(case, BASE) | changes
  module = nn.DynamicAttention(FEATURES, **arguments, rngs=nnx.Rngs(0))
  if module.learned_window is not None:
    heads = jnp.arange(arguments["num_heads"])
    module.learned_window.span[...] = 0.3 + 0.3 * heads
    module.learned_window.offset[...] = 0.2 * heads
  module.eval()
  return module


def normal(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def new_cache(case, dtype=None):
  return layer(case).init_cache(BATCH, ROOM, dtype)


@functools.cache
def jitted(case: str):
  """The methods of a layer, compiled once for all tests."""
  module = layer(case)
  call = jax.jit(lambda tokens: module(tokens))
  prefill = jax.jit(lambda tokens, cache: module.prefill(tokens, cache))
  return call, prefill, jax.jit(module.decode, donate_argnums=1)


def decode_all(case, tokens, cache):
  step, outputs = jitted(case)[2], []
  for t in range(tokens.shape[1]):
    y, cache = step(tokens[:, t : t + 1], cache)
    outputs.append(y)
  return jnp.concatenate(outputs, axis=1), cache


@cases
def test_decoded_tokens_equal_the_whole_pass(case):
  tokens = normal(BATCH, TIME, FEATURES)
  call, prefill, _ = jitted(case)
  expected = call(tokens)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)

  from_nothing, cache = decode_all(case, tokens, new_cache(case))
  close(from_nothing, expected)
  assert int(cache.length) == TIME

  begin = 10  # Within a block.
  found, cache = prefill(tokens[:, :begin], new_cache(case))
  close(found, expected[:, :begin])
  found, cache = decode_all(case, tokens[:, begin:], cache)
  close(found, expected[:, begin:])


@pytest.mark.parametrize(
  ("num_remote", "bits", "heads"),
  [
    (2, 2, (4, 2)),
    pytest.param(1, 0, (2, 2), marks=pytest.mark.slow),
    pytest.param(20, 3, (3, 1), marks=pytest.mark.slow),
  ],
)
def test_chosen_blocks_are_those_of_choose_blocks(num_remote, bits, heads):
  num_heads, kv_heads = heads
  q = normal(BATCH, 45, num_heads, 8)
  k = normal(BATCH, 45, kv_heads, 8, seed=1)
  projections = nn.hash_projections(jax.random.key(0), 3, 8, bits)
  sizes = {"window": 8, "num_remote": num_remote}
  choose = functools.partial(
    nn.choose_blocks, block_size=4, projections=projections, **sizes
  )
  expected = jax.jit(choose)(q, k)
  cache = nn.empty_cache(BATCH, 45, kv_heads, projections, block_size=4)

  def step(cache, token):
    q, k = token
    cache = nn.append_token(cache, k[:, None], k[:, None], projections)
    ids = nn.choose_cached_blocks(q, cache, projections, **sizes)
    return cache, ids

  by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (q, k))
  cache, ids = jax.jit(lambda *args: jax.lax.scan(step, *args))(cache, by_time)
  np.testing.assert_array_equal(jnp.swapaxes(ids, 0, 1), expected)
  assert np.any(np.asarray(expected) >= 0)

  # The sums that grew token by token are those of all keys at once.
  whole = nn.fill_cache(cache, k, k, projections)
  for grown, at_once in zip(cache, whole, strict=True):
    np.testing.assert_allclose(grown, at_once, atol=1e-5)


def test_a_bfloat16_cache_is_near_and_half_as_large():
  tokens = normal(BATCH, TIME, FEATURES)
  cache = new_cache("groups", jnp.bfloat16)
  assert cache.k.dtype == jnp.bfloat16
  found, cache = decode_all("groups", tokens, cache)
  assert found.dtype == jnp.float32
  assert cache.v.dtype == jnp.bfloat16
  expected = jitted("groups")[0](tokens)
  np.testing.assert_allclose(found, expected, atol=2e-2)


def test_a_donated_cache_is_reused_and_nothing_is_compiled_again():
  tokens, step = normal(BATCH, 6, FEATURES), jitted("groups")[2]
  cache = new_cache("groups")
  for t in range(6):
    before, pointer = cache, cache.k.unsafe_buffer_pointer()
    _, cache = step(tokens[:, t : t + 1], cache)
    assert before.k.is_deleted()
    assert cache.k.unsafe_buffer_pointer() == pointer
    compiled = step._cache_size() if t == 0 else compiled
  assert step._cache_size() == compiled


def test_the_cost_of_a_token_hardly_grows_with_the_room():
  module, token = layer("groups"), normal(1, 1, FEATURES)
  costs = []
  for length in (256, 4096):
    cache = jax.eval_shape(lambda n=length: module.init_cache(1, n))
    step = jax.jit(module.decode, donate_argnums=1).lower(token, cache)
    costs.append(step.compile().cost_analysis()["flops"])
  full = (
    2 * 2 * (4096 - 256) * 4 * 6
  )  # Products of q, k and v by full attention
  assert costs[1] - costs[0] < full


def test_a_full_cache_is_refused_or_answers_nan():
  module, token = layer("groups"), normal(1, 1, FEATURES)
  cache = module.init_cache(1, 3)  # Room for a block of 4.
  full = cache._replace(length=jnp.array(4, jnp.int32))
  with pytest.raises(ValueError, match=r"^cache must have room for 1 more"):
    module.decode(token, full)
  step = jax.jit(module.decode)
  assert np.isnan(step(token, full)[0]).all()
  assert np.isfinite(step(token, cache)[0]).all()
  with pytest.raises(ValueError, match=r"^cache must have room for 5 more"):
    module.prefill(normal(1, 5, FEATURES), cache)
  with pytest.raises(ValueError, match=r"^cache must have as many rows"):
    module.decode(normal(2, 1, FEATURES), cache)


def test_what_sees_its_future_cannot_be_decoded():
  module = layer("groups", is_causal=False)
  with pytest.raises(ValueError, match="is_causal=True"):
    module.init_cache(1, 8)


def test_tokens_are_decoded_one_by_one(monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  module = layer("groups")
  with pytest.raises(ValueError, match=r"^token must be one of every row"):
    module.decode(normal(1, 2, FEATURES), module.init_cache(1, 8))


@pytest.mark.parametrize("name", ["batch", "max_length"])
def test_sizes_of_a_cache_are_checked(name, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  sizes = {"batch": 1, "max_length": 8} | {name: 0}
  with pytest.raises(ValueError, match=f"^{name} must be"):
    layer("groups").init_cache(**sizes)
