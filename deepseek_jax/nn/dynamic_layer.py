"""Self-attention with a learned window and far blocks found by hashing."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from deepseek_jax.kernels.block_sparse_attention import api as kernel
from deepseek_jax.kernels.block_sparse_attention.checks import check_flag
from deepseek_jax.nn import checks
from deepseek_jax.nn.annealing import Annealing, SparsitySchedule
from deepseek_jax.nn.cache import (
  DecodeCache,
  append_token,
  check_room,
  empty_cache,
  fill_cache,
)
from deepseek_jax.nn.decoding import (
  choose_cached_blocks,
  decode_attention,
  decode_full_attention,
)
from deepseek_jax.nn.dynamic_attention import Selection, check_choice
from deepseek_jax.nn.lsh import hash_projections
from deepseek_jax.nn.mesh_attention import mesh_attention
from deepseek_jax.nn.rotary import check_rotary, rotate_by_position
from deepseek_jax.nn.window import LearnedWindow
from deepseek_jax.parallel import BATCH_AXES, constrain

_NO_CHOICE: Selection = "none"


class HashProjections(nnx.Variable):
  """Directions that keys are hashed along: drawn once, never trained."""


class DynamicAttention(nnx.Module):
  """Self-attention that reads a window and the far blocks hashing finds.

  `dynamic_attention` between linear maps: a token reads as many keys at any
  length, and it decodes from a cache. For short sequences, and where
  `experiments/results/attention.json` says so, `MultiHeadAttention` is faster.
  Its parameters have the same names: with `is_causal=False`, `rotary=False`
  and blocks enough to read, both compute the same.

  Trained from scratch it recalls less than full attention does: give it a
  `schedule` that starts full. It counts the calls in training mode itself.

  >>> import jax
  >>> layer = DynamicAttention(16, block_size=4, window=8, rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((2, 32, 16))).shape
  (2, 32, 16)
  >>> step = jax.jit(layer.decode, donate_argnums=1)
  >>> y, cache = step(jnp.ones((2, 1, 16)), layer.init_cache(2, 32))
  >>> y.shape, int(cache.length)
  ((2, 1, 16), 1)

  Args:
    features: size of a token, of inputs and outputs, at least 1.
    num_heads: N, heads of queries, at least 1.
    num_kv_heads: K, heads of keys and values, which divides N; N if None.
    head_dim: H, size of a head; None for `features // num_heads`.
    block_size: keys in a block, at least 1; 64 or 128 suit all devices.
    window: tokens, a multiple of `block_size`; see `block_sparse_attention`.
    num_remote: far blocks that a token chooses, at least 0; None for all, which
      is full attention; with a `schedule` this says it instead.
    num_hashes: rounds of hashing; 4 finds most single tokens, 8 nearly all.
    hash_bits: signs in a hash, at most H; 3 or 4 for blocks of 64.
    selection: "lsh", "mean" or "none"; see `dynamic_attention`.
    is_causal: whether tokens see no later ones. Only then it can decode.
    learn_window: whether every head learns size and place of its window, see
      `LearnedWindow`; add `span_penalty` to the loss.
    ramp: tokens over which a learned window fades, above 0.
    rotary: whether queries and keys are turned by their position.
    rotary_base: about a sixth of the longest wave in tokens; at least 1.
    dropout: fraction of the outputs set to zero in training, in [0, 1).
    schedule: a `SparsitySchedule` or its pairs, such as ((0, None), (500, 16)).
    two_level: as in `dynamic_attention`; decoding always scores all blocks.
    use_bias: whether the linear maps add a bias.
    dtype: of the computation and the result; parameters are float32.
    implementation: as in `block_sparse_attention`.
    rngs: streams "params" (also for the hash projections) and "dropout".

  Raises:
    ValueError: a number is out of its range, heads do not divide, or arguments
      contradict each other.

  References:
    see `dynamic_attention`, `LearnedWindow` and `rotate_by_position`.
  """

  def __init__(
    self,
    features: int,
    *,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    block_size: int = 64,
    window: int = 256,
    num_remote: int | None = 4,
    num_hashes: int = 4,
    hash_bits: int = 3,
    selection: Selection = "lsh",
    is_causal: bool = True,
    learn_window: bool = False,
    ramp: int | float = 32.0,
    rotary: bool = True,
    rotary_base: int | float = 10_000.0,
    dropout: int | float = 0.0,
    schedule: SparsitySchedule | Sequence[Sequence[int | None]] | None = None,
    two_level: bool | None = None,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
    implementation: kernel.Implementation | None = None,
    rngs: nnx.Rngs,
  ):
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    head_dim = checks.head_size(features, num_heads, num_kv_heads, head_dim)
    checks.require_fraction(dropout=dropout)
    kernel.make_layout(block_size, window, is_causal, ramp)
    if num_remote is None:  # Nothing is left to choose.
      selection = _NO_CHOICE
    check_choice(selection, num_remote or 0, num_hashes, hash_bits)
    if two_level is not None:
      check_flag(two_level=two_level)
    checks.require_choice(
      (None, "xla", "tpu", "gpu"), implementation=implementation
    )
    if rotary:
      check_rotary(head_dim, rotary_base)
    if selection == "lsh" and hash_bits > head_dim:
      raise ValueError(
        "hash_bits must be at most head_dim, the number of orthogonal "
        f"directions, got {hash_bits=} with {head_dim=}."
      )
    if schedule is not None and selection == "none":
      raise ValueError("schedule needs blocks to choose, got selection='none'.")
    if schedule is not None and not isinstance(schedule, SparsitySchedule):
      schedule = SparsitySchedule(schedule)
    self.num_kv_heads = num_kv_heads
    self.head_dim = head_dim
    self.block_size = block_size
    self.window = window
    self.num_remote = (
      0 if selection == "none" and num_remote is not None else num_remote
    )
    self.selection = selection
    self.is_causal = is_causal
    self.ramp = ramp
    self.rotary_base = rotary_base if rotary else None
    self.two_level = two_level
    self.implementation = implementation
    self.dtype = dtype
    width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
    linear = functools.partial(
      nnx.Linear, use_bias=use_bias, dtype=dtype, rngs=rngs
    )
    self.query = linear(features, width)
    self.key = linear(features, kv_width)
    self.value = linear(features, kv_width)
    self.out = linear(width, features)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.projections = (
      HashProjections(
        hash_projections(rngs.params(), num_hashes, head_dim, hash_bits)
      )
      if selection == "lsh"
      else None
    )
    self.learned_window = (
      LearnedWindow(num_heads, window, is_causal=is_causal)
      if learn_window
      else None
    )
    self.annealing = None if schedule is None else Annealing(schedule)

  def __call__(
    self,
    tokens: Float[Array, "B T D"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Returns what every token has read; 0 for padding.

    Args:
      tokens: the sequences.
      mask: False at padded tokens; None where there are none.
      segment_ids: tokens see each other only if they have the same number, as
        when several sequences share a row; a negative one marks padding.
      positions: of the tokens, for rotary; counted from 0 if None.

    Raises:
      ValueError: shapes do not fit.
    """
    if mask is not None:
      segments = 0 if segment_ids is None else segment_ids
      segment_ids = jnp.where(mask, segments, -1)
    q, k, v = self._heads(tokens, positions)
    read = self._project(self._read(q, k, v, segment_ids, tick=True))
    if segment_ids is not None:
      read = jnp.where((segment_ids >= 0)[..., None], read, 0)
    return self.dropout(read)

  def span_penalty(self) -> Float[Array, ""]:
    """Returns the mean span in windows, from 0 to 1: an L1 term for a loss.

    Raises:
      ValueError: nothing is learned.
    """
    if self.learned_window is None:
      raise ValueError("span_penalty needs learn_window=True.")
    return self.learned_window.penalty()

  def init_cache(
    self, batch: int, max_length: int, dtype: DTypeLike | None = None
  ) -> DecodeCache:
    """Returns an empty cache.

    Args:
      batch: rows.
      max_length: tokens it has room for, rounded up to whole blocks.
      dtype: of its keys and values; that of the computation if None.

    Raises:
      ValueError: a number is below 1, or the layer is not causal.
    """
    checks.require_positive(batch=batch, max_length=max_length)
    if not self.is_causal:
      raise ValueError(
        "init_cache needs is_causal=True: a token that sees its future cannot "
        "be decoded before it."
      )
    return empty_cache(
      batch, max_length, self.num_kv_heads, self._directions(),
      block_size=self.block_size, dtype=self.dtype if dtype is None else dtype,
    )  # fmt: skip

  def prefill(
    self,
    tokens: Float[Array, "B T D"],
    cache: DecodeCache,
    length: Int[Array, ""] | int | None = None,
  ) -> tuple[Float[Array, "B T D"], DecodeCache]:
    """Returns what a call returns without dropout, and a cache of the tokens.

    Args:
      tokens: the beginning of all rows, of the same length.
      cache: of `init_cache`; what it holds is dropped.
      length: how many of the tokens count, the same in every row; all if None.
        Later ones are padding, for fewer shapes to compile.

    Raises:
      ValueError: the cache has too few rows or too little room.
    """
    check_room(cache, tokens, 0)
    q, k, v = self._heads(tokens, None)
    read = self._project(self._read(q, k, v, None, tick=False))
    return read, fill_cache(cache, k, v, self._directions(), length)

  def decode(
    self, token: Float[Array, "B 1 D"], cache: DecodeCache
  ) -> tuple[Float[Array, "B 1 D"], DecodeCache]:
    """Returns what the next token reads, and the cache with it.

    As the last row of a call on all tokens so far, without dropout; with
    `two_level`, as from 32,768 tokens on, a call may choose other blocks.
    Donate the cache to the jitted step: it is then changed in place.

    Args:
      token: the next token of every row.
      cache: of `prefill`, `decode`, or `init_cache` for the first token.

    Returns:
      The output; NaN if the cache was full already and, under `jit`, nobody
      could tell earlier. And the cache.

    Raises:
      ValueError: shapes do not fit, or the cache is full.
    """
    if token.shape[1] != 1:
      raise ValueError(
        f"token must be one of every row, [B, 1, D], got shape {token.shape}."
      )
    check_room(cache, token, cache.length)
    has_room = cache.length < cache.capacity
    positions = jnp.broadcast_to(cache.length, (token.shape[0], 1))
    q, k, v = self._heads(token, positions)
    directions = self._directions()
    cache = append_token(cache, k, v, directions)
    span, offset = self._edges()

    def attend(blocks, q, cache):
      if blocks is None and span is None:
        return decode_full_attention(q, cache)
      ids = choose_cached_blocks(
        q, cache, directions, window=self.window,
        num_remote=cache.k.shape[2] if blocks is None else blocks,
      )  # fmt: skip
      return decode_attention(
        q, cache, ids, window=self.window, span=span, offset=offset,
        ramp=self.ramp,
      )  # fmt: skip

    read = self._at_level(attend, q[:, 0], cache)
    return jnp.where(has_room, self._project(read[:, None]), jnp.nan), cache

  def _heads(self, tokens, positions):
    """Returns queries, keys and values, the former two turned."""

    def cut(x):
      x = x.reshape(*x.shape[:2], -1, self.head_dim)
      return constrain(x, BATCH_AXES, "sequence", "tensor")

    q, k, v = (cut(f(tokens)) for f in (self.query, self.key, self.value))
    if self.rotary_base is None:
      return q, k, v
    if positions is None:
      positions = jnp.arange(tokens.shape[1])[None]
    turn = lambda x: rotate_by_position(x, positions, self.rotary_base)
    return turn(q), turn(k), v

  def _project(self, read):
    return self.out(read.reshape(*read.shape[:2], -1))

  def _read(self, q, k, v, segment_ids, *, tick: bool):
    """Returns what the heads read at the level of now."""
    rows = lambda x: x if x is None else jnp.broadcast_to(x, q.shape[:3])
    span, offset = map(rows, self._edges())
    projections = self._directions()
    attend = lambda blocks, q, k, v: mesh_attention(
      q, k, v, num_remote=blocks, selection=self.selection,
      projections=projections, two_level=self.two_level,
      segment_ids=segment_ids, span=span, offset=offset,
      implementation=self.implementation, block_size=self.block_size,
      window=self.window, is_causal=self.is_causal, ramp=self.ramp,
    )  # fmt: skip
    return self._at_level(attend, q, k, v, tick=tick)

  def _at_level(self, function, *operands, tick: bool = False):
    if self.annealing is None:
      return function(self.num_remote, *operands)
    return self.annealing(function, *operands, tick=tick)

  def _edges(self):
    """Returns span and offset of every head, or None for both."""
    if self.learned_window is None:
      return None, None
    return self.learned_window()

  def _directions(self) -> Float[Array, "rounds H bits"]:
    """Returns the hash projections; without any, all keys share a bucket."""
    if self.projections is None:
      return jnp.zeros((1, self.head_dim, 0))
    return self.projections[...]
