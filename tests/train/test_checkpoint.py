"""Laws of checkpoints: exact, atomic, told apart by path, honest when full."""

import gc
import pathlib
import resource
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import deepseek_jax as dj
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.checkpoint import CheckpointError, Checkpoints


def make_state(features=4, tx=None, seed=0):
  model = nnx.Sequential(
    nnx.Linear(features, 3, rngs=nnx.Rngs(seed)),
    nnx.Dropout(0.5, rngs=nnx.Rngs(seed)),
  )
  tx = optax.adam(0.1) if tx is None else tx
  return state_lib.create(model, tx, task="classification")


@pytest.fixture
def stream(problem):
  return iter(dj.data.batches(problem.train, 32, prefetch=0))


@pytest.fixture
def checkpoints(tmp_path):
  found = Checkpoints(tmp_path / "checkpoints", keep=2)
  yield found
  found.close()


def progress(best=None):
  return {"stopping": {"best_step": best}, "seconds": 1.5}


def save(checkpoints, state, stream, step, best=None):
  checkpoints.save(state, stream, progress(best), step=step, best_step=best)


def plain(tree):
  """Returns arrays that NumPy can compare: keys as their data."""
  is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
    lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree
  )


def assert_same(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(np.testing.assert_array_equal, plain(first), plain(second))


def test_everything_comes_back_bit_for_bit(checkpoints, stream):
  state = make_state()
  next(stream)
  want = next(stream)
  stream.set_state({**stream.get_state(), "next_step": 1})
  save(checkpoints, state, stream, 1)
  checkpoints.wait()
  for _ in range(3):
    next(stream)
  got, said = checkpoints.restore(1, make_state(seed=9), stream)
  assert_same(got, state)
  assert said == progress()
  np.testing.assert_array_equal(next(stream)["index"], want["index"])


def test_a_save_copies_before_its_arrays_are_donated(checkpoints, stream):
  # The law that makes saving in the background safe: the next step overwrites
  # the buffers in place.
  add = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
  state = make_state()
  params = {"w": jnp.zeros((500, 500))}
  for step in range(6):
    save(checkpoints, state._replace(params=params), stream, step)
    want = np.asarray(params["w"]).copy()
    for _ in range(3):
      params = add(params)
    checkpoints.wait()
    got, _ = checkpoints.restore_model(step, params, state.rest)
    np.testing.assert_array_equal(got["w"], want)


def test_the_newest_and_the_best_stay(checkpoints, stream, tmp_path):
  for step, best in enumerate([0, 1, 1, 1, 1]):
    save(checkpoints, make_state(), stream, step, best)
  checkpoints.wait()
  kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
  assert kept == {1, 3, 4}
  assert checkpoints.best() == 1


def test_another_model_is_told_by_path(checkpoints, stream):
  save(checkpoints, make_state(4), stream, 1)
  checkpoints.wait()
  with pytest.raises(
    ValueError,
    match=r"params/layers/0/kernel is float32\[4, 3\], wanted float32\[5, 3\]",
  ):
    checkpoints.restore(1, make_state(5), stream)
  with pytest.raises(ValueError, match=r"extra opt_state/0/mu") as error:
    checkpoints.restore(1, make_state(4, optax.sgd(0.1, 0.9)), stream)
  assert "missing opt_state/0/trace" in str(error.value)


def test_reading_alone_changes_nothing(checkpoints, stream, tmp_path):
  save(checkpoints, make_state(), stream, 1)
  checkpoints.wait()
  leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
  leftover.mkdir()
  reader = Checkpoints(tmp_path / "checkpoints", read_only=True)
  assert reader.latest() == 1
  reader.close()
  assert leftover.exists()


def test_leftovers_of_a_killed_save_are_swept(tmp_path):
  path = tmp_path / "checkpoints"
  (path / "2.orbax-checkpoint-tmp").mkdir(parents=True)
  found = Checkpoints(path)
  assert found.latest() is None
  found.close()
  assert not any(path.iterdir())


@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:coroutine .* was never awaited:RuntimeWarning",
)
def test_a_refused_write_is_told_and_the_last_step_stays(tmp_path, stream):
  found = Checkpoints(tmp_path / "checkpoints")
  state = make_state()
  rng = np.random.default_rng(0)  # Noise, which does not compress.
  big = {"w": jnp.asarray(rng.normal(size=(700, 700)), jnp.float32)}
  state = state._replace(params=big)
  save(found, state, stream, 1)
  found.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
  try:
    save(found, state, stream, 2)
    with pytest.raises(CheckpointError, match="latest intact step is 1"):
      found.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  gc.collect()  # The abandoned coroutines go here, not in some other test.
  assert found.latest() == 1
  got, _ = found.restore(1, state, stream)
  assert_same(got, state)
  found.close()


@pytest.fixture
def small_disk(tmp_path):
  path = tmp_path / "disk"
  path.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("mounting a small disk needs root")
  yield path
  subprocess.run(["umount", "-l", str(path)], check=True)


# After a failed write Orbax abandons coroutines, which Python then reports.
@pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning",
  "ignore:coroutine .* was never awaited:RuntimeWarning",
)
@pytest.mark.slow
def test_a_full_disk_ends_a_run_and_space_lets_it_go_on(small_disk, one_device):
  x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
  split = {"x": x, "y": x[:, 0]}
  data = dj.data.from_arrays(split, split, split, inputs=("x",), target="y")

  def run():
    model = nnx.Sequential(
      nnx.Linear(6, 1000, rngs=nnx.Rngs(0)),
      nnx.Linear(1000, 100, rngs=nnx.Rngs(1)),
      nnx.Linear(100, 1, rngs=nnx.Rngs(2)),
    )
    return dj.train.fit(
      model,
      optax.adam(1e-3),
      data,
      workdir=small_disk / "run",
      epochs=6,
      batch_size=32,
      checkpoint_seconds=0,
      mesh=one_device,
      progress=False,
      tensorboard=False,
    )

  with pytest.raises(CheckpointError, match="No space left on device"):
    run()
  gc.collect()  # As above.
  remount = ["mount", "-o", "remount,size=40m", str(small_disk)]
  subprocess.run(remount, check=True)
  assert run().complete
  assert pathlib.Path(small_disk, "run", "result.json").exists()
