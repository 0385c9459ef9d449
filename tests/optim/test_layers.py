"""`layerwise_lr_decay`: which level a path is on, and what follows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax import optim
from deepseek_jax.core import leaf_paths
from deepseek_jax.optim.layers import layerwise_lr_decay


def tree_of(*paths, dtype=jnp.float32):
  """Nested dictionaries of ones, from paths."""
  tree = {}
  for path in paths:
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = jnp.ones(2, dtype)
  return tree


def multipliers(tx, tree):
  """From path to what the update of ones became; the state says the same."""
  updates, state = tx.update(tree, tx.init(tree))
  found = [float(leaf[0]) for leaf in jax.tree.leaves(updates)]
  np.testing.assert_allclose(state.rate_scales, found, rtol=1e-6)
  return dict(zip(leaf_paths(tree), found, strict=True))


@pytest.mark.parametrize(
  ("path", "level"),
  [
    ("embed/embedding", 0),
    ("token/embedding", 0),
    ("encoder/patch_embed/kernel", 0),
    ("pos_embedding", 0),
    ("stem/0/kernel", 0),
    ("conv_stem/kernel", 0),
    ("layers/0/kernel", 1),
    ("encoder/layers/3/attention/0/kernel", 4),
    ("layers/2/embed_positions/kernel", 3),
    ("layers/1/conv2/kernel", 2),
    ("head/kernel", 6),
    ("unembed/kernel", 6),
    ("system/kernel", 6),
    ("norm/scale", 6),
  ],
)
def test_the_level_comes_from_the_path(path, level):
  read = multipliers(layerwise_lr_decay(0.5, depth=6), tree_of(path))
  assert read == {path: 0.5 ** (6 - level)}


def test_the_last_layer_is_below_the_head_or_beside_it():
  tree = tree_of("embed/kernel", "layers/0/w", "layers/1/w", "head/kernel")
  apart = multipliers(layerwise_lr_decay(0.1, depth=3), tree)
  beside = multipliers(layerwise_lr_decay(0.1, depth=2), tree)
  assert list(apart) == list(beside)
  np.testing.assert_allclose(list(apart.values()), [1e-3, 1, 1e-2, 1e-1])
  np.testing.assert_allclose(list(beside.values()), [1e-2, 1, 1e-1, 1])


@pytest.mark.parametrize(
  "level",
  [
    [("Dense_0/.*", 0), ("Dense_1/.*", 1), (".*", 2)],
    lambda path: {"Dense_0/w": 0, "Dense_1/w": 1}.get(path, 2),
  ],
)
def test_a_table_or_a_function_says_the_level(level):
  tree = tree_of("Dense_0/w", "Dense_1/w", "out/w")
  read = multipliers(layerwise_lr_decay(0.5, 2, level=level), tree)
  assert list(read.values()) == [0.25, 0.5, 1.0]


def test_other_names_can_be_the_bottom():
  tree = tree_of("wte/w", "layers/0/w", "head/w")
  tx = layerwise_lr_decay(0.5, 2, bottom=["wte/.*", "wpe/.*"])
  assert list(multipliers(tx, tree).values()) == [1.0, 0.5, 0.25]


def test_layers_of_an_nnx_module_are_numbered():
  linear = lambda: nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
  model = nnx.Sequential(linear(), linear(), linear())
  state = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
  tx = layerwise_lr_decay(0.5, depth=3)
  updates, _ = tx.update(state, tx.init(state))
  found = [float(leaf[0, 0]) for leaf in jax.tree.leaves(updates)]
  assert found == [0.25, 0.5, 1.0]


def test_rates_are_read_back():
  tree = tree_of("embed/w", "layers/0/w", "head/w")
  tx = optax.chain(
    optax.scale_by_adam(), layerwise_lr_decay(0.5, 2), optim.scale_by_rate(0.4)
  )
  rates = optim.learning_rates(tx.init(tree), tree)
  np.testing.assert_allclose(list(rates.values()), [0.1, 0.4, 0.2], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_injected_rate_and_depth_do_the_same(dtype):
  tree = tree_of("embed/w", "layers/0/w", "head/w", dtype=dtype)
  inject = optax.inject_hyperparams(
    layerwise_lr_decay, hyperparam_dtype=jnp.float32
  )
  tx = inject(rate=0.7, depth=2)
  updates, state = jax.jit(tx.update)(tree, tx.init(tree))
  expected, plain = layerwise_lr_decay(0.7, 2).update(tree, None)
  np.testing.assert_allclose(
    state.inner_state.rate_scales, plain.rate_scales, rtol=1e-6
  )
  assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, expected)


def test_top_and_rate_one_are_left_alone():
  tree = tree_of("layers/0/w", "head/w")
  updates, _ = layerwise_lr_decay(1.0, 7).update(tree, None)
  assert updates["layers"]["0"]["w"] is tree["layers"]["0"]["w"]
  updates, _ = layerwise_lr_decay(0.5, 7).update(tree, None)
  assert updates["head"]["w"] is tree["head"]["w"]


@pytest.mark.parametrize(
  ("paths", "settings", "message"),
  [
    (["layers/2/w"], {}, r"0 to depth, got depth=2 and \{'layers/2/w': 3\}"),
    (["Dense_0/w", "head/w"], {}, r"got none for \['Dense_0/w'\]"),
    (["layer1/0/w"], {}, "'layer1/0/w'"),
    (["a/w", "b/w"], {"level": lambda path: None}, "'a/w', 'b/w'"),
    (["a/w"], {"level": lambda path: -1}, "{'a/w': -1}"),
    (["a/w"], {"level": lambda path: 0.5}, "{'a/w': 0.5}"),
    (["a/w"], {"level": [("a/.*", 3)]}, "{'a/w': 3}"),
    (["a/w", "b/w"], {"level": [("a/.*", 1)]}, "'b/w'"),
  ],
)
def test_levels_that_do_not_fit_are_named_at_init(paths, settings, message):
  tx = layerwise_lr_decay(0.5, 2, **settings)
  with pytest.raises(ValueError, match=message):
    tx.init(tree_of(*paths))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"rate": 0.0}, r"rate must be in \(0, 1\], got rate=0.0"),
    ({"rate": 1.1}, "rate must"),
    ({"rate": float("nan")}, "rate must"),
    ({"depth": 0}, "depth must"),
    ({"depth": 2.5}, "depth must be a whole number, at least 1, got depth=2.5"),
    ({"depth": float("inf")}, "depth must"),
    ({"bottom": ["("]}, "regular expression"),
    ({"level": [("(", 1)]}, "regular expression"),
    ({"bottom": ["a"], "level": [(".*", 1)]}, "bottom must be left alone"),
  ],
)
def test_arguments_out_of_range_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    layerwise_lr_decay(**({"rate": 0.5, "depth": 2} | settings))
