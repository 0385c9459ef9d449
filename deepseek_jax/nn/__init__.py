"""Layers: images, sequences and attention, each usable alone."""

from deepseek_jax.nn.activations import ACTIVATIONS as ACTIVATIONS
from deepseek_jax.nn.activations import (
  SPARSE_ACTIVATIONS as SPARSE_ACTIVATIONS,
)
from deepseek_jax.nn.activations import Activation as Activation
from deepseek_jax.nn.activations import activation as activation
from deepseek_jax.nn.activations import activation_layer as activation_layer
from deepseek_jax.nn.active_units import combine_active as combine_active
from deepseek_jax.nn.annealing import Annealing as Annealing
from deepseek_jax.nn.annealing import SparsitySchedule as SparsitySchedule
from deepseek_jax.nn.annealing import TrainingCalls as TrainingCalls
from deepseek_jax.nn.attention import Attention as Attention
from deepseek_jax.nn.attention import AttentionBlock as AttentionBlock
from deepseek_jax.nn.attention import MultiHeadAttention as MultiHeadAttention
from deepseek_jax.nn.cache import DecodeCache as DecodeCache
from deepseek_jax.nn.cache import append_token as append_token
from deepseek_jax.nn.cache import empty_cache as empty_cache
from deepseek_jax.nn.cache import fill_cache as fill_cache
from deepseek_jax.nn.convolution import ConvolutionStage as ConvolutionStage
from deepseek_jax.nn.convolution import max_pool as max_pool
from deepseek_jax.nn.decoding import (
  choose_cached_blocks as choose_cached_blocks,
)
from deepseek_jax.nn.decoding import decode_attention as decode_attention
from deepseek_jax.nn.dynamic_attention import choose_blocks as choose_blocks
from deepseek_jax.nn.dynamic_attention import (
  dynamic_attention as dynamic_attention,
)
from deepseek_jax.nn.dynamic_layer import DynamicAttention as DynamicAttention
from deepseek_jax.nn.dynamic_layer import HashProjections as HashProjections
from deepseek_jax.nn.expert_balance import Balance as Balance
from deepseek_jax.nn.expert_balance import balance_loss as balance_loss
from deepseek_jax.nn.expert_balance import moved_bias as moved_bias
from deepseek_jax.nn.expert_balance import with_loss as with_loss
from deepseek_jax.nn.expert_bank import ExpertBank as ExpertBank
from deepseek_jax.nn.expert_loads import ExpertLoads as ExpertLoads
from deepseek_jax.nn.expert_loads import expert_loads as expert_loads
from deepseek_jax.nn.experts import ExpertBias as ExpertBias
from deepseek_jax.nn.experts import MixtureOfExperts as MixtureOfExperts
from deepseek_jax.nn.feed_forward import GatedFeedForward as GatedFeedForward
from deepseek_jax.nn.heads import AttentionPooling as AttentionPooling
from deepseek_jax.nn.heads import ClassificationHead as ClassificationHead
from deepseek_jax.nn.heads import Pooling as Pooling
from deepseek_jax.nn.heads import pool_last as pool_last
from deepseek_jax.nn.heads import pool_max as pool_max
from deepseek_jax.nn.heads import pool_mean as pool_mean
from deepseek_jax.nn.layer_call import Remat as Remat
from deepseek_jax.nn.layer_stack import LayerStack as LayerStack
from deepseek_jax.nn.lsh import BlockSummary as BlockSummary
from deepseek_jax.nn.lsh import hash_buckets as hash_buckets
from deepseek_jax.nn.lsh import hash_projections as hash_projections
from deepseek_jax.nn.lsh import summarize_blocks as summarize_blocks
from deepseek_jax.nn.recurrent import LSTM as LSTM
from deepseek_jax.nn.recurrent import BidirectionalLSTM as BidirectionalLSTM
from deepseek_jax.nn.recurrent import LSTMState as LSTMState
from deepseek_jax.nn.rotary import rotate_by_position as rotate_by_position
from deepseek_jax.nn.routing import Gate as Gate
from deepseek_jax.nn.routing import Routing as Routing
from deepseek_jax.nn.routing import route as route
from deepseek_jax.nn.selection import Candidates as Candidates
from deepseek_jax.nn.selection import select_blocks as select_blocks
from deepseek_jax.nn.sequence_choice import ShardedChoice as ShardedChoice
from deepseek_jax.nn.sequence_choice import (
  choose_sharded_blocks as choose_sharded_blocks,
)
from deepseek_jax.nn.sequence_sharding import (
  sharded_dynamic_attention as sharded_dynamic_attention,
)
from deepseek_jax.nn.sparse_activations import (
  DynamicSparseReLU as DynamicSparseReLU,
)
from deepseek_jax.nn.sparse_activations import (
  LearnedSparseReLU as LearnedSparseReLU,
)
from deepseek_jax.nn.sparse_activations import (
  TargetSparseReLU as TargetSparseReLU,
)
from deepseek_jax.nn.sparse_activations import Threshold as Threshold
from deepseek_jax.nn.sparse_relu import FiringRate as FiringRate
from deepseek_jax.nn.sparse_relu import InputScale as InputScale
from deepseek_jax.nn.sparse_relu import Offset as Offset
from deepseek_jax.nn.sparse_relu import SparseReLU as SparseReLU
from deepseek_jax.nn.sparsity_reading import Sparsity as Sparsity
from deepseek_jax.nn.sparsity_reading import (
  measure_sparsity as measure_sparsity,
)
from deepseek_jax.nn.sparsity_reading import sparsity as sparsity
from deepseek_jax.nn.thresholds import Gradient as Gradient
from deepseek_jax.nn.thresholds import pressed as pressed
from deepseek_jax.nn.thresholds import threshold_relu as threshold_relu
from deepseek_jax.nn.window import LearnedWindow as LearnedWindow
from deepseek_jax.nn.window import clip_with_return as clip_with_return
