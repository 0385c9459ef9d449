"""Laws of the layer beyond those that all modules obey."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import deepseek_jax as dj
from deepseek_jax import models, nn

BATCH, TIME, FEATURES = 2, 21, 8
SIZES = dict(block_size=4, window=8, num_remote=2, num_heads=2)  # fmt: skip


def normal(*shape, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


@functools.cache
def layer(**changes):
  module = nn.DynamicAttention(FEATURES, **SIZES | changes, rngs=nnx.Rngs(0))
  module.eval()
  return module


@functools.cache
def jitted(**changes):
  module = layer(**changes)
  return jax.jit(lambda *args, **kwargs: module(*args, **kwargs))


def test_the_future_changes_no_bit_of_the_past():
  x, start = normal(BATCH, TIME, FEATURES), 13
  other = x.at[:, start:].set(50 * normal(BATCH, TIME - start, FEATURES))
  before, after = jitted()(x), jitted()(other)
  np.testing.assert_array_equal(before[:, :start], after[:, :start])


def test_padding_is_zero_and_segments_are_apart():
  x = normal(BATCH, TIME, FEATURES)
  mask = jnp.arange(TIME)[None] < jnp.array([[TIME], [9]])
  run = jitted()
  y = run(x, mask)
  assert not y[1, 9:].any()
  np.testing.assert_allclose(y[1, :9], run(x)[1, :9], atol=1e-5)
  assert not run(x, jnp.zeros_like(mask)).any()
  numbers = jnp.where(mask, 3, -1)
  np.testing.assert_array_equal(run(x, segment_ids=numbers), y)
  np.testing.assert_array_equal(
    run(x, mask, segment_ids=jnp.full_like(numbers, 3)), y
  )


@pytest.mark.slow
def test_only_distances_between_positions_matter():
  x = normal(BATCH, TIME, FEATURES)
  plain = jnp.broadcast_to(jnp.arange(TIME), (BATCH, TIME))
  # Means turn as their keys do. Directions of hashes stay: what hashing finds
  # may change, and what is found counts as before.
  run = jitted(selection="mean")
  np.testing.assert_allclose(run(x, positions=plain + 9), run(x), atol=1e-4)
  assert np.abs(run(x, positions=3 * plain) - run(x)).max() > 1e-3


def test_with_blocks_enough_it_is_multi_head_attention():
  full = nn.MultiHeadAttention(FEATURES, num_heads=2, rngs=nnx.Rngs(3))
  ours = nn.DynamicAttention(
    FEATURES, num_heads=2, block_size=4, window=4, num_remote=9, rotary=False,
    is_causal=False, rngs=nnx.Rngs(0),
  )  # fmt: skip
  nnx.update(ours, nnx.state(full, nnx.Param))  # They have the same names.
  x = normal(BATCH, TIME, FEATURES)
  mask = jnp.arange(TIME)[None] < jnp.array([[TIME], [9]])
  expected = jnp.where(mask[..., None], full(x, mask), 0)
  found = jax.jit(lambda x, mask: ours(x, mask))(x, mask)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_projections_are_drawn_once_and_never_trained():
  first, second = (
    nn.DynamicAttention(8, **SIZES, rngs=nnx.Rngs(seed)) for seed in (0, 1)
  )
  kept = first.projections
  assert isinstance(kept, nn.HashProjections)
  assert not isinstance(kept, nnx.Param)
  assert np.abs(kept[...] - second.projections[...]).max() > 0.1
  _, params, rest = nnx.split(first, nnx.Param, ...)
  assert "projections" in rest
  assert set(params) == {"query", "key", "value", "out"}
  assert layer(selection="mean").projections is None


def test_groups_share_keys():
  module = layer(num_heads=4, num_kv_heads=2, head_dim=6)
  assert module.key.kernel[...].shape == (FEATURES, 12)
  assert module.query.kernel[...].shape == (FEATURES, 24)


WRONG = {
  "features": ({"features": 0}, "^features must be"),
  "num_heads": ({"num_heads": 0}, "^num_heads must be"),
  "num_kv_heads": ({"num_heads": 4, "num_kv_heads": 3}, "^num_kv_heads must"),
  "head_dim": ({"head_dim": 0}, "^head_dim must be"),
  "features per head": ({"features": 9}, "^num_heads must divide features"),
  "odd head_dim": ({"head_dim": 3}, "^head_dim must be even .* rotary=False"),
  "rotary_base": ({"rotary_base": 0}, "^rotary_base must be"),
  "block_size": ({"block_size": 0}, "^block_size must be"),
  "window": ({"window": 6}, "^window must be a multiple of block_size"),
  "num_remote": ({"num_remote": -1}, "^num_remote must be"),
  "num_hashes": ({"num_hashes": 0}, "^num_hashes must be"),
  "hash_bits": ({"hash_bits": 5}, "^hash_bits must be at most head_dim"),
  "selection": ({"selection": "hash"}, "^selection must be one of"),
  "ramp": ({"ramp": 0}, "^ramp must be above 0"),
  "dropout": ({"dropout": 1.0}, "^dropout must be"),
  "schedule": ({"schedule": ((3, 1),)}, "^schedule must have steps"),
  "schedule of none": (
    {"schedule": ((0, 1),), "selection": "none"},
    "^schedule needs blocks to choose",
  ),
  "implementation": (
    {"implementation": "cuda"},
    "^implementation must be one of",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  wrong, message = WRONG[name]
  arguments = {"features": FEATURES} | SIZES | wrong
  with pytest.raises(ValueError, match=message):
    nn.DynamicAttention(**arguments, rngs=nnx.Rngs(0))


OPTIONS = {"block_size": 4, "window": 4, "num_remote": 2}


def test_a_block_takes_options_for_dynamic_attention_only():
  block = nn.AttentionBlock(
    8, num_heads=2, attention="dynamic", attention_options=OPTIONS,
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  assert isinstance(block.attention, nn.DynamicAttention)
  assert (block.attention.is_causal, block.attention.window) == (False, 4)
  with pytest.raises(ValueError, match=r"^attention_options are those of"):
    nn.AttentionBlock(8, attention_options=OPTIONS, rngs=nnx.Rngs(0))


def test_unknown_attention_is_named(monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=r"^attention must be one of 'full'"):
    nn.AttentionBlock(8, attention="sparse", rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_classifier_of_pixels_trains_with_it(tmp_path):
  model = models.Classifier(
    (8, 8, 1), 10, channels=(8,), sequence="positions", lstm_features=16,
    attention="dynamic",
    attention_options=OPTIONS | {"schedule": [[0, None], [5, 1]]},
    rngs=nnx.Rngs(0),
  )  # fmt: skip
  assert isinstance(model.features.attention.attention, nn.DynamicAttention)
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
  )
  result = dj.train.fit(
    model, optax.adam(1e-2), dj.data.load("digits"), workdir=tmp_path / "run",
    steps=20, batch_size=64, mesh=mesh, evaluate_every=10, progress=False,
    tensorboard=False,
  )  # fmt: skip
  assert result.metrics["test/loss"] < 2.25  # Guessing: log 10 = 2.30.
  calls = result.model.features.attention.attention.annealing.calls[...]
  assert int(calls) == result.best_step


@pytest.mark.slow
def test_a_layer_searches_by_region_if_told_to(monkeypatch):
  x = jax.random.normal(jax.random.key(0), (1, 128, 8))
  make = lambda two_level: nn.DynamicAttention(
    8, num_heads=1, block_size=4, window=4, num_remote=1, rotary=False,
    two_level=two_level, rngs=nnx.Rngs(0),
  )  # fmt: skip
  usual, flat, by_region = (make(way)(x) for way in (None, False, True))
  np.testing.assert_array_equal(usual, flat)
  assert np.abs(by_region - flat).max() > 1e-3
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=r"^two_level must be True"):
    make("yes")
