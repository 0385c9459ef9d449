"""What goes over the wire for a block, and what comes of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.comm.codecs import (
  Halved,
  Largest,
  Rounded,
  Signs,
  pack,
  unpack,
)

BLOCK = 16
CODECS = {
  "int8": Rounded(8, BLOCK),
  "int4": Rounded(4, BLOCK),
  "bf16": Halved(BLOCK),
  "signs": Signs(BLOCK),
  "largest": Largest(3, BLOCK),
}
each_codec = pytest.mark.parametrize("name", CODECS)


@functools.cache
def there_and_back(codec):
  def both(x, mask):
    codes = codec.encode(x, mask)
    return codes, codec.decode(codes, mask)

  return jax.jit(both)


def blocks(seed=0, scale=1.0):
  random = np.random.default_rng(seed)
  return (scale * random.normal(size=(2, 3, BLOCK))).astype(np.float32)


def decoded(codec, x, mask=None):
  return np.asarray(there_and_back(codec)(x, mask)[1])


def rounded(x, levels):
  unit = np.abs(x).max(-1, keepdims=True) / levels
  return np.round(x / unit) * unit


def largest(x, kept):
  order = np.argsort(-np.abs(x), -1)[..., :kept]
  found = np.zeros_like(x)
  values = np.take_along_axis(x, order, -1)
  np.put_along_axis(found, order, values, -1)
  return found


RULES = {
  "int8": lambda x: rounded(x, 127),
  "int4": lambda x: rounded(x, 7),
  "bf16": lambda x: x.astype(jnp.bfloat16).astype(np.float32),
  "signs": lambda x: np.sign(x) * np.abs(x).mean(-1, keepdims=True),
  "largest": lambda x: largest(x, 3),
}


@each_codec
def test_what_arrives_is_as_the_rule_says(name):
  x = blocks()
  np.testing.assert_allclose(
    decoded(CODECS[name], x), RULES[name](x), rtol=1e-5, atol=1e-6
  )


@each_codec
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e18, 1e29])
def test_what_is_lost_is_less_than_what_was_there(name, scale):
  # Else errors that are sent the next time would grow.
  x = blocks(scale=scale)
  lost = (x - decoded(CODECS[name], x)).astype(np.float64)
  size = lambda v: np.linalg.norm(v.astype(np.float64), axis=-1)
  assert np.isfinite(lost).all()
  if scale == 1e-38:  # May count as zero: it waits.
    assert (size(lost) <= size(x)).all()
  else:
    assert (size(lost) < size(x)).all()


@each_codec
def test_powers_of_two_go_through(name):
  x = blocks()
  for unit in (2.0**-20, 2.0**20):
    scaled = decoded(CODECS[name], np.float32(unit) * x)
    np.testing.assert_array_equal(scaled, unit * decoded(CODECS[name], x))


@each_codec
def test_zeros_stay_zeros_beside_other_blocks(name):
  x = blocks()
  x[1, 1] = 0
  mask = x != 0 if CODECS[name].masked else None
  found = decoded(CODECS[name], x, mask)
  assert not found[1, 1].any()
  x[1, 1] = 1
  others = np.ones((2, 3), bool)
  others[1, 1] = False
  np.testing.assert_array_equal(
    found[others], decoded(CODECS[name], x, mask)[others]
  )


def test_signs_count_only_what_the_mask_shows():
  x = blocks()
  mask = np.random.default_rng(1).random(x.shape) < 0.5
  found = decoded(CODECS["signs"], x, mask)
  assert not found[~mask].any()
  size = np.where(mask, np.abs(x), 0).sum(-1) / mask.sum(-1)
  expected = np.sign(x) * size[..., None]
  np.testing.assert_allclose(found[mask], expected[mask], rtol=1e-6)


@each_codec
def test_bytes_are_those_of_the_codes(name):
  codec = CODECS[name]
  codes, _ = there_and_back(codec)(blocks(), None)
  sent = sum(x.nbytes for x in codes)
  assert sent == 6 * codec.block_bytes()


def test_four_bits_hold_every_number_with_its_sign():
  x = np.zeros((1, BLOCK), np.float32)
  x[0, :15] = np.arange(-7, 8)
  for roll in range(BLOCK):
    turned = np.roll(x, roll, -1)
    np.testing.assert_array_equal(decoded(CODECS["int4"], turned), turned)


def test_packing_is_undone():
  bits = np.random.default_rng(0).random((3, 2, 40)) < 0.5
  packed = pack(jnp.asarray(bits))
  assert packed.shape == (3, 2, 5)
  np.testing.assert_array_equal(unpack(packed), bits)
