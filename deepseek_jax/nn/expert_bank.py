"""The matrices of all experts."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from deepseek_jax.nn import activations, checks
from deepseek_jax.nn.activations import Activation
from deepseek_jax.nn.expert_exchange import run_experts
from deepseek_jax.nn.expert_products import Matrices

_INIT = nnx.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)


class ExpertBank(nnx.Module):
  """E gated feed-forwards side by side: y = (a(x W_gate) · x W_up) W_down.

  Its parameters are `gate` and `up` [E, D, H] and `down` [E, H, D]. Rules of
  placement may cut E over the mesh's axis "expert", and H over "tensor".

  Args:
    features: D, size of a token, at least 1.
    hidden: H, units of an expert, at least 1.
    num_experts: E, at least 1.
    activation: a name in `nn.ACTIVATIONS`, or a function.
    dtype: of the computation and the result; parameters are float32.
    rngs: stream "params".

  Raises:
    ValueError: a size is below 1, or the activation is none of them.
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    num_experts: int,
    *,
    activation: str | Activation = "silu",
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    checks.require_positive(
      features=features, hidden=hidden, num_experts=num_experts
    )
    inward = (num_experts, features, hidden)
    outward = (num_experts, hidden, features)
    self.gate = nnx.Param(_INIT(rngs.params(), inward))
    self.up = nnx.Param(_INIT(rngs.params(), inward))
    self.down = nnx.Param(_INIT(rngs.params(), outward))
    self.activation = activations.activation(activation)
    self.dtype = dtype

  def __call__(
    self,
    x: Float[Array, "*B D"],
    chosen: Int32[Array, "*B k"],
    weights: Float32[Array, "*B k"],
    capacity_factor: int | float | None = None,
  ) -> tuple[Float[Array, "*B D"], Int32[Array, ""]]:
    """Returns weighted sums of what experts give, and how many were dropped.

    Args:
      x: tokens.
      chosen: experts of every token.
      weights: of what they give.
      capacity_factor: see `MixtureOfExperts`.

    Raises:
      ValueError: the mesh's axis "expert" does not divide the experts.
    """
    matrices = (self.gate, self.up, self.down)
    return run_experts(
      Matrices(*(matrix[...].astype(self.dtype) for matrix in matrices)),
      self.activation,
      x.astype(self.dtype),
      chosen,
      weights,
      capacity_factor,
    )
