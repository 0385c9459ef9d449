"""What a token costs a language model, counted by hand."""

from typing import Any

import jax
from flax import nnx

from deepseek_jax import nn
from deepseek_jax.models.language import LanguageModel
from deepseek_jax.nn.checks import require_positive


def token_flops(model: LanguageModel, length: int) -> float:
  """Returns the operations that training on one token asks for.

  Six for every parameter that the token meets in a product (two forward, four
  backward), and twelve for every number of a query and each key that it reads:
  on average half of the row, or of dynamic attention its window and blocks. Of
  experts it meets those that it chooses and the shared ones.
  What is computed again on the way back, or for masked keys, does not count.

  >>> model = LanguageModel(256, features=64, num_layers=2, rngs=nnx.Rngs(0))
  >>> f"{token_flops(model, 128):,.0f}"
  '800,640'

  Args:
    model: with arrays, or shapes as of `nnx.eval_shape`.
    length: tokens of a row, at least 1.

  Raises:
    ValueError: `length` is below 1.

  References:
    Chowdhery et al., "PaLM", 2022, https://arxiv.org/abs/2204.02311, appendix B
  """
  require_positive(length=length)
  params = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))
  met = sum(x.size for x in jax.tree.leaves(params))
  if model.head is not None:  # Else the embedding is the head, too.
    met -= model.embedding.embedding.size
  kinds: Any = model.layers.layers
  met -= sum(_numbers_idle(layer.feed_forward) for layer in kinds)
  read = sum(_numbers_read(layer.attention, length) for layer in kinds)
  return 6 * met + 12 * read * model.layers.num_layers / len(kinds)


def _numbers_read(attention: Any, length: int) -> float:
  """Returns mean keys of a query times the numbers of all heads."""
  keys = length / 2
  if attention.num_remote is not None:
    far = attention.num_remote * attention.block_size
    keys = min(keys, attention.window + far)
  return keys * attention.query.out_features


def _numbers_idle(feed_forward: Any) -> float:
  """Returns parameters of the experts that a token does not choose."""
  if not isinstance(feed_forward, nn.MixtureOfExperts):
    return 0.0
  params = jax.tree.leaves(nnx.state(feed_forward.experts, nnx.Param))
  chosen = feed_forward.top_k / feed_forward.num_experts
  return sum(x.size for x in params) * (1 - chosen)
