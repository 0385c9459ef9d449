"""Kernels: one meaning, several implementations."""

from deepseek_jax.kernels.block_sparse_attention import (
  block_sparse_attention as block_sparse_attention,
)
from deepseek_jax.kernels.block_sparse_attention import (
  make_dispatch as make_dispatch,
)
from deepseek_jax.kernels.block_sparse_attention import (
  merge_attention as merge_attention,
)
from deepseek_jax.kernels.block_sparse_attention import why_not as why_not
from deepseek_jax.kernels.block_sparse_attention import (
  window_weight as window_weight,
)
