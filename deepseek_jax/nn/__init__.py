"""Layers: images, sequences and attention, each usable alone."""

from deepseek_jax.nn.activations import ACTIVATIONS as ACTIVATIONS
from deepseek_jax.nn.activations import Activation as Activation
from deepseek_jax.nn.activations import activation as activation
from deepseek_jax.nn.attention import AttentionBlock as AttentionBlock
from deepseek_jax.nn.attention import MultiHeadAttention as MultiHeadAttention
from deepseek_jax.nn.convolution import ConvolutionStage as ConvolutionStage
from deepseek_jax.nn.convolution import max_pool as max_pool
from deepseek_jax.nn.dynamic_attention import choose_blocks as choose_blocks
from deepseek_jax.nn.dynamic_attention import (
  dynamic_attention as dynamic_attention,
)
from deepseek_jax.nn.heads import AttentionPooling as AttentionPooling
from deepseek_jax.nn.heads import ClassificationHead as ClassificationHead
from deepseek_jax.nn.heads import Pooling as Pooling
from deepseek_jax.nn.heads import pool_last as pool_last
from deepseek_jax.nn.heads import pool_max as pool_max
from deepseek_jax.nn.heads import pool_mean as pool_mean
from deepseek_jax.nn.lsh import BlockSummary as BlockSummary
from deepseek_jax.nn.lsh import hash_buckets as hash_buckets
from deepseek_jax.nn.lsh import hash_projections as hash_projections
from deepseek_jax.nn.lsh import summarize_blocks as summarize_blocks
from deepseek_jax.nn.recurrent import LSTM as LSTM
from deepseek_jax.nn.recurrent import BidirectionalLSTM as BidirectionalLSTM
from deepseek_jax.nn.recurrent import LSTMState as LSTMState
from deepseek_jax.nn.selection import Candidates as Candidates
from deepseek_jax.nn.selection import select_blocks as select_blocks
