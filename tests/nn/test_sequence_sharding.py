"""Laws of attention to a sequence that is cut over devices."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from deepseek_jax import nn
from deepseek_jax.kernels.block_sparse_attention.reference import reference

slow = pytest.mark.slow
BATCH, SIZE, BLOCK = 2, 8, 4
SPEC = PartitionSpec("data", "sequence")


class Problem(NamedTuple):
  """The static part: one compilation each."""

  devices: int = 2
  data: int = 1  # Devices that the batch is cut over.
  time: int = 48
  window: int = 2  # Blocks.
  num_remote: int = 3
  heads: int = 4
  kv_heads: int = 2
  is_causal: bool = True
  segments: bool = False
  edges: bool = False
  selection: str = "lsh"
  capacity: int | None = None

  @property
  def sizes(self) -> dict[str, Any]:
    return {
      "block_size": BLOCK,
      "window": BLOCK * self.window,
      "is_causal": self.is_causal,
    }

  @property
  def choice(self) -> dict[str, Any]:
    names = ("num_remote", "selection")
    choice = {name: getattr(self, name) for name in names}
    return choice | {"num_hashes": 3, "hash_bits": 2}

  @property
  def sharding(self) -> dict[str, Any]:
    return {"axis_name": "sequence", "capacity": self.capacity}

  @property
  def blocks(self) -> int:
    """Blocks of a device."""
    return self.time // self.devices // BLOCK


PROBLEMS = {
  "causal, four": Problem(4, 2),
  "both ways, two, segments": Problem(
    heads=2, kv_heads=1, is_causal=False, segments=True, edges=True
  ),
  "causal, two, segments": Problem(segments=True),
  "causal, edges": Problem(4, 2, edges=True),
  "both ways, four": Problem(4, 2, is_causal=False, num_remote=4),
  "one device": Problem(1),
  "a window as wide as may be": Problem(4, window=4, is_causal=False),
  "a window of the own block": Problem(4, window=1, num_remote=2),
  "mean": Problem(4, selection="mean", segments=True),
  "none": Problem(4, selection="none", is_causal=False),
  "a block each": Problem(8, time=32, window=2),
  "more than there are": Problem(2, num_remote=20),
}
# One block from every other device, where many more are wanted.
SCARCE = {
  "causal": Problem(4, capacity=1),
  "both ways": Problem(4, 2, capacity=1, is_causal=False, segments=True),
}


def table(names, *fast):
  """Problems forward and backward; what is fast, perhaps forward alone."""
  rest = [(name, True) for name in names if (name, True) not in fast]
  slower = [pytest.param(*case, marks=slow) for case in rest]
  return pytest.mark.parametrize(("name", "backward"), [*fast, *slower])


problems = table(
  PROBLEMS, ("causal, four", True), ("both ways, two, segments", False)
)
scarce = table(SCARCE, ("causal", False))


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


def sharded(problem: Problem, function, out_specs: Any = SPEC):
  """Runs a function of arrays on the parts of them."""
  mesh = jax.make_mesh(
    (problem.data, problem.devices), ("data", "sequence"),
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[: problem.data * problem.devices],
  )  # fmt: skip
  return jax.shard_map(function, mesh=mesh, in_specs=SPEC, out_specs=out_specs)


def inputs_of_choice(arrays):
  return {k: arrays[k] for k in ("q", "k", "segment_ids") if k in arrays}


def in_parts(problem: Problem, arrays):
  """Returns outputs; ids, and the share dropped for every row of data."""

  def attend(arrays):
    options = problem.sizes | problem.choice | problem.sharding
    ids, dropped = nn.choose_sharded_blocks(
      **inputs_of_choice(arrays), **options
    )
    out = nn.sharded_dynamic_attention(**arrays, **options)
    return out, (ids, dropped[None])

  specs = SPEC, (SPEC, PartitionSpec("data"))
  return sharded(problem, attend, specs)(arrays)


def with_grads(attend, backward: bool):
  """Returns a jitted function: outputs, gradients, and what else there is."""

  def run(arrays, cotangent):
    if not backward:
      out, more = attend(arrays)
      return out, {}, more
    floats = {k: v for k, v in arrays.items() if v.dtype != jnp.int32}
    rest = {k: v for k, v in arrays.items() if k not in floats}
    out, pull, more = jax.vjp(lambda x: attend(x | rest), floats, has_aux=True)
    return out, pull(cotangent)[0], more

  return jax.jit(run)


@functools.cache
def parts(problem: Problem, backward: bool):
  return with_grads(functools.partial(in_parts, problem), backward)


@functools.cache
def whole(backward: bool, **sizes):
  """Attention to the whole sequence by definition, to blocks that are given.

  `nn.dynamic_attention` is that, with `nn.choose_blocks`, by laws of its own.
  """
  attend = lambda arrays: (reference(**arrays, **sizes), None)
  return with_grads(attend, backward)


# Not a function of the problem: much that is cut differently is one whole.
choose = jax.jit(
  nn.choose_blocks,
  static_argnames=tuple(Problem().sizes | Problem().choice),
)


def choose_whole(problem: Problem, arrays):
  chosen = choose(**inputs_of_choice(arrays), **problem.sizes, **problem.choice)
  return np.asarray(chosen)


def check(problem: Problem, backward: bool, arrays, ids):
  """Compares outputs and gradients with those of the whole sequence."""
  cotangent = draw(problem, 1)["q"]
  out, grads, _ = parts(problem, backward)(arrays, cotangent)
  true_out, true_grads, _ = whole(backward, **problem.sizes)(
    arrays | {"block_ids": jnp.asarray(ids)}, cotangent
  )
  np.testing.assert_allclose(out, true_out, atol=2e-6, rtol=2e-6)
  assert grads.keys() == true_grads.keys()
  for name, grad in grads.items():
    true = np.asarray(true_grads[name])
    scale = max(1.0, np.abs(true).max())
    np.testing.assert_allclose(grad, true, atol=1e-5 * scale, err_msg=name)


@problems
def test_in_parts_it_is_what_it_is_as_a_whole(name, backward):
  problem = PROBLEMS[name]
  arrays = draw(problem, 0)
  check(problem, backward, arrays, choose_whole(problem, arrays))


@problems
def test_in_parts_the_same_blocks_are_chosen(name, backward):
  problem = PROBLEMS[name]
  arrays = draw(problem, 0)
  _, _, (ids, dropped) = parts(problem, backward)(arrays, arrays["q"])
  np.testing.assert_array_equal(ids, choose_whole(problem, arrays))
  assert not np.asarray(dropped).any()


def kept(problem: Problem, ids):
  """The choices that fit, counted one by one."""
  ids = ids.copy()
  blocks, reach = problem.blocks, problem.window - 1
  ahead = 0 if problem.is_causal else reach
  length = blocks * BLOCK
  for row, me, head in np.ndindex(BATCH, problem.devices, problem.kv_heads):
    mine = ids[row, me * length : (me + 1) * length, head]  # A view.
    first = me * blocks
    there = set(range(first - reach, first + blocks + ahead))
    for owner in range(problem.devices):
      numbers = range(owner * blocks, (owner + 1) * blocks)
      votes = {b: (mine == b).sum() for b in numbers if b not in there}
      best = sorted(votes, key=lambda b: (-votes[b], b))[: problem.capacity]
      there.update(b for b in best if votes[b])
    mine[~np.isin(mine, list(there))] = -1
  return ids


@scarce
def test_a_capacity_keeps_what_most_tokens_want(name, backward):
  problem = SCARCE[name]
  arrays = draw(problem, 0)
  _, _, (ids, dropped) = parts(problem, backward)(arrays, arrays["q"])
  wanted = choose_whole(problem, arrays)
  true = kept(problem, wanted)
  np.testing.assert_array_equal(ids, true)
  count = lambda ids: (ids >= 0).reshape(problem.data, -1).sum(1)
  share = 1 - count(true) / count(wanted)
  assert 0.05 < share.max() < 0.95
  np.testing.assert_allclose(dropped, share, atol=1e-6)


@scarce
def test_what_fits_is_read_and_nothing_else(name, backward):
  problem = SCARCE[name]
  arrays = draw(problem, 0)
  check(problem, backward, arrays, kept(problem, choose_whole(problem, arrays)))


@pytest.mark.parametrize(
  ("problem", "backward", "start"),
  [
    (PROBLEMS["causal, four"], True, 24),
    (PROBLEMS["causal, four"], True, 30),  # Within a device.
    # Only devices after it: see the docstring.
    (SCARCE["causal"], False, 24),
    (SCARCE["causal"], False, 36),
    pytest.param(SCARCE["causal"], True, 24, marks=slow),
    pytest.param(SCARCE["causal"], True, 36, marks=slow),
  ],
)
def test_the_future_changes_no_bit_of_the_past(problem, backward, start):
  run = parts(problem, backward)
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


def test_with_a_capacity_later_tokens_of_a_device_have_a_vote():
  """What the docstring warns of; those of the devices before have it not."""
  problem, start = SCARCE["causal"], 40
  run = parts(problem, False)
  before = draw(problem, 0)
  q = before["q"].at[:, start:].set(-before["q"][:, start:])
  first = run(before, before["q"])[0]
  second = run(before | {"q": q}, before["q"])[0]
  mine = problem.time - problem.time // problem.devices
  assert (first[:, mine:start] != second[:, mine:start]).any()
  np.testing.assert_array_equal(first[:, :mine], second[:, :mine])


def test_what_is_not_a_number_elsewhere_stays_there():
  """A block that is not asked for is not sent, not even times zero."""
  problem = SCARCE["causal"]
  arrays, start = draw(problem, 0), 36
  bad = {
    name: x.at[:, start:].set(jnp.nan) if name in "kv" else x
    for name, x in arrays.items()
  }
  run = parts(problem, False)
  good_out, bad_out = (run(x, arrays["q"])[0] for x in (arrays, bad))
  np.testing.assert_array_equal(good_out[:, :start], bad_out[:, :start])


def received_bytes(text: str) -> int:
  """Bytes of the results of all collectives in a compiled program."""
  wide = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
  names = "all-gather|all-to-all|collective-permute|all-reduce"
  total = 0
  for result in re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", text):
    for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result):
      total += wide[kind] * int(
        np.prod([int(n) for n in shape.split(",") if n])
      )
  return total


def test_less_travels_than_all_keys_and_values():
  time, heads, size = 1024, 2, 64
  problem, blocks = Problem(4), time // 64
  shape = jax.ShapeDtypeStruct((1, time, heads, size), jnp.float32)
  attend = functools.partial(
    nn.sharded_dynamic_attention, axis_name="sequence", num_remote=2, capacity=1
  )
  run = jax.jit(sharded(problem, lambda qkv: attend(*qkv)))
  found = received_bytes(run.lower((shape,) * 3).compile().as_text())
  gathered = 2 * time * heads * size * 4
  halo, fetched = 3 / blocks, problem.devices / blocks
  summaries = 4 * 8 * (size + 1) / (2 * size * 64)
  expected = halo + fetched + summaries
  # The requests are a number for every block.
  assert found / gathered == pytest.approx(expected, rel=1e-3)
  assert found < 0.75 * gathered


@slow
def test_bfloat16_is_near():
  problem = PROBLEMS["causal, four"]
  arrays = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw(problem, 0))
  out, *_ = parts(problem, False)(arrays, None)
  assert out.dtype == jnp.bfloat16
  attend = functools.partial(
    nn.dynamic_attention, **problem.sizes, **problem.choice
  )
  true = jax.jit(lambda arrays: attend(**arrays))(arrays)
  np.testing.assert_allclose(np.float32(out), np.float32(true), atol=3e-2)


X = jnp.ones((1, 16, 2, 4))
WRONG = {
  "tokens": ({"block_size": 3, "window": 3}, "^the tokens of a device must be"),
  "window": ({"window": 16}, "^window must reach no farther .* window=16"),
  "capacity": ({"capacity": 0}, "^capacity must be .* got capacity=0"),
  "true": ({"capacity": True}, "^capacity must be .* got capacity=True"),
  "num_remote": ({"num_remote": -1}, "^num_remote must be"),
  "span": ({"span": jnp.ones((1, 16, 1))}, "^span must have shape"),
  "shape": ({"v": X[..., :2]}, "^k and v must have one shape"),
  "segment_ids": (
    {"segment_ids": jnp.zeros((1, 16, 1), jnp.int32)},
    "^segment_ids must have shape",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, monkeypatch):
  # As users have it, without the type checker of the tests.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  wrong, message = WRONG[name]
  arguments = {"q": X, "k": X, "v": X, "block_size": 4, "window": 4} | wrong
  arrays = {k: v for k, v in arguments.items() if isinstance(v, jax.Array)}
  rest = {k: v for k, v in arguments.items() if k not in arrays}

  def attend(arrays):
    return nn.sharded_dynamic_attention(**arrays, **rest, axis_name="sequence")

  with pytest.raises(ValueError, match=message):
    jax.eval_shape(sharded(Problem(2), attend), arrays)


def test_it_needs_an_axis():
  with pytest.raises(NameError, match="sequence"):
    nn.sharded_dynamic_attention(
      X, X, X, axis_name="sequence", block_size=4, window=4
    )
