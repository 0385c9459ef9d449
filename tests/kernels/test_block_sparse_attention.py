"""Laws of block-sparse attention: it is its reference, whatever the blocks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from deepseek_jax import kernels
from deepseek_jax.kernels.block_sparse_attention.reference import reference

slow = pytest.mark.slow


class Problem(NamedTuple):
  """The static part: one compilation each."""

  time: int
  block: int
  window: int  # Blocks.
  choices: int
  heads: int = 2
  kv_heads: int = 2
  is_causal: bool = True
  segments: bool = False
  edges: str = ""  # "span" or "span and offset".

  @property
  def options(self) -> dict[str, Any]:
    return {
      "block_size": self.block,
      "window": self.block * self.window,
      "is_causal": self.is_causal,
      "ramp": 3.0,
    }


PROBLEMS = {
  "causal groups": Problem(22, 4, 2, 3, heads=4),
  "both ways, everything": Problem(
    21, 4, 2, 2, 2, 1, False, True, "span and offset"
  ),
  "window alone": Problem(13, 2, 3, 0, edges="span", segments=True),
  "blocks of one": Problem(9, 1, 1, 4, segments=True),
  "less than a block": Problem(5, 8, 2, 2),
}
FAST = ("causal groups", "both ways, everything")
problems = pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=() if name in FAST else slow) for name in PROBLEMS],
)
BATCH, SIZE = 2, 8


def draw(problem: Problem, seed: int, dtype=jnp.float32):
  """Returns arrays of a problem; ids of all sorts, wrong ones among them."""
  rng = np.random.default_rng(seed)
  rows = (BATCH, problem.time)
  normal = lambda heads: jnp.asarray(
    rng.normal(size=(*rows, heads, SIZE)), dtype
  )
  arrays = {
    "q": normal(problem.heads),
    "k": normal(problem.kv_heads),
    "v": normal(problem.kv_heads),
  }
  blocks = -(-problem.time // problem.block)
  ids = rng.integers(-2, blocks + 2, (*rows, problem.kv_heads, problem.choices))
  arrays["block_ids"] = jnp.asarray(ids, jnp.int32)
  if problem.segments:
    # Padding in the middle, and rows of nothing else.
    segments = np.sort(rng.integers(-1, 3, rows), axis=1)
    segments = np.roll(segments, rng.integers(problem.time), axis=1)
    arrays["segment_ids"] = jnp.asarray(segments, jnp.int32)
  if problem.edges:
    most = problem.block * problem.window
    edge = lambda: jnp.asarray(rng.uniform(0, most, (*rows, problem.heads)),
                               jnp.float32)  # fmt: skip
    arrays["span"] = edge()
    if "offset" in problem.edges:
      arrays["offset"] = edge()
  return arrays


@functools.cache
def value_and_grads(function, problem: Problem):
  """Returns a jitted function of arrays: outputs, and their gradients."""

  def run(arrays, cotangent):
    floats = {k: v for k, v in arrays.items() if v.dtype != jnp.int32}
    rest = {k: v for k, v in arrays.items() if k not in floats}
    out, pull = jax.vjp(
      lambda x: function(**x, **rest, **problem.options), floats
    )
    return out, pull(cotangent)[0]

  return jax.jit(run)


def attend(**arguments):
  return kernels.block_sparse_attention(**arguments, implementation="xla")


def check(problem: Problem, seed: int):
  arrays = draw(problem, seed)
  cotangent = draw(problem, seed + 1)["q"]
  out, grads = value_and_grads(attend, problem)(arrays, cotangent)
  true_out, true_grads = value_and_grads(reference, problem)(arrays, cotangent)
  np.testing.assert_allclose(out, true_out, atol=2e-6, rtol=2e-6)
  for name, grad in grads.items():
    true = np.asarray(true_grads[name])
    scale = max(1.0, np.abs(true).max())
    np.testing.assert_allclose(grad, true, atol=1e-5 * scale, err_msg=name)


@problems
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20))
def test_it_equals_the_reference(name, seed):
  check(PROBLEMS[name], seed)


@slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
  problem=st.builds(
    Problem,
    time=st.integers(1, 40),
    block=st.integers(1, 9),
    window=st.integers(1, 4),
    choices=st.integers(0, 4),
    heads=st.sampled_from([2, 4]),
    kv_heads=st.sampled_from([1, 2]),
    is_causal=st.booleans(),
    segments=st.booleans(),
    edges=st.sampled_from(["", "span", "span and offset"]),
  ),
  seed=st.integers(0, 2**20),
)
def test_it_equals_the_reference_whatever_the_shape(problem, seed):
  check(problem, seed)


@slow
def test_bfloat16_is_as_near_as_rounding_lets_it_be():
  problem = PROBLEMS["causal groups"]
  halves = draw(problem, 3, jnp.bfloat16)
  wide = {
    k: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v
    for k, v in halves.items()
  }
  cotangent = wide["q"]
  out, grads = value_and_grads(attend, problem)(
    halves, cotangent.astype(jnp.bfloat16)
  )
  true_out, true_grads = value_and_grads(reference, problem)(wide, cotangent)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(out), true_out, atol=3e-2)
  for name in ("q", "k", "v"):
    assert grads[name].dtype == jnp.bfloat16
    scale = np.abs(true_grads[name]).max()
    np.testing.assert_allclose(
      np.float32(grads[name]), true_grads[name], atol=3e-2 * scale
    )


def test_rows_that_see_nothing_are_zero_and_so_are_their_gradients():
  problem = PROBLEMS["both ways, everything"]
  arrays = draw(problem, 0)
  segments = arrays["segment_ids"].at[0].set(-1).at[1, :3].set(-1)
  arrays["segment_ids"] = segments
  out, grads = value_and_grads(attend, problem)(
    arrays, jnp.ones_like(arrays["q"])
  )
  blind = np.asarray(segments) < 0
  assert not np.asarray(out)[blind].any()
  assert np.asarray(out)[~blind].all()
  for name, grad in grads.items():
    assert np.isfinite(grad).all(), name
    assert not np.asarray(grad)[blind].any(), name


@slow
def test_vmap_is_a_loop():
  problem = PROBLEMS["causal groups"]
  one, two = draw(problem, 0), draw(problem, 1)
  both = jax.tree.map(lambda *x: jnp.stack(x), one, two)
  run = value_and_grads(attend, problem)
  together = jax.jit(jax.vmap(lambda a: run(a, a["q"])))(both)
  for i, arrays in enumerate((one, two)):
    alone = run(arrays, arrays["q"])
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5),
      together,
      alone,
    )


def test_sharded_over_batch_and_heads_it_is_the_same():
  problem = PROBLEMS["causal groups"]._replace(heads=8, kv_heads=4)
  arrays = draw(problem, 0)
  mesh = jax.make_mesh(
    (2, 4), ("data", "heads"), axis_types=(AxisType.Auto,) * 2
  )
  spec = PartitionSpec("data", None, "heads")

  def loss(arrays, rest):
    arguments = arrays | rest | problem.options
    return attend(**arguments)

  floats = {k: arrays[k] for k in "qkv"}
  rest = {"block_ids": arrays["block_ids"]}
  sharded = jax.shard_map(
    loss, mesh=mesh, in_specs=(spec, spec), out_specs=spec
  )

  @jax.jit
  def run(floats):
    out, pull = jax.vjp(lambda x: sharded(x, rest), floats)
    return out, pull(floats["q"])[0]

  found = run(floats)
  expected = value_and_grads(attend, problem)(arrays, arrays["q"])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected
  )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
  seed=st.integers(0, 2**20),
  shape=st.sampled_from([(17, 3, 5, 4), (6, 1, 1, 8)]),
)
def test_the_plan_holds_every_pair_once(seed, shape):
  time, choices, blocks, rows = shape
  rng = np.random.default_rng(seed)
  # Distinct ones, some beyond either end.
  order = rng.permuted(np.tile(np.arange(-2, blocks + 2), (time, 1)), axis=1)
  ids = order[:, :choices]
  plan = make_plan(jnp.asarray(ids), blocks, rows)
  block, token, place = map(np.asarray, plan)
  assert set(block) == set(range(blocks))
  assert set(np.diff(block)) <= {0, 1}
  wanted = {(t, b) for t, row in enumerate(ids) for b in row if 0 <= b < blocks}
  held = [(t, b) for b, row in zip(block, token, strict=True) for t in row
          if t != time]  # fmt: skip
  assert sorted(held) == sorted(wanted)
  for t, row in enumerate(ids):
    for choice, b in enumerate(row):
      where = place[t, choice]
      if (t, b) in wanted:
        assert (token.ravel()[where], block[where // rows]) == (t, b)
      else:
        assert where >= token.size


make_plan = jax.jit(kernels.make_dispatch, static_argnums=(1, 2))


def test_nobody_choosing_makes_an_empty_tile_a_block():
  plan = make_plan(jnp.zeros((5, 0), jnp.int32), 3, 4)
  np.testing.assert_array_equal(plan.block, [0, 1, 2])
  assert (np.asarray(plan.token) == 5).all()


def test_merged_parts_are_the_softmax_over_their_union():
  rng = np.random.default_rng(0)
  logits, values = rng.normal(size=(4, 9)), rng.normal(size=(9, 3))
  logits[0, :4] = logits[1] = -np.inf  # A part, and a row, without keys.

  def part(keys):
    top = logits[:, keys]
    with np.errstate(divide="ignore"):
      lse = np.log(np.exp(top).sum(1))
    p = np.exp(top - np.where(np.isfinite(lse), lse, 0)[:, None])
    return p @ values[keys], lse

  parts = [part(slice(0, 4)), part(slice(4, 7)), part(slice(7, 9))]
  stacked = (
    jnp.asarray(np.stack(x), jnp.float32) for x in zip(*parts, strict=True)
  )
  out, lse = kernels.merge_attention(*stacked)
  expected, total = part(slice(0, 9))
  np.testing.assert_allclose(out, expected, atol=1e-6)
  np.testing.assert_allclose(lse, total, atol=1e-6)


X = jnp.ones((2, 8, 4, 4))
IDS = jnp.zeros((2, 8, 4, 1), jnp.int32)


def test_what_is_not_a_number_stays_in_its_block_and_after(monkeypatch):
  bad = X.at[:, 6:].set(jnp.nan)
  out = kernels.block_sparse_attention(
    bad, bad, bad, IDS, block_size=2, window=4
  )
  assert np.isfinite(out[:, :6]).all()
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  arrays = (np.asarray(x) for x in (X, X, X, IDS))  # From NumPy, as well.
  out = kernels.block_sparse_attention(*arrays, block_size=2, window=4)
  np.testing.assert_allclose(out, X, atol=1e-6)


@pytest.mark.slow
def test_numbers_of_segments_may_have_no_sign(monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  run = functools.partial(
    kernels.block_sparse_attention, X, X, X, IDS, block_size=3, window=3,
    is_causal=False,
  )  # fmt: skip
  one = jnp.full((2, 8), 255, jnp.uint8)
  np.testing.assert_array_equal(run(segment_ids=one), run())


WRONG = {
  "block_size": ({"block_size": 0}, r"^block_size must be .* block_size=0"),
  "window": ({"window": 6}, r"^window must be a multiple .* try window=4 or 8"),
  "no window": ({"window": 0}, r"^window must be .* window=0"),
  "ramp": ({"ramp": 0.0}, "^ramp must be above 0"),
  "heads": (
    {"k": X[:, :, :3], "v": X[:, :, :3]},
    "^the heads of k must divide",
  ),
  "values": ({"v": X[:, :4]}, "^k and v must have one shape"),
  "size": ({"q": X[..., :2]}, "^q and k must agree in batch and head size"),
  "time": ({"q": X[:, :4]}, "^q and k must have as many tokens"),
  "rank": ({"q": X[0]}, r"^q must be \[batch, time, heads, head size\]"),
  "integers": ({"q": X.astype(int)}, "^q must be floating"),
  "ids": ({"block_ids": IDS[:, :4]}, r"^block_ids must have shape"),
  "kind of ids": ({"block_ids": X}, "^block_ids must be integer"),
  "segments": (
    {"segment_ids": jnp.zeros((2, 4), jnp.int32)},
    r"^segment_ids must have shape \(2, 8\)",
  ),
  "span": ({"span": jnp.ones((2, 8))}, "^span must have shape"),
  "offset": ({"offset": jnp.ones((2, 8, 4))}, "^offset needs span.*span=None"),
  "causal": (
    {"is_causal": None},
    r"^is_causal must be True or False, got is_c",
  ),
  "no rows": (
    {"q": X[:0], "k": X[:0], "v": X[:0], "block_ids": IDS[:0]},
    "^q must be .* none of them 0, got shape",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, monkeypatch):
  # As users have it, without the type checker of the tests.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  wrong, message = WRONG[name]
  arguments = {"q": X, "k": X, "v": X, "block_ids": IDS, "block_size": 4,
               "window": 4} | wrong  # fmt: skip
  with pytest.raises(ValueError, match=message):
    kernels.block_sparse_attention(**arguments)
