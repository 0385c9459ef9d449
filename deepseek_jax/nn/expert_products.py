"""What tokens become in the experts they choose, on one device."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from deepseek_jax import parallel
from deepseek_jax.nn.activations import Activation
from deepseek_jax.nn.expert_slots import collect, lay_out, sort_choices, spread
from deepseek_jax.nn.grouped_product import (
  block_count,
  block_size,
  grouped_product,
)


class Matrices(NamedTuple):
  """Those of all experts, in the type of the computation."""

  gate: Float[Array, "E D H"]
  up: Float[Array, "E D H"]
  down: Float[Array, "E H D"]


def think_in_blocks(
  matrices: Matrices,
  activation: Activation,
  x: Float[Array, "N D"],
  chosen: Int32[Array, "N k"],
) -> Float[Array, "N k D"]:
  """Returns what every token becomes in each of its experts.

  All tokens find room: every expert gets as many blocks of rows as it needs.
  """
  num_experts, rows = len(matrices.gate), chosen.size
  block = block_size(rows, num_experts)
  blocks = block_count(rows, num_experts, block)
  order, counts = sort_choices(chosen, num_experts)
  filled = (counts + block - 1) // block
  slots = lay_out(
    chosen, order, counts, block * (jnp.cumsum(filled) - filled),
    room=rows, size=blocks * block,
  )  # fmt: skip
  own = spread(x, slots).reshape(blocks, block, -1)
  times = lambda x, matrices: grouped_product(x, matrices, filled)
  return collect(
    _think(matrices, activation, own, times).reshape(blocks * block, -1), slots
  )


def think_by_expert(
  matrices: Matrices, activation: Activation, x: Float[Array, "E S D"]
) -> Float[Array, "E S D"]:
  """Returns what the tokens of each expert become in it."""
  times = lambda x, matrices: jnp.einsum("esc,ecd->esd", x, matrices)
  return _think(matrices, activation, x, times)


def _think(matrices, activation, x, times):
  gate = activation(times(x, matrices.gate))
  hidden = parallel.constrain(
    gate * times(x, matrices.up), None, None, "tensor"
  )
  return times(hidden, matrices.down)


def combine(
  y: Float[Array, "N k D"], weights: Float32[Array, "N k"]
) -> Float[Array, "N D"]:
  """Returns the weighted sum of what a token's experts gave."""
  total = jnp.einsum("nkd,nk->nd", y.astype(jnp.float32), weights)
  return total.astype(y.dtype)
