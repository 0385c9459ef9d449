import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import models, nn

SHAPE, CLASSES = (8, 6, 2), 3


def images(shape=SHAPE, batch=2):
  pixels = np.random.default_rng(0).random((batch, *shape))
  return jnp.asarray(pixels, jnp.float32)


def classifier(shape=SHAPE, **kwargs):
  kwargs = {"channels": (4,), "lstm_features": 4, "num_heads": 2} | kwargs
  return models.Classifier(shape, CLASSES, **kwargs, rngs=nnx.Rngs(0))


def traced_shape(shape=SHAPE, **kwargs):
  """Builds and calls a classifier, and computes nothing."""
  run = lambda x: classifier(shape, **kwargs)(x)
  return jax.eval_shape(run, images(shape)).shape


@pytest.fixture
def untyped(monkeypatch):
  """Switches the type checker of the tests off, as it is for users."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
  "shape", [(8, 8, 1), (5, 9, 3), (2, 2, 1), (17, 3, 4)], ids=str
)
@pytest.mark.parametrize("sequence", ["rows", "positions"])
def test_shapes_follow_the_image(shape, sequence):
  assert traced_shape(shape, sequence=sequence) == (2, CLASSES)


@pytest.mark.parametrize(
  "kwargs",
  [
    {"channels": ()},
    {"channels": (2, 3, 4), "pool": 1, "kernel_size": 1},
    {"pool": 3},
    {"lstm_layers": 3, "bidirectional": True},
    {"num_heads": 3, "head_dim": 5},
    {"norm": "layer", "activation": "gelu", "pooling": "max"},
  ],
  ids=str,
)
def test_depth_and_width_are_arguments(kwargs):
  assert traced_shape(**kwargs) == (2, CLASSES)


def test_rows_and_positions_cut_the_same_pixels():
  model = models.ConvolutionalInput(SHAPE, channels=(4,), rngs=nnx.Rngs(0))
  rows, mask = model(images())
  assert rows.shape == (2, 4, 12)
  assert mask is None
  model.sequence = "positions"
  positions, _ = model(images())
  np.testing.assert_array_equal(rows.reshape(2, 12, 4), positions)


class Patches(nnx.Module):
  """An input part: the rows of the image, the last one marked as padding."""

  def __call__(self, images):
    tokens = images.reshape(*images.shape[:2], -1)
    mask = jnp.ones(tokens.shape[:2], bool).at[:, -1].set(False)
    return tokens, mask


class Mixer(nnx.Module):
  """A feature part."""

  def __init__(self, in_features, out_features, *, rngs):
    self.linear = nnx.Linear(in_features, out_features, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, tokens, mask):
    return self.dropout(self.linear(tokens))


class Vote(nnx.Module):
  """A decision part without parameters."""

  def __call__(self, tokens, mask):
    return nn.pool_mean(tokens, mask)[:, :CLASSES]


@pytest.mark.slow
def test_each_part_can_be_exchanged():
  rngs = nnx.Rngs(1)
  parts = {
    "inputs": Patches(),
    "features": Mixer(12, 7, rngs=rngs),
    "decision": Vote(),
  }
  for name, part in parts.items():
    model = classifier(**{name: part})
    assert getattr(model, name) is part
    assert model(images()).shape == (2, CLASSES)
  model = classifier(**parts)
  model.eval()
  expected = Vote()(
    parts["features"].linear(Patches()(images())[0]), Patches()(images())[1]
  )
  np.testing.assert_allclose(model(images()), expected, rtol=1e-6)


def test_a_part_may_be_a_function():
  model = classifier(decision=lambda tokens, mask: tokens[:, -1, :CLASSES])
  assert model(images()).shape == (2, CLASSES)


def test_masks_of_an_input_part_reach_the_decision():
  model = classifier(inputs=Patches())
  model.eval()
  changed = images().at[:, -1].set(9.0)
  np.testing.assert_allclose(
    model(changed), model(images()), rtol=1e-5, atol=1e-6
  )


def test_finding_shapes_leaves_the_part_alone():
  part = Mixer(12, 7, rngs=nnx.Rngs(1))
  count = int(part.dropout.rngs.count[...])
  classifier(features=part)
  assert int(part.dropout.rngs.count[...]) == count


@pytest.mark.parametrize(
  ("parts", "message"),
  [
    ({"inputs": lambda images: images}, r"^inputs must return \(tokens"),
    (
      {"inputs": lambda images: (images[:, 0], images[:, 0, :, 0])},
      "^inputs must return .* booleans",
    ),
    ({"features": lambda tokens, mask: tokens[:, 0]}, "^features must return"),
    ({"features": lambda tokens, mask: tokens[:, 1:]}, "^features must return"),
    (
      {"decision": lambda tokens, mask: tokens[:, 0, :1]},
      r"^decision must return logits \[B, 3\]",
    ),
  ],
)
def test_parts_that_break_their_signature_are_named(parts, message):
  with pytest.raises(ValueError, match=message):
    classifier(**parts)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"channels": (4, 4, 4)}, r"at least 8x8 pixels for 3 stages"),
    ({"channels": (0,)}, "^out_channels must be"),
    ({"num_heads": 3}, "^num_heads must divide features"),
    ({"lstm_layers": 0}, "^num_layers must be"),
    ({"dropout": 1.0}, "^dropout must be in"),
    ({"activation": "rely"}, "nearest: relu"),
    ({"sequence": "columns"}, "^sequence must be one of 'rows'"),
    ({"pooling": "first"}, "^pooling must be one of"),
  ],
  ids=str,
)
def test_wrong_arguments_are_named_at_construction(untyped, wrong, message):
  with pytest.raises(ValueError, match=message):
    classifier(**wrong)


@pytest.mark.parametrize("shape", [(8, 6), (8, 0, 2)], ids=str)
def test_image_shapes_that_are_none_are_named(untyped, shape):
  with pytest.raises(ValueError, match=r"^image_shape must be"):
    classifier(shape)


@pytest.mark.parametrize("shape", [(2, 8, 6), (2, 6, 8, 2), (8, 6, 2)], ids=str)
def test_images_of_another_shape_are_named(untyped, shape):
  with pytest.raises(ValueError, match=r"^images must .* \(B, 8, 6, 2\), got"):
    classifier()(jnp.zeros(shape))


def test_images_of_whole_numbers_are_named(untyped):
  with pytest.raises(ValueError, match=r"^images must be floats, .*uint8"):
    classifier()(jnp.zeros((2, *SHAPE), jnp.uint8))


def test_bfloat16_follows_float32():
  exact, rounded = classifier(), classifier(dtype=jnp.bfloat16)
  exact.eval()
  rounded.eval()
  logits = rounded(images())
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, exact(images()), atol=0.05)
