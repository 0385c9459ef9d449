"""Operations by hand are those of the compiled step, where it has no more."""

import pytest
from flax import nnx

from deepseek_jax import models


def make(**options):
  build = lambda: models.LanguageModel(
    64, features=32, num_layers=2, num_heads=2, hidden=64, rngs=nnx.Rngs(0),
    **options,
  )  # fmt: skip
  return nnx.eval_shape(build)


def test_a_dense_model_is_counted_by_hand():
  layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
  met = 2 * layer + 32 + 64 * 32
  assert models.token_flops(make(), 16) == 6 * met + 12 * 2 * 8 * 32
  untied = 6 * (met + 0) + 12 * 2 * 8 * 32  # The head instead of the embedding.
  assert models.token_flops(make(tied=False), 16) == untied


@pytest.mark.parametrize("scan", [False, True])
def test_experts_count_when_they_are_chosen(scan):
  few = make(experts=4, experts_options={"top_k": 2}, scan=scan)
  many = make(experts=8, experts_options={"top_k": 2}, scan=scan)
  router = 2 * 4 * 32  # Four more scores a layer.
  more = models.token_flops(many, 16) - models.token_flops(few, 16)
  assert more == 6 * router


def test_dynamic_attention_reads_its_window_and_blocks():
  options = {"block_size": 4, "window": 8, "num_remote": 2}
  dynamic = make(attention="dynamic", attention_options=options)
  spans = models.token_flops(dynamic, 64) - models.token_flops(dynamic, 128)
  assert spans == 0
  longer = models.token_flops(make(), 128) - models.token_flops(make(), 64)
  assert longer == 12 * 2 * 32 * 32


def test_a_length_below_one_is_refused():
  with pytest.raises(ValueError, match="length"):
    models.token_flops(make(), 0)
