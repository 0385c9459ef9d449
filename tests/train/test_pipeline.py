"""A language model in a pipeline trains as on one device."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax import models
from deepseek_jax.parallel import MeshSpec, make_mesh
from deepseek_jax.train import losses, placement
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.step import StepSpec, jit_once, make_train_step

VOCAB, ROWS, TIME, STEPS = 16, 8, 16, 3
ACTIVATION = {
  "activation": "target_sparse_relu",
  "activation_options": {"sparsity": 0.8, "warmup": 4, "pressure": 0.5},
}
SPARSE = ACTIVATION | {
  "attention": "dynamic",
  "attention_options": {
    "block_size": 4,
    "window": 4,
    "num_remote": 1,
    "num_hashes": 1,
    "hash_bits": 2,
  },
  "separator": None,
}


def build(**options):
  defaults = {
    "features": 16,
    "num_layers": 4,
    "num_heads": 2,
    "hidden": 16,
    "separator": 0,
    "scan": True,
  }
  return models.LanguageModel(VOCAB, **defaults | options, rngs=nnx.Rngs(0))


def batches():
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    text = rng.integers(0, VOCAB, (ROWS, TIME + 1)).astype(np.int32)
    mask = np.ones(ROWS, np.float32)
    mask[-1] = 0
    yield {"text": text[:, :-1], "next": text[:, 1:], "mask": mask}


def trained(mesh, options):
  """The losses of a few steps, and the state after them."""
  model = build(**options)
  where = placement.Placement(mesh)
  tx = optax.sgd(0.3, momentum=0.9)
  spec = StepSpec(
    loss=losses.TokenCrossEntropy(),
    inputs=("text",),
    target="next",
    task="language",
    token_bytes=np.ones(VOCAB, np.int32),
  )
  state = state_lib.create(model, tx, task="language")
  shardings = where.shardings(state, model)
  state = jax.device_put(state, shardings)
  step = jit_once(
    make_train_step(state_lib.structures(model)[0], tx, spec),
    "training step",
    mesh=where.mesh,
    out_shardings=shardings,
    # Hastily, as the default run does: nearly all of the time goes to this.
    compiler_options={
      "xla_backend_optimization_level": 0,
      "xla_llvm_disable_expensive_passes": True,
    },
  )
  found = []
  for batch in batches():
    state = step(state, jax.device_put(batch, where.rows))
    found.append(float(state.metrics["loss"].compute()))
  return found, state


def plain(x):
  is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("sizes", "options"),
  [
    (
      {"stage": 2, "data": 2, "tensor": 2},
      {"repeats": 2, "remat": True, "microbatches": 4},
    ),
    ({"stage": 2, "data": 1, "fsdp": 2}, SPARSE | {"microbatches": 2}),
  ],
  ids=["circular", "sparse"],
)
def test_a_pipeline_trains_as_one_device_does(sizes, options):
  devices = int(np.prod([*sizes.values()]))
  mesh = make_mesh(MeshSpec(**sizes), jax.devices()[:devices])
  alone = make_mesh(MeshSpec(), jax.devices()[:1])
  values, state = trained(mesh, options)
  expected, wanted = trained(alone, options)
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  assert values[-1] < values[0]
  assert int(state.skipped) == 0
  for found, one in (
    (state.params, wanted.params),
    (state.rest, wanted.rest),
  ):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        plain(a), plain(b), rtol=1e-5, atol=2e-6
      ),
      found,
      one,
    )
  # Every stage has its layers only.
  kernel = state.params["layers"]["layers"][0]["attention"]["out"]["kernel"]
  layers = kernel.shape[0] // sizes["stage"]
  assert kernel.sharding.shard_shape(kernel.shape)[0] == layers
