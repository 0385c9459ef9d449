"""Laws of language models whose feed-forwards are mixtures of experts."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import models, nn, parallel
from deepseek_jax.train import state as state_lib

VOCAB, BATCH, TIME = 13, 8, 16
slow = pytest.mark.slow


def build(num_layers=2, **options):
  defaults = {
    "features": 16, "num_heads": 2, "hidden": 12, "experts": 4,
    "experts_options": {"num_shared": 1, "bias_rate": 0.01}, "separator": 0,
  }  # fmt: skip
  return models.LanguageModel(
    VOCAB, num_layers=num_layers, **defaults | options, rngs=nnx.Rngs(0)
  )


@functools.cache
def loop():
  return build()


def model(**options):
  """The layers of `loop`, run in another way."""
  changed = nnx.clone(loop())
  changed.layers = nn.LayerStack(changed.layers.unstacked(), **options)
  return changed


def draw(batch=BATCH, time=TIME, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(1, VOCAB, (batch, time)), jnp.int32)


def training_step(module):
  structure, params, rest = state_lib.split(module)

  def loss(params, rest, tokens):
    module = nnx.merge(structure, params, rest)
    logits = jax.nn.log_softmax(module(tokens)[:, :-1])
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)
    return -chosen.mean(), state_lib.split(module)[2]

  return jax.value_and_grad(loss, has_aux=True), params, rest


def one_by_one(tree, depth=2):
  """Cuts stacked layers apart."""
  (layers,) = tree["layers"]["layers"].values()
  cut = lambda i: jax.tree.map(lambda x: x[i], layers)
  return tree | {"layers": {"layers": {i: cut(i) for i in range(depth)}}}


@functools.cache
def trained(**options):
  """Loss, state and gradients of a step, as those of layers one by one."""
  step, *state = training_step(model(**options))
  (loss, rest), grads = plain(jax.jit(step)(*state, draw()))
  if options.get("scan"):
    rest, grads = one_by_one(rest), one_by_one(grads)
  return loss, rest, grads


def plain(tree):
  """Fetches arrays; of random streams their numbers."""
  is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.device_get(
    jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)
  )


def assert_equal(found, expected, rtol=1e-5):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


@slow
@pytest.mark.parametrize("remat", [True, "dots"])
def test_scan_and_remat_change_nothing(remat):
  expected = trained()
  assert_equal(trained(scan=True, remat=remat), expected)
  for layer in expected[1]["layers"]["layers"].values():
    assert layer["feed_forward"]["bias"].any()
    assert layer["feed_forward"]["reading"]["calls"] == 1
  assert all(grad.any() for grad in jax.tree.leaves(expected[2]))


def test_tokens_do_not_see_later_ones_through_their_experts():
  module = nnx.clone(loop())
  module.eval()
  run, tokens = jax.jit(lambda tokens: module(tokens)), draw()
  before = run(tokens)
  after = run(tokens.at[:, 9:].set(draw(seed=1)[:, 9:]))
  np.testing.assert_allclose(after[:, :9], before[:, :9], atol=1e-5)
  assert np.abs(after - before)[:, 9:].max() > 0.1


@pytest.mark.parametrize("scan", [pytest.param(True, marks=slow), False])
def test_decoding_is_the_call(scan):
  module = model(scan=scan)
  module.eval()
  tokens = draw(batch=1, time=9)
  expected = jax.jit(lambda tokens: module(tokens))(tokens)
  prefill, decode = jax.jit(module.prefill), jax.jit(module.decode)
  logits, caches = prefill(tokens[:, :6], module.init_cache(1, 9))
  np.testing.assert_allclose(logits, expected[:, 5], atol=1e-5)
  for place in (6, 7, 8):
    logits, caches = decode(tokens[:, place], caches)
    np.testing.assert_allclose(logits, expected[:, place], atol=1e-5)


@slow
@pytest.mark.parametrize(
  ("sizes", "options"),
  [
    ({"expert": 2, "fsdp": 2, "tensor": 2}, {"remat": True}),
    ({"stage": 2, "expert": 2, "data": 2}, {"microbatches": 2}),
  ],
  ids=str,
)
def test_any_mesh_computes_what_one_device_does(sizes, options):
  step, *state = training_step(model(scan=True, **options))
  expected = plain(jax.jit(step)(*state, draw()))
  mesh = parallel.make_mesh(parallel.MeshSpec(**{"data": 1} | sizes))
  places = parallel.joint_specs(state, parallel.LANGUAGE_MODEL, mesh)
  place = lambda spec: jax.sharding.NamedSharding(mesh, spec)
  rows = place(jax.sharding.PartitionSpec(parallel.BATCH_AXES))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    arguments = jax.device_put(
      (*state, draw()), (*jax.tree.map(place, places), rows)
    )
    found = plain(jax.jit(step)(*arguments))
  assert_equal(found, expected, rtol=2e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_a_token_pays_for_the_experts_it_goes_through(scan):
  options = {"num_shared": 1, "top_k": 3}
  sparse, dense = (
    nnx.eval_shape(lambda options=options: build(scan=scan, **options))
    for options in (
      {"experts": 32, "experts_options": options},
      {"experts": 0, "experts_options": None, "hidden": 4 * 12},
    )
  )
  router = 2 * 16 * 32
  found = models.token_flops(sparse, TIME) - 6 * router
  assert found == pytest.approx(models.token_flops(dense, TIME))


WRONG = {
  "experts": ({"experts": -1}, "^experts must be .*got experts=-1"),
  "half an expert": ({"experts": 2.5}, "^experts must be .*experts=2.5"),
  "top_k": (
    {"experts_options": {"top_k": 5}},
    "^top_k must be at most num_experts.*top_k=5 for num_experts=4",
  ),
  "options of nothing": (
    {"experts": 0},
    "^experts_options are those of experts above 0.*num_shared.*experts=0",
  ),
  "options of the model": (
    {"experts_options": {"hidden": 3}},
    "^experts_options must not have hidden.*hidden=3",
  ),
  "an option that there is not": (
    {"experts_options": {"topk": 1}},
    "^experts_options must be of top_k, num_shared, .*got 'topk'; .* 'top_k'",
  ),
  "options of an activation": (
    {"activation_options": {"sparsity": 0.9}},
    "^activation_options must be empty with experts.*sparsity",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  wrong, message = WRONG[name]
  with pytest.raises(ValueError, match=message):
    build(num_layers=1, **wrong)
