"""State: its types, its places, its way to a file and back; odd trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from exchanges import (
  PLACEMENTS,
  SMALL,
  Placement,
  Run,
  assert_equal,
  gradients,
  joined,
  mean,
  params,
  prepared,
)

from deepseek_jax import comm

AT = PLACEMENTS["data"]
ONE = Placement((1,), ("data",), "data")
SHAPES = {"bias": (3,), "kernel": (6, 8)}
MAKERS = {
  "bf16": comm.bf16_all_reduce,
  "int8": comm.int_all_reduce,
  "one_bit": functools.partial(comm.one_bit, block=8),
  "top_k": functools.partial(comm.top_k, fraction=1),
  "power_sgd": functools.partial(comm.power_sgd, rank=6),
}


def test_a_file_of_orbax_holds_the_state(tmp_path):
  run, at = prepared("int8", "data"), AT
  _, state = run(gradients(at.devices))
  shaped = lambda x, spec: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.NamedSharding(at.mesh, spec)
  )
  abstract = jax.tree.map(shaped, state, run.state_specs)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", abstract)
  assert_equal(restored, state)
  later = gradients(at.devices, seed=1)
  assert_equal(run(later, restored), run(later, state))


def test_each_device_holds_its_own_errors_alone():
  for place in ("data", "fsdp", "both"):
    run = prepared("int8", place)
    for leaf in jax.tree.leaves(run.start.errors):
      assert leaf.shape[0] == run.placement.devices
      (shard, *_) = leaf.addressable_shards
      assert shard.data.shape == (1, *leaf.shape[1:])


def test_states_of_other_numbers_of_devices_have_other_shapes():
  # That is how one sees that errors are of no use there.
  shapes = {}
  for count in (2, 4, 8):
    at = Placement((count,), ("data",), "data")
    tx = comm.int_all_reduce("data", **SMALL)
    state = jax.eval_shape(
      lambda params, tx=tx, at=at: comm.init(tx, params, at.mesh, "data"),
      params(),
    )
    shapes[count] = [x.shape for x in jax.tree.leaves(state.errors)]
  for count, found in shapes.items():
    assert {shape[0] for shape in found} == {count}


@pytest.mark.parametrize("name", MAKERS)
def test_one_device_exchanges_with_itself(name):
  tx = MAKERS[name]("data", min_size=0)
  run = Run(tx, ONE, params(SHAPES))
  grads = gradients(1, shapes=SHAPES)
  updates, state = run(grads)
  assert state.sent_bytes == 0
  for leaf, exact in mean(grads).items():
    found = np.asarray(updates[leaf])[:, 0]
    assert np.isfinite(found).all()
    if leaf == "bias" or name in ("top_k", "power_sgd"):
      size = np.abs(exact).max()
      np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("int8", jnp.bfloat16),
    ("power_sgd", jnp.bfloat16),
    ("one_bit", jnp.float16),
    ("top_k", jnp.float16),
  ],
)
def test_types_are_kept(name, dtype):
  run = Run(MAKERS[name]("data", min_size=0), AT, params(SHAPES, dtype))
  grads = gradients(AT.devices, shapes=SHAPES, dtype=dtype)
  grads["kernel"][0, 0, 0, 0] = np.inf
  updates, state = run(grads)
  assert {x.dtype for x in updates.values()} == {jnp.dtype(dtype)}
  errors = jax.tree.leaves(state.errors)
  assert {x.dtype for x in errors} <= {jnp.dtype(jnp.float32), np.dtype(bool)}
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_small_parameters_are_summed_in_float32():
  # In bfloat16, 256 + 1 is 256.
  grads = np.ones((4, AT.devices, 3), jnp.bfloat16)
  grads[:, 0] = 256
  tx = comm.int_all_reduce("data")
  run = Run(tx, AT, {"bias": jnp.zeros(3, jnp.bfloat16)})
  updates, _ = run({"bias": grads})
  expected = np.float32((256 + AT.devices - 1) / AT.devices)
  np.testing.assert_array_equal(
    np.asarray(updates["bias"]), expected.astype(jnp.bfloat16)
  )


def test_trees_of_nothing_and_of_scalars():
  for shapes in ({}, {"scale": ()}):
    for name, make in MAKERS.items():
      tx = make("data")
      start = params(shapes)
      step = jax.shard_map(
        lambda x, tx=tx: tx.update(x, tx.init(x), x),
        mesh=AT.mesh,
        in_specs=(jax.P(),),
        out_specs=jax.P(),
        check_vma=False,
      )
      updates, _ = jax.eval_shape(step, start)
      assert set(updates) == set(shapes), name


def test_it_chains_with_optimizers_and_their_hyperparameters():
  adam = optax.inject_hyperparams(optax.adam)(1e-2)
  exchange = comm.int_all_reduce("data", **SMALL)
  labels = lambda tree: {name: str(name == "first") for name in tree}
  tx = optax.chain(
    optax.partition({"True": exchange, "False": optax.identity()}, labels),
    adam,
  )
  run = Run(tx, AT, params())
  grads = gradients(AT.devices)
  same = {name: np.repeat(x[:, :1], 4, 1) for name, x in grads.items()}
  same["first"] = grads["first"]
  updates, _ = run(same)
  updates = joined(AT, updates)
  alone = adam.init(params())
  for step in range(4):
    exact = {name: x[step].mean(0) for name, x in same.items()}
    expected, alone = adam.update(exact, alone, params())
    np.testing.assert_allclose(
      updates["bias"][step], expected["bias"], rtol=1e-4, atol=1e-6
    )
    if step == 0:  # All of Adam's first steps are as long.
      np.testing.assert_allclose(
        np.abs(updates["first"][0]), 1e-2, rtol=0, atol=2e-3
      )


def test_a_state_can_be_given_away():
  run = prepared("int8", "data")
  donating = jax.jit(run.program, donate_argnums=1)
  grads = gradients(AT.devices)
  expected = run(grads)
  state = jax.tree.map(jnp.copy, run.start)
  found = donating(grads, state, run.params)
  assert_equal(jax.block_until_ready(found), expected)


def test_states_of_workers_can_be_given_away():
  tx = comm.diloco(optax.sgd(0.1), "data", period=2, overlap=True)
  state = comm.init(tx, params(SHAPES), AT.mesh, "data")
  same = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
  jax.block_until_ready(same(state))  # None of its arrays is there twice.
