"""Data sets as batches: real sources, checked columns, resumable streams."""

from deepseek_jax.data.arrays import from_arrays as from_arrays
from deepseek_jax.data.batch_source import BatchSource as BatchSource
from deepseek_jax.data.batch_source import steps_per_epoch as steps_per_epoch
from deepseek_jax.data.byte_pairs import BPETokenizer as BPETokenizer
from deepseek_jax.data.dataset import Dataset as Dataset
from deepseek_jax.data.dataset import Split as Split
from deepseek_jax.data.loading import NotPreparedError as NotPreparedError
from deepseek_jax.data.loading import load as load
from deepseek_jax.data.packing import PackedReader as PackedReader
from deepseek_jax.data.packing import segment_ids as segment_ids
from deepseek_jax.data.pipeline import batches as batches
from deepseek_jax.data.schema import Feature as Feature
from deepseek_jax.data.schema import Schema as Schema
from deepseek_jax.data.text import from_texts as from_texts
from deepseek_jax.data.tokenizers import ByteTokenizer as ByteTokenizer
from deepseek_jax.data.tokenizers import (
  tokenizer_from_json as tokenizer_from_json,
)
from deepseek_jax.data.tokens import Tokenizer as Tokenizer
