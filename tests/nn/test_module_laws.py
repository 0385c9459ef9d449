"""One table of modules, one list of laws that all of them obey."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import models, nn


class Case(NamedTuple):
  build: Callable[..., nnx.Module]  # Takes dtype and rngs.
  shape: tuple[int, ...]  # Of one example.
  takes_mask: bool = True
  has_dropout: bool = True
  keeps_dtype: bool = True  # Logits are float32 in every computation.
  collapses_time: bool = False
  vocabulary: int = 0  # Of tokens, where these are the inputs.


TOKENS, IMAGE = (5, 8), (6, 7, 3)

MODULES = {
  "stage": Case(
    lambda **kwargs: nn.ConvolutionStage(3, 4, dropout=0.5, **kwargs),
    IMAGE,
    takes_mask=False,
  ),
  "stage with batch norm": Case(
    lambda **kwargs: nn.ConvolutionStage(
      3, 4, norm="batch", dropout=0.5, activation="gelu", **kwargs
    ),
    IMAGE,
    takes_mask=False,
  ),
  "stage with layer norm": Case(
    lambda **kwargs: nn.ConvolutionStage(
      3, 4, norm="layer", pool=3, kernel_size=2, **kwargs
    ),
    IMAGE,
    takes_mask=False,
    has_dropout=False,
  ),
  "lstm": Case(
    lambda **kwargs: nn.LSTM(8, 6, **kwargs), TOKENS, has_dropout=False
  ),
  "lstm in reverse": Case(
    lambda **kwargs: nn.LSTM(8, 6, reverse=True, unroll=2, **kwargs),
    TOKENS,
    has_dropout=False,
  ),
  "bidirectional lstm": Case(
    lambda **kwargs: nn.BidirectionalLSTM(8, 6, **kwargs),
    TOKENS,
    has_dropout=False,
  ),
  "attention": Case(
    lambda **kwargs: nn.MultiHeadAttention(
      8, num_heads=3, head_dim=5, dropout=0.5, **kwargs
    ),
    TOKENS,
  ),
  "attention block": Case(
    lambda **kwargs: nn.AttentionBlock(8, dropout=0.5, **kwargs), TOKENS
  ),
  "dynamic attention": Case(
    lambda **kwargs: nn.DynamicAttention(
      8,
      num_heads=4,
      num_kv_heads=2,
      block_size=2,
      window=2,
      num_remote=1,
      hash_bits=2,
      learn_window=True,
      dropout=0.5,
      **kwargs,
    ),
    TOKENS,
  ),
  "annealed dynamic attention block": Case(
    lambda **kwargs: nn.AttentionBlock(
      8,
      attention="dynamic",
      attention_options={
        "block_size": 2,
        "window": 2,
        "hash_bits": 1,
        "schedule": ((0, None), (1, 1)),
      },
      dropout=0.5,
      **kwargs,
    ),
    TOKENS,
  ),
  "gated feed-forward": Case(
    lambda **kwargs: nn.GatedFeedForward(
      8, 12, activation="dynamic_sparse_relu", **kwargs
    ),
    TOKENS,
    takes_mask=False,
    has_dropout=False,
  ),
  "mixture of experts": Case(
    lambda **kwargs: nn.MixtureOfExperts(8, 12, 4, num_shared=1, **kwargs),
    TOKENS,
    takes_mask=False,
    has_dropout=False,
  ),
  "mixture with an auxiliary loss": Case(
    lambda **kwargs: nn.MixtureOfExperts(
      8, 12, 4, top_k=1, gate="softmax", balance="auxiliary", **kwargs
    ),
    TOKENS,
    takes_mask=False,
    has_dropout=False,
  ),
  "layer stack": Case(
    lambda **kwargs: nn.LayerStack(
      [nn.AttentionBlock(8, dropout=0.5, **kwargs) for _ in range(2)],
      scan=True,
      remat=True,
    ),
    TOKENS,
  ),
  "recurrent attention": Case(
    lambda **kwargs: models.RecurrentAttention(
      8, features=4, num_layers=2, bidirectional=True, dropout=0.5, **kwargs
    ),
    TOKENS,
  ),
  **{
    f"head with {pooling} pooling": Case(
      lambda dtype, rngs, pooling=pooling: nn.ClassificationHead(
        8, 3, pooling=pooling, dropout=0.5, rngs=rngs
      ),
      TOKENS,
      keeps_dtype=False,
      collapses_time=True,
    )
    for pooling in ("last", "mean", "max", "attention")
  },
  "classifier": Case(
    lambda **kwargs: models.Classifier(
      IMAGE,
      3,
      channels=(4, 4),
      norm="batch",
      sequence="positions",
      lstm_features=4,
      lstm_layers=2,
      bidirectional=True,
      num_heads=2,
      head_dim=3,
      pooling="attention",
      dropout=0.5,
      **kwargs,
    ),
    IMAGE,
    takes_mask=False,
    keeps_dtype=False,
  ),
  "language model": Case(
    lambda **kwargs: models.LanguageModel(
      11,
      features=8,
      num_layers=2,
      num_heads=2,
      activation="dynamic_sparse_relu",
      dropout=0.5,
      separator=0,
      scan=True,
      **kwargs,
    ),
    (6,),
    takes_mask=False,
    keeps_dtype=False,
    vocabulary=11,
  ),
}

# Their branches are compiled in other rows too.
SLOW = (
  "annealed dynamic attention block",
  "mixture with an auxiliary loss",
)


def each(names):
  marks = lambda name: pytest.mark.slow if name in SLOW else ()
  return pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name)) for name in names]
  )


each_module = each(MODULES)
each_masked = each(name for name, case in MODULES.items() if case.takes_mask)
each_mode = pytest.mark.parametrize(
  "graph", [True, False], ids=["graph", "tree"]
)


@contextlib.contextmanager
def nnx_mode(graph: bool):
  with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
    yield


@functools.cache
def initial(name: str, dtype, graph: bool):
  """Building compiles each initializer: once for all laws."""
  return nnx.split(MODULES[name].build(dtype=dtype, rngs=nnx.Rngs(0)))


def build(name: str, dtype=jnp.float32, *, train: bool = False, graph=True):
  graphdef, state = initial(name, dtype, graph)
  module = nnx.merge(graphdef, state, copy=True)
  module.train() if train else module.eval()
  return module


def inputs(name: str, dtype=jnp.float32, batch: int = 3) -> jax.Array:
  shape, rng = (batch, *MODULES[name].shape), np.random.default_rng(1)
  if MODULES[name].vocabulary:
    tokens = rng.integers(MODULES[name].vocabulary, size=shape)
    return jnp.asarray(tokens, jnp.int32)
  return jnp.asarray(rng.normal(size=shape), dtype)


def pure_split(module: nnx.Module):
  graphdef, params, rest = nnx.split(module, nnx.Param, ...)
  return graphdef, nnx.as_pure(params), nnx.as_pure(rest)


@functools.partial(jax.jit, static_argnums=0)
def apply_pure(graphdef, params, rest, *arguments):
  return nnx.merge(graphdef, params, rest)(*arguments)


def apply(module: nnx.Module, *arguments: Any) -> Any:
  """Runs a module as the trainer does; drops its new state."""
  return apply_pure(*pure_split(module), *arguments)


def shapes(tree: Any) -> Any:
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@each_module
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_dtype_of_the_computation_is_the_dtype_of_the_result(name, dtype):
  def run(x):
    module = MODULES[name].build(dtype=dtype, rngs=nnx.Rngs(0))
    return module(x), pure_split(module)[1]

  result, params = jax.eval_shape(run, inputs(name, dtype))
  keeps = MODULES[name].keeps_dtype
  assert result.dtype == (dtype if keeps else jnp.float32)
  leaves = jax.tree.leaves(params)
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


@each_module
def test_jit_equals_eager(name):
  module, x = build(name), inputs(name)
  np.testing.assert_allclose(apply(module, x), module(x), rtol=1e-5, atol=1e-6)


def training_step(name: str, graphdef):
  def loss(params, rest):
    module = nnx.merge(graphdef, params, rest)
    value = jnp.square(module(inputs(name))).mean()
    return value, pure_split(module)[2]

  return jax.grad(loss, has_aux=True)


@each_module
@each_mode
def test_training_step_keeps_every_shape(name, graph):
  with nnx_mode(graph):
    module = build(name, train=True, graph=graph)
    graphdef, params, rest = pure_split(module)
    step = training_step(name, graphdef)
    grads, new_rest = jax.eval_shape(step, params, rest)
  assert shapes(grads) == shapes(params)
  assert shapes(new_rest) == shapes(rest)


@each_module
def test_gradients_are_finite_and_somewhere_not_zero(name):
  graphdef, params, rest = pure_split(build(name, train=True))
  grads, _ = jax.jit(training_step(name, graphdef))(params, rest)
  grads = jax.tree.leaves(grads)
  assert all(np.isfinite(grad).all() for grad in grads)
  assert any(np.any(grad != 0) for grad in grads)


@each_module
def test_tree_mode_equals_graph_mode(name):
  x = inputs(name)
  with nnx_mode(graph=True):
    expected = apply(build(name), x)
  with nnx_mode(graph=False):
    np.testing.assert_array_equal(apply(build(name, graph=False), x), expected)


@each_module
def test_merged_module_is_the_module(name):
  module, x = build(name), inputs(name)
  merged = nnx.merge(*pure_split(module))
  np.testing.assert_array_equal(apply(merged, x), apply(module, x))


@each_module
def test_dropout_is_active_in_training_only(name):
  module, x = build(name), inputs(name)
  graphdef = nnx.graphdef(module)
  evaluated = apply(module, x)
  np.testing.assert_array_equal(apply(module, x), evaluated)

  module.train()
  trained = apply(module, x)
  if MODULES[name].has_dropout:
    assert np.any(np.asarray(trained) != np.asarray(evaluated))

  module.eval()
  assert nnx.graphdef(module) == graphdef
  np.testing.assert_array_equal(apply(module, x), evaluated)


@each_module
def test_examples_of_a_batch_do_not_see_each_other(name):
  module, x = build(name), inputs(name)
  together = apply(module, x)
  changed = apply(module, x.at[1:].set(7))
  np.testing.assert_allclose(changed[0], together[0], rtol=1e-5, atol=1e-6)


@each_module
def test_parameters_carry_no_sharding(name):
  for _, variable in nnx.iter_graph(build(name)):
    if isinstance(variable, nnx.Param):
      assert not variable.get_metadata().get("out_sharding")


@each_masked
def test_appended_padding_changes_nothing(name):
  module, x = build(name), inputs(name)
  batch, steps = x.shape[:2]
  full = jnp.ones((batch, steps), bool)
  expected = apply(module, x, full)
  np.testing.assert_allclose(apply(module, x), expected, rtol=1e-5, atol=1e-6)

  padded = jnp.concatenate([x, jnp.full_like(x[:, :2], 1e3)], axis=1)
  mask = jnp.concatenate([full, jnp.zeros((batch, 2), bool)], axis=1)
  result = apply(module, padded, mask)
  if not MODULES[name].collapses_time:
    result = result[:, :steps]
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@each_masked
def test_content_of_padding_never_matters(name):
  module, x = build(name), inputs(name)
  mask = jnp.array(np.random.default_rng(2).random(x.shape[:2]) < 0.6)
  other = jnp.where(mask[..., None], x, 1e3)
  first, second = apply(module, x, mask), apply(module, other, mask)
  if not MODULES[name].collapses_time:
    first, second = (y * mask[..., None] for y in (first, second))
  np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


@each_masked
def test_gradients_of_all_padding_are_finite(name):
  module, x = build(name), inputs(name)
  graphdef, params, rest = pure_split(module)
  mask = jnp.zeros(x.shape[:2], bool)

  @jax.jit
  @jax.grad
  def grads(params):
    return jnp.square(nnx.merge(graphdef, params, rest)(x, mask)).sum()

  for grad in jax.tree.leaves(grads(params)):
    assert np.isfinite(grad).all()
