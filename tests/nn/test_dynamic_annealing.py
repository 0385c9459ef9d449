"""Laws of annealing: a level is that attention, and training picks it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import deepseek_jax as dj
from deepseek_jax import nn

LEVELS = ((0, None), (2, 2), (5, 1))
FEW = LEVELS[:2]  # A level is a branch to compile.
SIZES = dict(num_heads=2, block_size=4, window=4)  # fmt: skip


def layer(**arguments):
  return nn.DynamicAttention(
    8, **SIZES, **arguments, rngs=nnx.Rngs(0)
  )  # fmt: skip


def tokens(batch=2, time=24):
  x = np.random.default_rng(0).normal(size=(batch, time, 8))
  return jnp.asarray(x, jnp.float32)


@functools.cache
def annealed(**arguments):
  """Returns a jitted function of calls so far: outputs, gradients, calls."""
  module = layer(**arguments)
  structure, params, rest = nnx.split(module, nnx.Param, ...)
  params, rest = nnx.as_pure((params, rest))

  @jax.jit
  def run(calls):
    rest["annealing"]["calls"] = calls

    def loss(params):
      module = nnx.merge(structure, params, rest)
      out = module(tokens())
      return jnp.square(out).sum(), (out, module.annealing.calls[...])

    grads, (out, calls_) = jax.grad(loss, has_aux=True)(params)
    return out, grads, calls_

  return lambda calls: run(jnp.array(calls, jnp.int32))


@pytest.mark.parametrize(
  ("learn_window", "levels"),
  [
    (False, FEW),
    (False, LEVELS),
    (True, LEVELS),
  ],
)
@pytest.mark.slow
def test_every_level_is_attention_with_that_many_blocks(learn_window, levels):
  run = annealed(learn_window=learn_window, schedule=levels)
  last = levels[-1][1]
  cases = ((0, 99), (1, 99), (2, 2), (4, 2), (5, last), (900, last))
  for calls, blocks in cases:
    expected = reference(blocks, learn_window)
    out, grads, after = run(calls)
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
      grads,
      expected[1],
    )
    assert after == calls + 1


@functools.cache
def reference(blocks, learn_window):
  module = layer(num_remote=blocks, learn_window=learn_window)
  structure, params, rest = nnx.split(module, nnx.Param, ...)

  @jax.jit
  def run(params):
    def loss(params):
      out = nnx.merge(structure, params, nnx.as_pure(rest))(tokens())
      return jnp.square(out).sum(), out

    grads, out = jax.grad(loss, has_aux=True)(params)
    return out, grads

  return run(nnx.as_pure(params))


def test_only_calls_in_training_count_and_one_branch_runs():
  module = nn.Annealing(nn.SparsitySchedule(LEVELS))
  ran = []

  def branch(blocks, x):
    jax.debug.callback(lambda blocks=blocks: ran.append(blocks))
    return x

  for train, tick, calls in (
    (True, True, 1), (True, True, 2), (False, True, 2), (True, False, 2),
    (True, True, 3),
  ):  # fmt: skip
    module.train() if train else module.eval()
    module(branch, jnp.ones(()), tick=tick)
    assert int(module.calls[...]) == calls
  jax.effects_barrier()
  assert ran == [None, None, 2, 2, 2]


class Recall(nnx.Module):
  """Attention, its mean, and a linear layer; tells at which level it ran."""

  def __init__(self, seen, levels, *, rngs):
    self.attention = layer(schedule=levels)
    self.head = nnx.Linear(8, 3, rngs=rngs)
    self.seen = seen
    self.deterministic = False

  def __call__(self, x):
    if not self.deterministic:
      jax.debug.callback(self.seen, self.attention.annealing.calls[...])
    return self.head(self.attention(x).mean(1))


@pytest.mark.parametrize(
  ("accumulate", "levels"),
  [(1, FEW), (2, LEVELS)],
)
@pytest.mark.slow
def test_training_passes_through_the_levels_in_one_compilation(
  tmp_path, accumulate, levels
):
  seen = []
  # A second compilation warns, and a warning is an error here.
  see = lambda calls: seen.append(int(calls))
  model = Recall(see, levels, rngs=nnx.Rngs(1))
  columns = {"x": np.asarray(tokens(32)), "y": np.arange(32) % 3}
  data = dj.data.from_arrays(
    columns, columns, columns, inputs=("x",), target="y"
  )
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
  )
  result = dj.train.fit(
    model, optax.adam(1e-2), data, workdir=tmp_path / "run", steps=7,
    batch_size=16, accumulate=accumulate, mesh=mesh, progress=False,
    tensorboard=False,
  )  # fmt: skip
  jax.effects_barrier()
  assert sorted(seen) == list(range(7 * accumulate))
  # What is evaluated best is given back, with its own count.
  calls = int(result.model.attention.annealing.calls[...])
  assert calls == result.best_step * accumulate


def test_levels_are_found_by_step():
  schedule = nn.SparsitySchedule([[0, None], [500, 16], [1000, 0]])
  assert schedule.levels == ((0, None), (500, 16), (1000, 0))
  steps = (0, 1, 499, 500, 999, 1000, 10**9)
  found = [int(schedule.level(step)) for step in steps]
  assert found == [0, 0, 0, 1, 1, 2, 2]
  assert hash(schedule) == hash(nn.SparsitySchedule(schedule.levels))


@pytest.mark.parametrize(
  ("levels", "message"),
  [
    ((), "^schedule must be pairs"),
    (((0, 4), 5), "^schedule must be pairs"),
    (((0, 4, 3),), "^schedule must be pairs"),
    (((0, -1),), "^schedule must be pairs"),
    (((0, 2.5),), "^schedule must be pairs"),
    (((1, 4),), "^schedule must have steps rising from 0"),
    (((0, 4), (0, 2)), "^schedule must have steps rising from 0"),
    (((0, 4), (5, 4)), "^schedule must have falling numbers"),
    (((0, 0), (5, 1)), "^schedule must have falling numbers"),
    (((0, 4), (5, None)), "^schedule must have falling numbers"),
  ],
  ids=str,
)
def test_levels_that_make_no_sense_are_named(levels, message, monkeypatch):
  monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
  with pytest.raises(ValueError, match=message):
    nn.SparsitySchedule(levels)
