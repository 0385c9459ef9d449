"""A run on any mesh is the run of one device, and goes on on any other."""

import functools
import os
import signal

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import deepseek_jax as dj
from deepseek_jax.parallel import MeshSpec, make_mesh
from deepseek_jax.train import initial, placement
from deepseek_jax.train.checkpoint import Checkpoints

RULES = (
  ("(hidden|head)/kernel", PartitionSpec("fsdp", None)),
  ("hidden/bias", PartitionSpec("tensor")),
)


def mesh_of(devices, **sizes):
  return make_mesh(MeshSpec(**sizes), jax.devices()[:devices])


def assert_close(first, second):
  for name in ("best_step", "steps", "ended_by"):
    assert getattr(first, name) == getattr(second, name)
  for name, value in first.metrics.items():
    np.testing.assert_allclose(second.metrics[name], value, rtol=1e-5)
  ours, theirs = (
    nnx.to_pure_dict(nnx.state(result.model, nnx.Param))
    for result in (first, second)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6
    ),
    ours,
    theirs,
  )


class Wide(nnx.Module):
  """Sizes that every mesh divides, and no batch statistics."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(6, 16, rngs=rngs)
    self.dropout = nnx.Dropout(0.2, rngs=rngs)
    self.head = nnx.Linear(16, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(self.dropout(nnx.relu(self.hidden(x))))


def build():
  return Wide(rngs=nnx.Rngs(0))


def test_a_run_on_a_mesh_is_that_of_one_device(run, problem):
  del problem
  alone = run("alone", model=build)
  sizes = {"fsdp": 2, "tensor": 2}
  many = run("many", model=build, mesh=mesh_of(8, **sizes), rules=RULES)
  assert_close(alone, many)
  kernel = many.model.hidden.kernel[...]
  assert kernel.sharding.shard_shape(kernel.shape) == (3, 16)


def test_sizes_alone_are_a_mesh(run):
  rows = run("sizes", mesh=MeshSpec(fsdp=2), epochs=1).model.head.kernel[...]
  assert len(rows.sharding.device_set) == 8


def test_a_module_and_what_builds_it_give_the_same_run(run, one_device):
  built = run("built", model=build, mesh=one_device)
  given = run("given", model=build(), mesh=one_device)
  assert_close(built, given)


def test_rules_that_do_not_fit_are_told_by_path(run):
  with pytest.raises(ValueError, match=r"head/bias.*dimension 0 of size 3"):
    run(rules=[("head/bias", PartitionSpec("data"))], mesh=MeshSpec())
  with pytest.raises(ValueError, match="nowhere"):
    run(rules=[("nowhere/.*", PartitionSpec())], mesh=MeshSpec())


def _tables():
  return {
    "language": (
      lambda: dj.models.LanguageModel(
        16, features=16, num_layers=2, num_heads=2, scan=True, rngs=nnx.Rngs(0)
      ),
      "language",
    ),
    "classifier": (
      lambda: dj.models.Classifier(
        (8, 8, 1), 10, channels=(8,), lstm_features=8, rngs=nnx.Rngs(0)
      ),
      "classification",
    ),
  }


@pytest.mark.parametrize("kind", ["language", "classifier"])
def test_every_model_of_the_library_has_its_table(kind):
  make, task = _tables()[kind]
  where = placement.Placement(mesh_of(8, data=1, fsdp=2, tensor=4))
  shapes, shardings = initial.abstract_state(
    make, dj.optim.deepseek(1e-2), task, where
  )
  cut = [
    path
    for path, spec in zip(
      dj.core.tree.leaf_paths(shapes.params),
      jax.tree.leaves(shardings.params),
      strict=True,
    )
    if "tensor" in jax.tree.leaves(tuple(spec.spec))
  ]
  assert any("attention/query" in path for path in cut), cut


def test_a_state_is_made_in_parts(run):
  where = placement.Placement(mesh_of(4, data=1, fsdp=4))
  wide = lambda: nnx.Linear(512, 256, rngs=nnx.Rngs(0))
  state = initial.initial_state(wide, optax.adam(1e-3), "regression", where)
  whole = initial.initial_state(
    wide, optax.adam(1e-3), "regression", placement.Placement(mesh_of(1))
  )
  for leaf in (state.params["kernel"], state.opt_state[0].mu["kernel"]):
    assert leaf.sharding.shard_shape(leaf.shape) == (128, 256)
  np.testing.assert_array_equal(state.params["kernel"], whole.params["kernel"])


MESHES = {1: {}, 2: {"data": 1, "fsdp": 2}, 4: {"fsdp": 2}, 8: {"tensor": 2}}


@functools.cache
def _state(devices):
  where = placement.Placement(mesh_of(devices, **MESHES[devices]), RULES)
  tx = dj.optim.deepseek(1e-2)
  return initial.initial_state(build, tx, "classification", where)


def test_checkpoints_come_back_bit_for_bit_on_any_number_of_devices(
  problem, tmp_path
):
  stream = iter(dj.data.batches(problem.train, 32, prefetch=0))
  progress = {"stopping": {"best_step": None}, "seconds": 0.0}
  is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  plain = lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x)
  rng = np.random.default_rng(0)

  def filled(x):
    if is_key(x):
      return x
    noise = rng.normal(size=x.shape) * 100
    return jax.device_put(noise.astype(x.dtype), x.sharding)

  for wrote in MESHES:
    saved = jax.tree.map(filled, _state(wrote))
    checkpoints = Checkpoints(tmp_path / str(wrote))
    checkpoints.save(saved, stream, progress, step=1, best_step=None)
    checkpoints.wait()
    for reads in MESHES:
      like = _state(reads)
      found, _ = checkpoints.restore(1, like, stream)
      jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)),
        saved,
        found,
      )
      jax.tree.map(
        lambda a, b: (
          b.sharding.is_equivalent_to(a.sharding, a.ndim)
          or pytest.fail(f"{a.sharding} became {b.sharding}")
        ),
        like,
        found,
      )
    checkpoints.close()


def stop_at(step):
  """A transform that sends this process a SIGTERM as its `step`-th update."""

  def update(updates, count, params=None, **extra):
    jax.debug.callback(
      lambda now: os.kill(os.getpid(), signal.SIGTERM) if now == step else None,
      count,
    )
    return updates, count + 1

  return optax.GradientTransformationExtraArgs(
    lambda params: np.zeros((), np.int32), update
  )


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2, 4, 8])
def test_a_run_goes_on_on_other_devices(run, first):
  arguments = {
    "tx": optax.chain(optax.adam(2e-2), stop_at(7)),
    "model": build,
    "rules": RULES,
  }
  whole = run(
    "whole", model=build, tx=optax.chain(optax.adam(2e-2), stop_at(-1))
  )
  for second in MESHES.keys() - {first}:
    here, there = (mesh_of(n, **MESHES[n]) for n in (first, second))
    cut = run(f"to {second}", mesh=here, **arguments)
    assert not cut.complete
    assert_close(whole, run(f"to {second}", mesh=there, **arguments))
