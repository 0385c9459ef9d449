"""Workers that meet now and then, against their rule in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exchanges import assert_equal
from walks import (
  AT,
  RATE,
  SHAPES,
  STEPS,
  WORKERS,
  Walk,
  Walker,
  assert_same_walk,
  saved,
  targets,
)

from deepseek_jax import comm
from deepseek_jax.comm.diloco import cut

COMPRESSION = comm.int_all_reduce("data", block=8, min_size=8)
CASES = {
  "every step": {"period": 1},
  "four steps": {"period": 4},
  "fragments": {"period": 4, "fragments": 2},
  "overlap": {"period": 4, "overlap": True},
  "all": {
    "period": 4,
    "fragments": 2,
    "overlap": True,
    "local_steps": (4, 3, 2, 1),
  },
  "compressed": {
    "period": 3,
    "outer": optax.sgd(1.0),
    "compression": COMPRESSION,
  },
}
PLAIN = [name for name in CASES if name != "compressed"]


@functools.cache
def walker(name):
  return Walker(comm.diloco(optax.sgd(RATE), "data", **CASES[name]))


@functools.cache
def walk(name):
  return walker(name)(targets())


@dataclasses.dataclass
class Leaf:
  """One leaf of all workers by the rule, with Nesterov's momentum."""

  place: int  # the step of a period after which it meets
  period: int = 4
  fragments: int = 1
  overlap: bool = False
  local_steps: tuple = (10**6,) * WORKERS

  def walk(self, goals):
    shape = goals.shape[2:]
    common, momentum = np.ones(shape), np.zeros(shape)
    workers = np.ones((WORKERS, *shape))
    way, since, found = 0 * workers, workers.copy(), []
    for step, goal in enumerate(goals.astype(np.float64)):
      works = np.array(self.local_steps) > step % self.period
      works = works.reshape(-1, *(1,) * len(shape))
      workers = workers - works * RATE * (workers - goal)
      if not self.overlap:
        way, since = common - workers, workers
      if step >= self.place and (step - self.place) % self.period == 0:
        momentum = way.mean(0) + 0.9 * momentum
        change = -0.7 * (way.mean(0) + 0.9 * momentum)
        workers = common + change + (workers - since)
        common = common + change
      way, since = common - workers, workers
      found.append((common, workers))
    return map(np.stack, zip(*found, strict=True))


def transcription(settings):
  period, late = settings["period"], settings.get("overlap", False)
  # Of two fragments the bias is the first, and the kernel meets earlier.
  early = period // 2 if settings.get("fragments", 1) == 2 else 0
  places = {"bias": period - 1 + late, "kernel": period - 1 + late - early}
  found = {
    name: Leaf(places[name], **settings).walk(goals)
    for name, goals in targets().items()
  }
  params, workers = zip(*found.values(), strict=True)
  named = lambda values: dict(zip(found, values, strict=True))
  return Walk(named(params), None, named(workers), None, None)


@pytest.mark.parametrize("name", PLAIN)
def test_equals_its_transcription(name):
  assert_same_walk(walk(name), transcription(CASES[name]))


def test_meeting_at_every_step_is_data_parallel_descent():
  tx = comm.diloco(optax.sgd(RATE), "data", period=1, outer=optax.sgd(1.0))
  found = Walker(tx)(targets())
  for name, goals in targets().items():
    params = np.ones(SHAPES[name])
    for step, goal in enumerate(goals):
      params = params - RATE * (params - goal).mean(0)
      np.testing.assert_allclose(found.params[name][step], params, atol=2e-6)


def moving(found, name):
  return np.nonzero(found.updates[name].reshape(STEPS, -1).any(-1))[0].tolist()


def test_parameters_move_at_meetings_alone():
  assert moving(walk("four steps"), "kernel") == [3, 7, 11]
  assert moving(walk("overlap"), "kernel") == [4, 8]
  assert moving(walk("fragments"), "bias") == [3, 7, 11]
  assert moving(walk("fragments"), "kernel") == [1, 5, 9]


@pytest.mark.parametrize("name", ["four steps", "compressed"])
def test_all_workers_go_on_from_the_same_parameters(name):
  found, period = walk(name), CASES[name]["period"]
  for leaf in SHAPES:
    workers = found.workers[leaf]
    for step in range(STEPS):
      spread = np.ptp(workers[step], axis=0).max()
      assert (spread == 0) == ((step + 1) % period == 0)
    after = slice(period - 1, None, period)
    np.testing.assert_allclose(
      workers[after, 0], found.params[leaf][after], rtol=0, atol=2e-7
    )


