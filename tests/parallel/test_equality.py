"""The law of meshes: training on any of them is training on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from deepseek_jax import models, parallel
from deepseek_jax.core import tree as tree_lib
from deepseek_jax.parallel import MeshSpec
from deepseek_jax.train import losses, state, step
from deepseek_jax.train.placement import Placement

STEPS = 3
# Half of the time that these tests would take is LLVM's.
HASTE = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
ROWS, TOKENS, VOCABULARY = 8, 16, 32
DYNAMIC = {"block_size": 4, "window": 8, "num_remote": 2}


def _language(**options):
  options = {
    "features": 16,
    "num_layers": 2,
    "num_heads": 4,
    "hidden": 32,
    "separator": 1,
    "rngs": nnx.Rngs(0),
  } | options
  return models.LanguageModel(VOCABULARY, **options)


def _classifier(**options):
  return models.Classifier(
    (8, 8, 1),
    4,
    channels=(4,),
    lstm_features=16,
    sequence="positions",
    rngs=nnx.Rngs(0),
    **options,
  )


LANGUAGE = {
  "full": dict(tied=False, num_kv_heads=2, scan=True),
  # Blocks to choose, a schedule, thresholds, random streams.
  "everything": dict(
    attention="dynamic",
    attention_options=DYNAMIC | {"schedule": [[0, None], [1, 2]]},
    activation="target_sparse_relu",
    dropout=0.1,
    scan=True,
  ),
  "experts": dict(
    experts=4,
    experts_options={"top_k": 2, "num_shared": 1, "bias_rate": 0.02},
    hidden=16,
    scan=True,
  ),
}
CLASSIFIER = dict(norm="batch", pooling="attention", dropout=0.1)
MIXED = MeshSpec(data=1, fsdp=2, sequence=2, tensor=2)
SPECS = {
  "language": step.StepSpec(
    loss=losses.TokenCrossEntropy(),
    inputs=("tokens",),
    target="targets",
    task="language",
  ),
  "classification": step.StepSpec(
    loss=losses.CrossEntropy(),
    inputs=("images",),
    target="labels",
    task="classification",
  ),
}

TRANSFORMS = {
  "language": optax.adam(1e-2, eps=1e-4),
  # Nothing that makes steps of a gradient that is 0 but for rounding, as that
  # of a bias before a norm.
  "classification": optax.sgd(0.1, momentum=0.9),
}


def _batch(task, number):
  rng = np.random.default_rng(number)
  if task == "language":
    tokens = rng.integers(VOCABULARY, size=(ROWS, TOKENS + 1), dtype=np.int32)
    data = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
  else:
    images = rng.normal(size=(ROWS, 8, 8, 1)).astype(np.float32)
    data = {"images": images, "labels": rng.integers(4, size=ROWS)}
  return data | {"mask": np.ones(ROWS, np.float32)}


def _train(build, task, mesh):
  """Returns the state after every step, on the host."""
  model = build()
  model.train()
  tx = TRANSFORMS[task]
  begun = state.create(model, tx, task=task)
  where = Placement(mesh).shardings(begun, model)
  run = step.jit_once(
    step.make_train_step(state.split(model)[0], tx, SPECS[task]),
    "step",
    mesh=mesh,
    out_shardings=where,
    compiler_options=HASTE,
  )
  begun, found = jax.device_put(begun, where), []
  for number in range(STEPS):
    begun = run(begun, parallel.put_batch(_batch(task, number), mesh))
    found.append(jax.device_get(_without_keys(begun)))
  return found


def _without_keys(tree):
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
    lambda x: jax.random.key_data(x) if is_key(x) else x, tree
  )


ALONE = parallel.make_mesh(MeshSpec(data=1), jax.devices()[:1])


MESH = parallel.make_mesh(MIXED)


def _check(task, expected, build, spec):
  found = _train(build, task, parallel.make_mesh(spec))
  for i, (one, many) in enumerate(zip(expected, found, strict=True)):
    _assert_near(one, many, f"{spec}, step {i}")


def _assert_near(one, many, what):
  paths = tree_lib.leaf_paths(one)
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True)
  for path, (a, b) in zip(paths, pairs, strict=True):
    np.testing.assert_allclose(
      b, a, rtol=1e-5, atol=1e-6, err_msg=f"{what}: {path}"
    )


def test_a_gradient_on_all_kinds_of_axes_is_that_of_one_device():
  model = _language(num_layers=1, num_kv_heads=2, separator=None)
  structure, params, rest = state.split(model)
  specs = parallel.specs(params, parallel.LANGUAGE_MODEL, MESH.abstract_mesh)
  tokens = jnp.asarray(_batch("language", 0)["tokens"])

  def gradient(params):
    logits = lambda params: nnx.merge(structure, params, rest)(tokens)
    loss = lambda params: jnp.mean(jax.nn.logsumexp(logits(params), -1))
    return jax.value_and_grad(loss)(params)

  one = jax.jit(gradient)(params)
  params = jax.device_put(
    params, jax.tree.map(lambda spec: NamedSharding(MESH, spec), specs)
  )
  with step.on_mesh(MESH):
    many = jax.jit(gradient)(params)
  _assert_near(one, many, "gradient")


@pytest.mark.slow
def test_a_language_model_trains_as_on_one_device():
  build = lambda **options: _language(**LANGUAGE["full"], **options)
  expected = _train(build, "language", ALONE)
  stages = MeshSpec(data=1, stage=2, fsdp=2, sequence=2)
  _check("language", expected, lambda: build(microbatches=2), stages)


@pytest.mark.slow
def test_everything_that_has_state_trains_as_on_one_device():
  build = lambda: _language(**LANGUAGE["everything"])
  _check("language", _train(build, "language", ALONE), build, MIXED)


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["bias", "auxiliary"])
def test_experts_train_as_on_one_device(balance):
  options = LANGUAGE["experts"]
  experts = options["experts_options"] | {"balance": balance}
  build = lambda: _language(**options | {"experts_options": experts})
  mixed = MeshSpec(data=1, fsdp=2, expert=2, tensor=2)
  _check("language", _train(build, "language", ALONE), build, mixed)


@pytest.mark.slow
def test_a_classifier_trains_as_on_one_device():
  build = lambda: _classifier(**CLASSIFIER)
  expected = _train(build, "classification", ALONE)
  _check("classification", expected, build, MIXED)
