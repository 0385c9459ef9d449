"""The gated feed-forward layer of a decoder."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deepseek_jax.nn import checks
from deepseek_jax.nn.activations import Activation, activation_layer
from deepseek_jax.nn.active_units import combine_active, pays
from deepseek_jax.parallel import BATCH_AXES, constrain


class GatedFeedForward(nnx.Module):
  """Each token by itself: y = W_out (a(W_gate x) · W_in x), without biases.

  Where the activation a gives zero, nothing of the unit is needed: neither its
  row of W_in nor its column of W_out. So the sparsity of a is the sparsity of
  the layer.

  >>> layer = GatedFeedForward(16, 48, rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((2, 5, 16))).shape
  (2, 5, 16)

  Args:
    features: size of a token, of inputs and outputs, at least 1.
    hidden: number of units, at least 1; 8/3 of `features` has the parameters of
      a layer of 4 times `features` without a gate.
    activation: a name in `nn.ACTIVATIONS` or `nn.SPARSE_ACTIVATIONS`, or a
      function.
    activation_options: arguments of a sparse activation.
    dtype: of the computation and the result; parameters are float32.
    rngs: stream "params".

  Raises:
    ValueError: a size is below 1, or the activation is unknown.

  References:
    Shazeer, "GLU Variants Improve Transformer", 2020,
    https://arxiv.org/abs/2002.05202
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    *,
    activation: str | Activation = "silu",
    activation_options: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    checks.require_positive(features=features, hidden=hidden)
    linear = functools.partial(
      nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs
    )
    self.gate = linear(features, hidden)
    # A row for each unit, as in `outward`: rows of units that are zero need not
    # be read.
    init = nnx.initializers.lecun_normal(in_axis=1, out_axis=0)
    self.inward = nnx.Param(init(rngs.params(), (hidden, features)))
    self.outward = linear(hidden, features)
    self.dtype = dtype
    self.activation = activation_layer(
      activation, hidden, options=activation_options, rngs=rngs
    )

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns the tokens' images."""
    hidden = self.activation(_cut(self.gate(x)))
    return self.outward(hidden * _cut(self._inward(x)))

  def decode(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns the same, without a gradient; faster for one sparse token.

    For a single token on CPU, in a layer of some size, of which more than three
    quarters of the units are zero, it reads only the rest; see
    `combine_active`.
    """
    hidden = self.activation(self.gate(x))
    dense = lambda hidden, x: self.outward(hidden * self._inward(x))
    if x.size != x.shape[-1]:
      return dense(hidden, x)
    few = pays(hidden.reshape(-1), x.shape[-1])
    if few is False:
      return dense(hidden, x)

    def sparse(hidden, x):
      y = combine_active(
        hidden.reshape(-1),
        x.reshape(-1).astype(self.dtype),
        self.inward[...].astype(self.dtype),
        self.outward.kernel[...].astype(self.dtype),
      )
      return y.reshape(x.shape)

    return jax.lax.cond(few, sparse, dense, hidden, x)

  def _inward(self, x):
    x, rows = x.astype(self.dtype), self.inward[...].astype(self.dtype)
    return jnp.einsum("...d,cd->...c", x, rows)


def _cut(hidden: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
  """Returns the units, where there is a mesh cut as their parameters are."""
  if hidden.ndim != 3:
    return hidden
  return constrain(hidden, BATCH_AXES, "sequence", "tensor")