def test_bytes_are_sent_at_meetings_alone():
  count = sum(int(np.prod(shape)) for shape in SHAPES.values())
  ring = 2 * (WORKERS - 1) / WORKERS * 4 * count
  sent = walk("four steps").sent
  assert sent.tolist() == 3 * [0, 0, 0, ring]
  in_parts = walk("fragments").sent
  assert sent.sum() == in_parts.sum()
  assert np.count_nonzero(in_parts) == 6
  compressed = walk("compressed").sent
  assert 0 < compressed[2] < ring


def test_workers_that_are_done_wait():
  found = walk("all")
  kernel = found.workers["kernel"]
  assert (kernel[0] != 1).all()
  # The last works at the steps 0, 4 and 8, and its bias first meets at step 4.
  bias = found.workers["bias"][:, 3]
  assert (bias[1] == bias[0]).all()
  assert (bias[3] == bias[0]).all()
  assert (bias[4] != bias[3]).any()


def test_compressed_meetings_lose_nothing():
  # With `sgd(1.0)` the common parameters go the mean way of the workers, but
  # for what the errors hold.
  found, goals = walk("compressed"), targets()["kernel"]
  went, common = 0, np.ones(SHAPES["kernel"])
  workers = np.ones((WORKERS, *SHAPES["kernel"]))
  for step, goal in enumerate(goals):
    workers = workers - RATE * (workers - goal)
    if (step + 1) % 3 == 0:
      went = went + (common - workers).mean(0, dtype=np.float64)
      common = found.params["kernel"][step]
      workers = np.stack([common] * WORKERS)
  (exchange,) = found.end[1].exchange
  left = exchange.errors.arrays["left"]["kernel"]
  chunks = np.asarray(left.worker).mean(0) + np.asarray(left.server)[:, 0]
  unsent = chunks.reshape(-1)[: went.size].reshape(went.shape)
  assert np.abs(unsent).max() > 1e-4
  assert exchange.count == STEPS // 3
  np.testing.assert_allclose(
    1 - found.params["kernel"][-1] + unsent, went, atol=4e-6
  )


@pytest.mark.parametrize("name", ["all", "compressed"])
def test_a_walk_goes_on_from_saved_arrays_bit_for_bit(name):
  end = walk(name).end
  expected = walker(name)(targets(1), end)
  assert_equal(walker(name)(targets(1), saved(end)).end, expected.end)


@pytest.mark.parametrize("name", ["four steps", "compressed"])
def test_gradients_that_are_not_finite_count_as_zero(name):
  goals = targets()
  goals["kernel"][5, 1, 2, 3] = np.nan
  goals["bias"][8, 0] = np.inf
  found = walker(name)(goals)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.end))
  before, after = (found.workers["kernel"][t, 1, 2, 3] for t in (4, 5))
  if name == "four steps":
    assert before == after


def test_a_gradient_of_zeros_moves_nothing():
  still = {name: np.ones_like(x) for name, x in targets().items()}
  for name in ("four steps", "compressed"):
    found = walker(name)(still)
    for leaf in SHAPES:
      assert (found.params[leaf] == 1).all()
      assert (found.workers[leaf] == 1).all()


def test_types_of_parameters_are_kept():
  tx = comm.diloco(
    optax.adam(0.1),
    "data",
    period=3,
    overlap=True,
    compression=COMPRESSION,
  )
  found = Walker(tx, jnp.bfloat16)(targets())
  for tree in (found.params, found.updates, found.workers):
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.bfloat16.dtype}
  assert moving(found, "kernel") == [3, 6, 9]


def test_the_inner_rate_can_be_a_hyperparameter():
  inner = optax.inject_hyperparams(optax.sgd)(RATE)
  found = Walker(comm.diloco(inner, "data", period=4))(targets())
  assert_same_walk(found, walk("four steps"))


def test_the_inner_optimizer_gets_extra_arguments():
  def update(updates, state, params=None, *, value):
    return jax.tree.map(lambda g: value * g, updates), state

  inner = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  tx = comm.diloco(inner, "data", period=2)
  params = {"x": jnp.ones(3)}
  state = comm.init(tx, params, AT.mesh, "data")
  specs = comm.state_specs(state, "data")
  step = jax.shard_map(
    lambda grads, state, params: tx.update(grads, state, params, value=2.0)[1],
    mesh=AT.mesh,
    in_specs=(jax.P(), specs, jax.P()),
    out_specs=specs,
    check_vma=False,
  )
  state = jax.jit(step)(params, state, params)
  assert (comm.local_params(state, params)["x"] == 3.0).all()


def test_fragments_are_of_about_equal_size():
  sizes = [5, 1, 1, 1, 8, 3, 3, 2]
  params = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes]
  for fragments in range(1, 9):
    groups = cut(params, fragments)
    assert len(groups) == fragments
    assert all(groups)
    assert [i for group in groups for i in group] == list(range(8))
  assert [sum(sizes[i] for i in group) for group in cut(params, 3)] == [8, 8, 8]
