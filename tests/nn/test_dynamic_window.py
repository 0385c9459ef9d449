"""Laws of the learned window."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import nn

TIME, BLOCK, WINDOW, SIZE = 16, 4, 16, 4


@functools.cache
def compiled():
  """Returns a function of a position of a window, and of a problem.

  The one head must read, at the last token, the value at some distance: all
  keys look alike to it, and only this one's value is not 0.
  """
  structure, _ = nnx.split(nn.LearnedWindow(1, WINDOW))
  q = jnp.ones((1, TIME, 1, SIZE))

  def loss(params, distance, penalty):
    window = nnx.merge(structure, params)
    span, offset = (jnp.broadcast_to(x, q.shape[:3]) for x in window())
    wanted = (jnp.arange(TIME) == TIME - 1 - distance)[None, :, None, None]
    out = nn.dynamic_attention(
      q, q, q * wanted, block_size=BLOCK, window=WINDOW, num_remote=0, ramp=8.0,
      span=span, offset=offset,
    )  # fmt: skip
    return -out[0, -1].sum() + penalty * window.penalty()

  return jax.jit(jax.grad(loss))


def gradients(distance: int, penalty: float):
  def run(span, offset=0.0):
    params = {"span": jnp.full(1, span), "offset": jnp.full(1, offset)}
    grads = compiled()(params, distance, penalty)
    return float(grads["span"][0]), float(grads["offset"][0])

  return run


def test_the_span_grows_towards_what_is_needed_and_not_beyond():
  far = gradients(10, 0.0)
  # The key at 10 lies on the ramp of 8 of a span of 5 tokens: wider is better.
  assert far(5 / WINDOW)[0] < -0.01
  # Once it is seen in full, more tokens only dilute it.
  assert far(11 / WINDOW)[0] > 0
  # What is near is not helped by a wider window.
  assert gradients(5, 0.0)(5 / WINDOW)[0] > 0


def test_the_window_moves_towards_what_is_needed():
  assert gradients(10, 0.0)(5 / WINDOW, 0.0)[1] < -0.01


def test_the_penalty_shrinks_the_span_and_lets_go_below_zero():
  plain, held = gradients(10, 0.0), gradients(10, 0.5)
  for span in (0.3, 0.7, 1.0):
    np.testing.assert_allclose(held(span)[0] - plain(span)[0], 0.5, rtol=1e-5)
  assert held(1.0)[0] > 0  # Full, the loss does not hold it: it shrinks.
  assert held(-0.1)[0] <= 0  # Below zero, nothing pushes it further.


def test_a_span_beyond_its_range_comes_back():
  grad = jax.grad(lambda x, sign: sign * nn.clip_with_return(x, 0.0, 1.0))
  inside, beyond, below = 0.5, 1.5, -0.5
  assert grad(beyond, 1.0) == 1  # Descent makes it smaller: towards the range.
  assert grad(beyond, -1.0) == 0
  assert grad(below, -1.0) == -1
  assert grad(below, 1.0) == 0
  assert (grad(inside, 1.0), grad(inside, -1.0)) == (1, -1)


def layers(**arguments):
  build = lambda learn: nn.DynamicAttention(
    8, num_heads=2, block_size=4, window=8, num_remote=1, learn_window=learn,
    ramp=2, rngs=nnx.Rngs(0), **arguments,
  )  # fmt: skip
  return build(False), build(True)


def test_a_new_window_is_as_none_and_a_narrow_one_is_not():
  without, learned = layers()
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 19, 8)), jnp.float32)

  @nnx.jit
  def read(layer, x):
    return layer(x)

  expected = read(without, x)
  np.testing.assert_allclose(read(learned, x), expected, atol=1e-6)
  assert learned.span_penalty() == 1
  learned.learned_window.span[...] = jnp.zeros(2)
  assert learned.span_penalty() == 0
  assert np.abs(read(learned, x) - expected).max() > 1e-3


def test_learning_moves_the_span_to_the_right_place():
  # 60 steps at 1e-2: the key at distance 10 must stay, those beyond need not.
  step, span = gradients(10, 0.1), 1.0
  for _ in range(60):
    span -= 1e-2 * float(np.sign(step(span)[0]))
  assert 0.35 < span < 0.75


def test_penalties_are_for_learned_windows():
  with pytest.raises(ValueError, match="learn_window=True"):
    layers()[0].span_penalty()


@pytest.mark.parametrize("name", ["num_heads", "window"])
def test_sizes_are_checked(name, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  sizes = {"num_heads": 1, "window": 4} | {name: 0}
  with pytest.raises(ValueError, match=f"^{name} must be"):
    nn.LearnedWindow(**sizes)
