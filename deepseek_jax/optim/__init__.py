"""Adaptive learning rates as Optax transforms; each works in any chain."""

from deepseek_jax.optim.deepseek import deepseek as deepseek
from deepseek_jax.optim.deepseek import matrices as matrices
from deepseek_jax.optim.guard import zero_non_finite as zero_non_finite
from deepseek_jax.optim.layers import ScaleByLayerState as ScaleByLayerState
from deepseek_jax.optim.layers import scale_by_layer as scale_by_layer
from deepseek_jax.optim.loss import (
  ScaleByLossRatioState as ScaleByLossRatioState,
)
from deepseek_jax.optim.loss import scale_by_loss_ratio as scale_by_loss_ratio
from deepseek_jax.optim.rates import ScaleByRateState as ScaleByRateState
from deepseek_jax.optim.rates import scale_by_rate as scale_by_rate
from deepseek_jax.optim.readback import learning_rates as learning_rates
from deepseek_jax.optim.readback import scope_of as scope_of
from deepseek_jax.optim.schedules import warmup as warmup
