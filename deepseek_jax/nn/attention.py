"""Self-attention over padded sequences, and its residual block."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from deepseek_jax.nn import checks
from deepseek_jax.nn.dynamic_layer import DynamicAttention
from deepseek_jax.parallel import BATCH_AXES, constrain

Attention = Literal["full", "dynamic"]


class MultiHeadAttention(nnx.Module):
  """Self-attention: every step reads from all steps that are not padding.

  For each of N heads, with H the size of a head:

    y = softmax(q kᵀ / √H) v

  A sequence that is all padding outputs 0. The cost grows with the square of
  the number of steps. Dropout falls on the outputs, not on the attention
  weights, so that fused kernels stay usable.

  >>> attention = MultiHeadAttention(16, num_heads=4, rngs=nnx.Rngs(0))
  >>> attention(jnp.ones((2, 5, 16))).shape
  (2, 5, 16)

  Args:
    features: size of a token, of inputs and outputs, at least 1.
    num_heads: number of heads, at least 1.
    head_dim: size of a head, at least 1; None for `features // num_heads`.
    dropout: fraction of the outputs set to zero in training, in [0, 1).
    dtype: of the computation and the result; parameters and the softmax are
      float32.
    rngs: streams "params" and "dropout".

  Raises:
    ValueError: a size is below 1, dropout is outside [0, 1), or `num_heads`
      does not divide `features` and no `head_dim` is given.

  References:
    Vaswani et al., Attention Is All You Need, 2017,
      https://arxiv.org/abs/1706.03762
  """

  def __init__(
    self,
    features: int,
    *,
    num_heads: int = 4,
    head_dim: int | None = None,
    dropout: float = 0.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    checks.require_positive(features=features, num_heads=num_heads)
    checks.require_fraction(dropout=dropout)
    if head_dim is None:
      if features % num_heads:
        raise ValueError(
          "num_heads must divide features unless head_dim is given, got "
          f"{num_heads=} for {features=}."
        )
      head_dim = features // num_heads
    checks.require_positive(head_dim=head_dim)
    self.num_heads = num_heads
    self.head_dim = head_dim
    width = num_heads * head_dim
    self.query = nnx.Linear(features, width, dtype=dtype, rngs=rngs)
    self.key = nnx.Linear(features, width, dtype=dtype, rngs=rngs)
    self.value = nnx.Linear(features, width, dtype=dtype, rngs=rngs)
    self.out = nnx.Linear(width, features, dtype=dtype, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)

  def __call__(
    self, tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
  ) -> Float[Array, "B T D"]:
    """Returns what every step has read; `mask` is False at padded steps."""
    heads = (*tokens.shape[:2], self.num_heads, self.head_dim)

    def cut(x, *axes):
      return constrain(x.reshape(heads), BATCH_AXES, *axes, "tensor")

    read = jax.nn.dot_product_attention(
      cut(self.query(tokens), "sequence"),
      # Every query reads them all.
      cut(self.key(tokens), None),
      cut(self.value(tokens), None),
      mask=None if mask is None else mask[:, None, None, :],
    )
    read = self.out(read.reshape(*tokens.shape[:2], -1))
    if mask is not None:
      # Softmax over nothing is uniform in JAX, and would read padding.
      read = jnp.where(mask.any(axis=1)[:, None, None], read, 0)
    return self.dropout(read)


class AttentionBlock(nnx.Module):
  """Residual self-attention on normalized tokens: x + attention(norm(x)).

  The block keeps the size of the tokens, so blocks can be stacked or left out
  without another change.

  >>> block = AttentionBlock(16, num_heads=4, rngs=nnx.Rngs(0))
  >>> block(jnp.ones((2, 5, 16))).shape
  (2, 5, 16)

  Args:
    features: size of a token, of inputs and outputs, at least 1.
    num_heads: as in `MultiHeadAttention`.
    head_dim: as in `MultiHeadAttention`.
    dropout: as in `MultiHeadAttention`.
    attention: "full" is `MultiHeadAttention`; "dynamic" is `DynamicAttention`,
      for long sequences: the same function of the same parameters as long as it
      reads all blocks.
    attention_options: further arguments of `DynamicAttention`, such as
      {"block_size": 64, "window": 256}. Here `is_causal` and `rotary` are False
      unless they say otherwise.
    dtype: of the computation and the result; parameters are float32.
    rngs: streams "params" and "dropout".

  Raises:
    ValueError: as the attention does, or it is "full" and takes no options.

  References:
    Xiong et al., On Layer Normalization in the Transformer Architecture, 2020
      (the norm before the attention), https://arxiv.org/abs/2002.04745
  """

  def __init__(
    self,
    features: int,
    *,
    num_heads: int = 4,
    head_dim: int | None = None,
    dropout: float = 0.0,
    attention: Attention = "full",
    attention_options: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    checks.require_choice(("full", "dynamic"), attention=attention)
    if attention == "full" and attention_options:
      raise ValueError(
        "attention_options are those of attention='dynamic', got "
        f"{attention_options=} with attention='full'."
      )
    kind: Callable[..., nnx.Module] = MultiHeadAttention
    options: dict[str, Any] = {}
    if attention == "dynamic":
      kind = DynamicAttention
      options = {"is_causal": False, "rotary": False}
      options |= attention_options or {}
    self.attention = kind(
      features,
      num_heads=num_heads,
      head_dim=head_dim,
      dropout=dropout,
      dtype=dtype,
      rngs=rngs,
      **options,
    )
    self.norm = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
    self.dtype = dtype

  def __call__(
    self, tokens: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None = None
  ) -> Float[Array, "B T D"]:
    """Returns the tokens plus what they read; padded steps keep their own."""
    read = self.attention(self.norm(tokens), mask)
    return tokens.astype(self.dtype) + read
