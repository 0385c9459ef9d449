import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import nn

BATCH, STEPS, FEATURES, HIDDEN = 3, 6, 5, 4


@pytest.fixture
def tokens():
  shape = (BATCH, STEPS, FEATURES)
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.fixture
def mask():
  """A full row, a padded end, and padding at the start and inside."""
  rows = ["111111", "111000", "011010"]
  return jnp.array([[digit == "1" for digit in row] for row in rows])


def reference(lstm, tokens, mask):
  """The recurrence in float64, one step and one example at a time."""
  w, u, b = (
    np.asarray(param[...], np.float64)
    for param in (lstm.input_kernel, lstm.recurrent_kernel, lstm.bias)
  )
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  outputs = np.zeros((BATCH, STEPS, HIDDEN))
  states = []
  for x, valid, output in zip(tokens, mask, outputs, strict=True):
    h = c = np.zeros(HIDDEN)
    steps = range(STEPS)[::-1] if lstm.reverse else range(STEPS)
    for t in (t for t in steps if valid[t]):
      gates = np.asarray(x[t], np.float64) @ w + h @ u + b
      i, f, g, o = np.split(gates, 4)
      c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
      h = output[t] = sigmoid(o) * np.tanh(c)
    states.append((h, c))
  hidden, cell = map(np.stack, zip(*states, strict=True))
  return outputs, hidden, cell


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("unroll", [1, 4])
def test_lstm_equals_a_float64_loop(tokens, mask, reverse, unroll):
  lstm = nn.LSTM(
    FEATURES, HIDDEN, reverse=reverse, unroll=unroll, rngs=nnx.Rngs(0)
  )
  outputs, state = lstm.run(tokens, mask)
  expected, hidden, cell = reference(lstm, tokens, mask)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state.hidden, hidden, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state.cell, cell, rtol=1e-5, atol=1e-6)


def test_lstm_equals_the_one_of_flax(tokens):
  lstm = nn.LSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(0))
  cell = nnx.OptimizedLSTMCell(FEATURES, HIDDEN, rngs=nnx.Rngs(1))
  cell.dense_i.kernel[...] = lstm.input_kernel[...]
  cell.dense_h.kernel[...] = lstm.recurrent_kernel[...]
  cell.dense_h.bias[...] = lstm.bias[...]
  expected = nnx.RNN(cell, rngs=nnx.Rngs(2))(tokens)
  np.testing.assert_allclose(lstm(tokens), expected, rtol=1e-5, atol=1e-6)


def test_outputs_at_padding_are_zero(tokens, mask):
  lstm = nn.LSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(0))
  assert np.all(np.asarray(lstm(tokens, mask))[~np.asarray(mask)] == 0)


def test_two_halves_equal_the_whole(tokens, mask):
  lstm = nn.LSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(0))
  whole, state = lstm.run(tokens, mask)
  first, middle = lstm.run(tokens[:, :2], mask[:, :2])
  second, last = lstm.run(tokens[:, 2:], mask[:, 2:], middle)
  halves = jnp.concatenate([first, second], axis=1)
  np.testing.assert_allclose(halves, whole, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(last.cell, state.cell, rtol=1e-5, atol=1e-6)


def test_backward_direction_reads_the_reversed_sequence(tokens):
  both = nn.BidirectionalLSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(0))
  lengths = [6, 3, 1]
  mask = jnp.arange(STEPS)[None] < jnp.array(lengths)[:, None]
  result = both(tokens, mask)
  np.testing.assert_array_equal(
    result[..., :HIDDEN], both.forward(tokens, mask)
  )
  alone = nn.LSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(1))
  nnx.update(alone, nnx.state(both.backward))
  for row, length in enumerate(lengths):
    by_hand = alone(tokens[row : row + 1, :length][:, ::-1])[0, ::-1]
    np.testing.assert_allclose(
      result[row, :length, HIDDEN:], by_hand, rtol=1e-5, atol=1e-6
    )


def test_cell_state_is_float32_in_bfloat16(tokens):
  lstm = nn.LSTM(FEATURES, HIDDEN, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  outputs, state = lstm.run(tokens)
  assert outputs.dtype == state.hidden.dtype == jnp.bfloat16
  assert state.cell.dtype == jnp.float32
  # Eight bits of mantissa, a handful of steps.
  expected, _, cell = reference(lstm, tokens, np.ones((BATCH, STEPS), bool))
  np.testing.assert_allclose(state.cell, cell, atol=0.05)
  np.testing.assert_allclose(
    np.asarray(outputs, np.float64), expected, atol=0.05
  )


def test_recurrent_kernel_is_orthogonal_and_the_forget_gate_open():
  lstm = nn.LSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(0))
  kernel = lstm.recurrent_kernel[...]
  np.testing.assert_allclose(kernel @ kernel.T, np.eye(HIDDEN), atol=1e-6)
  assert lstm.bias[...].tolist() == [0] * 4 + [1] * 4 + [0] * 8


def test_input_projection_is_outside_the_scan(tokens):
  lstm = nn.LSTM(FEATURES, HIDDEN, rngs=nnx.Rngs(0))
  jaxpr = jax.make_jaxpr(lambda x: lstm(x))(tokens).jaxpr
  dots = lambda jaxpr: sum(
    e.primitive.name == "dot_general" for e in jaxpr.eqns
  )
  (scan,) = (e for e in jaxpr.eqns if e.primitive.name == "scan")
  assert dots(jaxpr) == 1
  assert dots(scan.params["jaxpr"].jaxpr) == 1


@pytest.mark.parametrize(
  "sizes", [{"in_features": 0}, {"features": -1}, {"unroll": 0}], ids=str
)
def test_sizes_below_one_are_named(sizes):
  (name,) = sizes
  sizes = {"in_features": 2, "features": 2} | sizes
  with pytest.raises(ValueError, match=rf"^{name} must be an integer"):
    nn.LSTM(**sizes, rngs=nnx.Rngs(0))
