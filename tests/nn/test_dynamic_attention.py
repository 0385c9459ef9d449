"""Laws of dynamic attention: what is chosen is read, and nothing else."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax import nn
from deepseek_jax.kernels.block_sparse_attention.reference import reference

slow = pytest.mark.slow


class Problem(NamedTuple):
  """The static part: one compilation each."""

  time: int = 22
  block: int = 4
  window: int = 2  # Blocks.
  num_remote: int = 2
  heads: int = 2
  kv_heads: int = 2
  is_causal: bool = True
  segments: bool = False
  edges: bool = False
  selection: str = "lsh"
  num_hashes: int = 3
  hash_bits: int = 2

  @property
  def sizes(self) -> dict[str, Any]:
    return {
      "block_size": self.block,
      "window": self.block * self.window,
      "is_causal": self.is_causal,
    }

  @property
  def choice(self) -> dict[str, Any]:
    names = ("num_remote", "selection", "num_hashes", "hash_bits")
    return {name: getattr(self, name) for name in names}


PROBLEMS = {
  "causal groups": Problem(heads=4),
  "both ways, everything": Problem(
    time=21, heads=2, kv_heads=1, is_causal=False, segments=True, edges=True
  ),
  "mean": Problem(selection="mean", segments=True),
  "none": Problem(selection="none", edges=True),
  "more than there are": Problem(num_remote=12, hash_bits=0, segments=True),
  "less than a block": Problem(time=3),
}
FAST = ("causal groups", "both ways, everything")
problems = pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=() if name in FAST else slow) for name in PROBLEMS],
)
BATCH, SIZE = 2, 8


def draw(problem: Problem, seed: int) -> dict[str, jax.Array]:
  rng = np.random.default_rng(seed)
  rows = (BATCH, problem.time)
  normal = lambda heads: jnp.asarray(
    rng.normal(size=(*rows, heads, SIZE)), jnp.float32
  )
  arrays = {
    "q": normal(problem.heads),
    "k": normal(problem.kv_heads),
    "v": normal(problem.kv_heads),
  }
  if problem.segments:
    segments = np.sort(rng.integers(-1, 3, rows), axis=1)
    arrays["segment_ids"] = jnp.asarray(segments, jnp.int32)
  if problem.edges:
    edge = lambda: jnp.asarray(
      rng.uniform(0, 8, (*rows, problem.heads)), jnp.float32
    )
    arrays |= {"span": edge(), "offset": edge()}
  return arrays


def ours(problem: Problem, arrays):
  return nn.dynamic_attention(**arrays, **problem.sizes, **problem.choice)


def chosen(problem: Problem, arrays):
  arrays = {k: arrays[k] for k in ("q", "k", "segment_ids") if k in arrays}
  return nn.choose_blocks(**arrays, **problem.sizes, **problem.choice)


def theirs(problem: Problem, arrays):
  ids = chosen(problem, arrays)
  return reference(**arrays, block_ids=ids, **problem.sizes)


@functools.cache
def value_and_grads(function, problem: Problem):
  def run(arrays, cotangent):
    floats = {k: v for k, v in arrays.items() if v.dtype != jnp.int32}
    rest = {k: v for k, v in arrays.items() if k not in floats}
    out, pull = jax.vjp(lambda x: function(problem, x | rest), floats)
    return out, pull(cotangent)[0]

  return jax.jit(run)


def check(problem: Problem, seed: int):
  arrays, cotangent = draw(problem, seed), draw(problem, seed + 1)["q"]
  out, grads = value_and_grads(ours, problem)(arrays, cotangent)
  true_out, true_grads = value_and_grads(theirs, problem)(arrays, cotangent)
  np.testing.assert_allclose(out, true_out, atol=2e-6, rtol=2e-6)
  for name, grad in grads.items():
    true = np.asarray(true_grads[name])
    scale = max(1.0, np.abs(true).max())
    np.testing.assert_allclose(grad, true, atol=1e-5 * scale, err_msg=name)
  if "segment_ids" in arrays:
    blind = np.asarray(arrays["segment_ids"]) < 0
    assert not np.asarray(out)[blind].any()
    assert not np.asarray(grads["q"])[blind].any()


@problems
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20))
def test_it_equals_the_reference_with_its_choice(name, seed):
  check(PROBLEMS[name], seed)


@slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
  problem=st.builds(
    Problem,
    time=st.integers(1, 40),
    block=st.integers(1, 9),
    window=st.integers(1, 3),
    num_remote=st.integers(0, 10),
    heads=st.sampled_from([2, 4]),
    kv_heads=st.sampled_from([1, 2]),
    is_causal=st.booleans(),
    segments=st.booleans(),
    edges=st.booleans(),
    selection=st.sampled_from(["lsh", "mean", "none"]),
    num_hashes=st.integers(1, 4),
    hash_bits=st.integers(0, 3),
  ),
  seed=st.integers(0, 2**20),
)
def test_it_equals_the_reference_whatever_the_shape(problem, seed):
  check(problem, seed)


@pytest.mark.parametrize("is_causal", [True, pytest.param(False, marks=slow)])
def test_a_full_budget_is_full_attention(is_causal):
  problem = Problem(num_remote=50, heads=4, is_causal=is_causal)
  arrays = draw(problem, 0)
  out, grads = value_and_grads(ours, problem)(arrays, arrays["q"])

  @jax.jit
  def full(q, k, v):
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    out, pull = jax.vjp(dense, q, k, v)
    return out, pull(q)

  true_out, true_grads = full(*(arrays[name] for name in "qkv"))
  np.testing.assert_allclose(out, true_out, atol=2e-6)
  for name, true in zip("qkv", true_grads, strict=True):
    np.testing.assert_allclose(grads[name], true, atol=1e-5)


def test_a_full_budget_needs_no_search():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 50, 2, 8))
  flat, by_region = (
    nn.choose_blocks(
      q, k, block_size=4, window=4, num_remote=13, two_level=two_level
    )
    for two_level in (False, True)
  )
  np.testing.assert_array_equal(flat, by_region)


@pytest.mark.parametrize("start", [5, 8, 15])
def test_the_future_changes_no_bit_of_the_past(start):
  problem = PROBLEMS["causal groups"]
  run = value_and_grads(ours, problem)
  before, after = draw(problem, 0), draw(problem, 1)
  mixed = {
    name: before[name].at[:, start:].set(100 * after[name][:, start:])
    for name in before
  }
  cotangent = before["q"].at[:, start:].set(0)
  first, second = run(before, cotangent), run(mixed, cotangent)
  np.testing.assert_array_equal(first[0][:, :start], second[0][:, :start])
  # Nor does the loss of the past send anything into the future.
  for name, grad in second[1].items():
    assert not np.asarray(grad[:, start:]).any(), name


def test_segments_do_not_see_each_other():
  problem = PROBLEMS["both ways, everything"]
  arrays, other = draw(problem, 0), draw(problem, 1)
  segments = np.asarray(arrays["segment_ids"])
  mine = segments == 1
  mixed = arrays | {
    name: jnp.where(mine[..., None, None], arrays[name], 9 * other[name])
    for name in "qkv"
  }
  run = value_and_grads(ours, problem)
  before, after = (run(x, arrays["q"])[0] for x in (arrays, mixed))
  assert mine.any()
  assert (segments == 2).any()
  np.testing.assert_allclose(after[mine], before[mine], atol=2e-6)


@slow
def test_segments_in_a_row_are_rows_of_their_own():
  problem = Problem(time=24, segments=True)
  arrays = draw(problem, 0)
  # They begin with a block each, so that each chooses as if it were alone.
  lengths = (8, 12, 4)
  numbers = np.repeat([3, 5, 7], lengths)[None].repeat(BATCH, 0)
  arrays["segment_ids"] = jnp.asarray(numbers, jnp.int32)
  packed, _ = value_and_grads(ours, problem)(arrays, arrays["q"])
  for first, length in zip(np.cumsum((0, *lengths)), lengths, strict=False):
    rows = slice(first, first + length)
    alone = jax.jit(ours, static_argnums=0)(
      problem, {name: arrays[name][:, rows] for name in "qkv"}
    )
    np.testing.assert_allclose(packed[:, rows], alone, atol=2e-6)


@slow
def test_bfloat16_is_near():
  problem = PROBLEMS["causal groups"]
  arrays = draw(problem, 0)
  halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), halves)
  out = jax.jit(functools.partial(ours, problem))(halves)
  assert out.dtype == jnp.bfloat16
  expected, _ = value_and_grads(ours, problem)(wide, wide["q"])
  np.testing.assert_allclose(np.float32(out), expected, atol=3e-2)


@slow
def test_vmap_is_a_loop_and_checkpoint_is_nothing():
  problem = PROBLEMS["causal groups"]
  one, two = draw(problem, 0), draw(problem, 1)
  both = jax.tree.map(lambda *x: jnp.stack(x), one, two)
  kept = jax.checkpoint(functools.partial(ours, problem))

  @jax.jit
  @jax.vmap
  def run(arrays):
    out, pull = jax.vjp(kept, arrays)
    return out, pull(arrays["q"])[0]

  together = run(both)
  for i, arrays in enumerate((one, two)):
    alone = value_and_grads(ours, problem)(arrays, arrays["q"])
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5),
      together,
      alone,
    )


X = jnp.ones((1, 8, 2, 4))
WRONG = {
  "num_remote": ({"num_remote": -1}, "^num_remote must be .* num_remote=-1"),
  "num_hashes": ({"num_hashes": 0}, "^num_hashes must be"),
  "hash_bits": ({"hash_bits": 17}, "^hash_bits must be .* from 0 to 16"),
  "selection": ({"selection": "max"}, "^selection must be one of 'lsh'"),
  "block_size": ({"block_size": 0}, "^block_size must be"),
  "window": ({"window": 5}, "^window must be a multiple of block_size"),
  "ramp": ({"ramp": -1.0}, "^ramp must be above 0"),
  "heads": (
    {"k": X[:, :, :0], "v": X[:, :, :0]},
    "^k must be .* none of them 0, got shape",
  ),
  "shape": ({"v": X[:, :4]}, "^k and v must have one shape"),
  "segment_ids": (
    {"segment_ids": jnp.zeros((1, 4), jnp.int32)},
    "^segment_ids must have shape",
  ),
  "span": ({"span": jnp.ones((1, 8, 1))}, "^span must have shape"),
  "two_level": ({"two_level": "yes"}, "^two_level must be True or False, got"),
  "projections": (
    {"projections": jnp.ones((2, 3, 1))},
    "^projections must have shape",
  ),
  "no round": (
    {"projections": jnp.ones((0, 4, 1))},
    "^projections must have at least one round",
  ),
  "more bits than directions": (
    {"hash_bits": 9},
    "^hash_bits must be at most the head size",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, monkeypatch):
  # As users have it, without the type checker of the tests.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  wrong, message = WRONG[name]
  arguments = {"q": X, "k": X, "v": X, "block_size": 4, "window": 4} | wrong
  with pytest.raises(ValueError, match=message):
    nn.dynamic_attention(**arguments)
