"""Attention of every token to a window and to blocks that it names."""

from deepseek_jax.kernels.block_sparse_attention.api import (
  block_sparse_attention as block_sparse_attention,
)
from deepseek_jax.kernels.block_sparse_attention.api import why_not as why_not
from deepseek_jax.kernels.block_sparse_attention.dispatch import (
  Dispatch as Dispatch,
)
from deepseek_jax.kernels.block_sparse_attention.dispatch import (
  make_dispatch as make_dispatch,
)
from deepseek_jax.kernels.block_sparse_attention.merge import (
  merge_attention as merge_attention,
)
from deepseek_jax.kernels.block_sparse_attention.reference import (
  reference as reference,
)
from deepseek_jax.kernels.block_sparse_attention.window import (
  window_weight as window_weight,
)
