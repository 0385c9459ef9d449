"""Adaptive learning rates as Optax transforms; each works in any chain."""

from deepseek_jax.optim.averaging import (
  AnytimeAverageState as AnytimeAverageState,
)
from deepseek_jax.optim.averaging import anytime_average as anytime_average
from deepseek_jax.optim.averaging import averaged_params as averaged_params
from deepseek_jax.optim.balance import Levels as Levels
from deepseek_jax.optim.batch_size import noise_scale as noise_scale
from deepseek_jax.optim.batch_size import (
  suggest_batch_size as suggest_batch_size,
)
from deepseek_jax.optim.classic import LossLevelState as LossLevelState
from deepseek_jax.optim.classic import (
  VarianceScaledState as VarianceScaledState,
)
from deepseek_jax.optim.classic import loss_level_sgd as loss_level_sgd
from deepseek_jax.optim.classic import variance_scaled as variance_scaled
from deepseek_jax.optim.codes import BlockInt8 as BlockInt8
from deepseek_jax.optim.compact import (
  CompactMomentsState as CompactMomentsState,
)
from deepseek_jax.optim.compact import Rounding as Rounding
from deepseek_jax.optim.compact import (
  bytes_per_parameter as bytes_per_parameter,
)
from deepseek_jax.optim.compact import compact_moments as compact_moments
from deepseek_jax.optim.compact import expand_moments as expand_moments
from deepseek_jax.optim.decay import DecayWeightsState as DecayWeightsState
from deepseek_jax.optim.decay import decay_weights as decay_weights
from deepseek_jax.optim.decay import matrices as matrices
from deepseek_jax.optim.deepseek import deepseek as deepseek
from deepseek_jax.optim.folding import MatrixShape as MatrixShape
from deepseek_jax.optim.folding import matrix_shape as matrix_shape
from deepseek_jax.optim.freezing import FrozenState as FrozenState
from deepseek_jax.optim.freezing import freeze_except as freeze_except
from deepseek_jax.optim.guard import zero_non_finite as zero_non_finite
from deepseek_jax.optim.layers import ScaleByLayerState as ScaleByLayerState
from deepseek_jax.optim.layers import layerwise_lr_decay as layerwise_lr_decay
from deepseek_jax.optim.layers import scale_by_layer as scale_by_layer
from deepseek_jax.optim.loss import (
  ScaleByLossRatioState as ScaleByLossRatioState,
)
from deepseek_jax.optim.loss import scale_by_loss_ratio as scale_by_loss_ratio
from deepseek_jax.optim.newton_schulz import (
  NewtonSchulzState as NewtonSchulzState,
)
from deepseek_jax.optim.newton_schulz import orthogonalize as orthogonalize
from deepseek_jax.optim.polyak import CapByPolyakState as CapByPolyakState
from deepseek_jax.optim.polyak import cap_by_polyak as cap_by_polyak
from deepseek_jax.optim.range_test import RangeTest as RangeTest
from deepseek_jax.optim.range_test import (
  learning_rate_range_test as learning_rate_range_test,
)
from deepseek_jax.optim.rates import ScaleByRateState as ScaleByRateState
from deepseek_jax.optim.rates import scale_by_rate as scale_by_rate
from deepseek_jax.optim.readback import learning_rates as learning_rates
from deepseek_jax.optim.readback import scope_of as scope_of
from deepseek_jax.optim.replicas import (
  ScaleByReplicaVarianceState as ScaleByReplicaVarianceState,
)
from deepseek_jax.optim.replicas import (
  scale_by_microbatch_variance as scale_by_microbatch_variance,
)
from deepseek_jax.optim.replicas import (
  scale_by_replica_variance as scale_by_replica_variance,
)
from deepseek_jax.optim.schedules import warmup as warmup
from deepseek_jax.optim.schedules import (
  warmup_stable_decay as warmup_stable_decay,
)
from deepseek_jax.optim.schedules import warmup_step as warmup_step
from deepseek_jax.optim.soap import Basis as Basis
from deepseek_jax.optim.soap import SoapState as SoapState
from deepseek_jax.optim.variance import OwnMomentsState as OwnMomentsState
from deepseek_jax.optim.variance import (
  ScaleByRelativeSnrState as ScaleByRelativeSnrState,
)
from deepseek_jax.optim.variance import (
  scale_by_relative_snr as scale_by_relative_snr,
)
from deepseek_jax.optim.whitening import (
  scale_by_whitening as scale_by_whitening,
)
