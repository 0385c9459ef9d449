"""Long short-term memory over padded sequences, in one or both directions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

from deepseek_jax import parallel
from deepseek_jax.nn import checks


class LSTMState(NamedTuple):
  """What an LSTM knows after a step."""

  hidden: Float[Array, "B H"]  # In the dtype of the computation.
  cell: Float32[Array, "B H"]  # A sum over steps: float32 in every computation.


class LSTM(nnx.Module):
  """Long short-term memory over the steps of a sequence.

  At every step, with * the product of elements:

    i, f, g, o = split(x_t W + h_{t-1} U + b)
    c_t = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
    h_t = sigmoid(o) * tanh(c_t)

  A padded step (mask False) carries the state on unchanged and outputs 0, so
  padding may stand anywhere and its content never matters. x W + b is one
  matrix product for all steps, outside the scan; only h U is inside.

  Steps run one after another: over hundreds of steps, attention or a
  convolution uses an accelerator far better.

  >>> lstm = LSTM(8, 16, rngs=nnx.Rngs(0))
  >>> lstm(jnp.ones((2, 5, 8))).shape
  (2, 5, 16)

  Args:
    in_features: size of a token, at least 1.
    features: size of the state, at least 1.
    reverse: read from the last step to the first; outputs stay in place.
    unroll: steps a loop iteration of the scan performs, at least 1. On CPU, 1
      was fastest from 4 to 64 steps; try 4 to 8 on accelerators.
    dtype: of the computation and the outputs; parameters and cell state are
      float32.
    rngs: stream "params".

  Raises:
    ValueError: a size is below 1.

  References:
    Hochreiter and Schmidhuber, Long Short-Term Memory, 1997,
      https://doi.org/10.1162/neco.1997.9.8.1735
    Jozefowicz, Zaremba and Sutskever, An Empirical Exploration of Recurrent
      Network Architectures, 2015 (the forget bias of 1),
      https://proceedings.mlr.press/v37/jozefowicz15.html
  """

  def __init__(
    self,
    in_features: int,
    features: int,
    *,
    reverse: bool = False,
    unroll: int = 1,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    checks.require_positive(
      in_features=in_features, features=features, unroll=unroll
    )
    self.features = features
    self.reverse = reverse
    self.unroll = unroll
    self.dtype = dtype
    self.input_kernel = nnx.Param(
      nnx.initializers.lecun_normal()(
        rngs.params(), (in_features, 4 * features), jnp.float32
      )
    )
    self.recurrent_kernel = nnx.Param(
      nnx.initializers.orthogonal()(
        rngs.params(), (features, 4 * features), jnp.float32
      )
    )
    # A forget gate that starts open lets gradients reach the first steps.
    bias = jnp.zeros((4, features), jnp.float32).at[1].set(1.0)
    self.bias = nnx.Param(bias.reshape(-1))

  def __call__(
    self, tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
  ) -> Float[Array, "B T H"]:
    """Returns the hidden state after every step, 0 at padded ones."""
    return self.run(tokens, mask)[0]

  def run(
    self,
    tokens: Float[Array, "B T D"],
    mask: Bool[Array, "B T"] | None = None,
    state: LSTMState | None = None,
  ) -> tuple[Float[Array, "B T H"], LSTMState]:
    """Returns the outputs and the state after the last step that was read.

    Args:
      tokens: the sequence.
      mask: True where a step holds a token; None where all do.
      state: the state to start from; None for zeros.

    Returns:
      The hidden state after every step (0 at padded ones), and the final state.
    """
    # The scan wants time first; tokens are smaller to transpose than gates.
    tokens = jnp.swapaxes(tokens, 0, 1).astype(self.dtype)
    gates = tokens @ self.input_kernel[...].astype(self.dtype)
    if mask is not None:
      mask = jnp.swapaxes(mask, 0, 1)[..., None]
    if state is None:
      state = self.initial_state(tokens.shape[1])
    weights = self.recurrent_kernel[...], self.bias[...]
    state, outputs = self._by_rows(weights, gates, mask, state)
    return jnp.swapaxes(outputs, 0, 1), state

  def _by_rows(self, weights, gates, mask, state):
    """Scans, each device of a mesh its own rows.

    Left to the compiler, the devices would exchange parts of the weights, and
    sum their gradients, at every step of the scan.
    """
    axes = parallel.fitting_axes(parallel.BATCH_AXES, gates.shape[1])
    if not axes:
      return self._scan(weights, gates, mask, state)
    rows, steps = PartitionSpec(axes), PartitionSpec(None, axes)
    return jax.shard_map(
      self._scan,
      in_specs=(PartitionSpec(), steps, steps, rows),
      out_specs=(rows, steps),
      axis_names=set(parallel.free_axes()),
      # Else gradients are summed where rows meet weights: in the scan.
      check_vma=False,
    )(weights, gates, mask, state)

  def _scan(self, weights, gates, mask, state):
    kernel, bias = weights
    kernel = kernel.astype(self.dtype)

    def step(state, step_inputs):
      gates, valid = step_inputs
      gates = gates.astype(jnp.float32) + bias[None]
      gates += jnp.matmul(
        state.hidden, kernel, preferred_element_type=jnp.float32
      )
      new_state = _update(gates, state.cell, self.dtype)
      if valid is None:
        return new_state, new_state.hidden
      new_state = jax.tree.map(
        lambda new, old: jnp.where(valid, new, old), new_state, state
      )
      return new_state, jnp.where(valid, new_state.hidden, 0)

    return jax.lax.scan(
      step, state, (gates, mask), reverse=self.reverse, unroll=self.unroll
    )

  def initial_state(self, batch: int) -> LSTMState:
    """Returns the state before the first step: zeros."""
    shape = (batch, self.features)
    return LSTMState(
      jnp.zeros(shape, self.dtype), jnp.zeros(shape, jnp.float32)
    )


def _update(
  gates: Float32[Array, "B G"], cell: Float32[Array, "B H"], dtype: DTypeLike
) -> LSTMState:
  """Returns the state after one step, given the logits of its four gates."""
  i, f, g, o = jnp.split(gates, 4, axis=-1)
  cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
  hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
  return LSTMState(hidden.astype(dtype), cell)


class BidirectionalLSTM(nnx.Module):
  """Two LSTMs, one in each direction; a step outputs what both know there.

  The backward one starts at the last step that is not padding, because padding
  leaves its zero state alone. Not for causal models: outputs see the future.

  >>> lstm = BidirectionalLSTM(8, 16, rngs=nnx.Rngs(0))
  >>> lstm(jnp.ones((2, 5, 8))).shape
  (2, 5, 32)

  Args:
    in_features: size of a token, at least 1.
    features: size of the state of each direction, at least 1; outputs have
      twice as many.
    unroll: as in `LSTM`.
    dtype: as in `LSTM`.
    rngs: stream "params".

  Raises:
    ValueError: a size is below 1.

  References:
    Schuster and Paliwal, Bidirectional Recurrent Neural Networks, 1997,
      https://doi.org/10.1109/78.650093
  """

  def __init__(
    self,
    in_features: int,
    features: int,
    *,
    unroll: int = 1,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    kwargs = {"unroll": unroll, "dtype": dtype, "rngs": rngs}
    self.forward = LSTM(in_features, features, **kwargs)
    self.backward = LSTM(in_features, features, reverse=True, **kwargs)

  def __call__(
    self, tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
  ) -> Float[Array, "B T H"]:
    """Returns both hidden states at every step, 0 at padded ones."""
    both = self.forward(tokens, mask), self.backward(tokens, mask)
    return jnp.concatenate(both, axis=-1)
