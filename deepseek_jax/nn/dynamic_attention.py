"""Attention to a window and to the far blocks that hashing finds."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention import api as kernel
from deepseek_jax.kernels.block_sparse_attention.checks import (
  check_flag,
  check_heads,
  check_rows,
)
from deepseek_jax.kernels.block_sparse_attention.problem import by_token
from deepseek_jax.nn import checks
from deepseek_jax.nn.long_selection import region_blocks, select_long
from deepseek_jax.nn.lsh import hash_projections, summarize_blocks
from deepseek_jax.nn.selection import (
  Candidates,
  keys_that_count,
  select_blocks,
)

LONG = 32_768  # Tokens from which on means of buckets miss most needles.
Selection = Literal["lsh", "mean", "none"]


def dynamic_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  *,
  block_size: int = 64,
  window: int = 256,
  num_remote: int = 4,
  num_hashes: int = 4,
  hash_bits: int = 3,
  selection: Selection = "lsh",
  projections: Float[Array, "rounds H bits"] | None = None,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
  two_level: bool | None = None,
  span: Float[Array, "B T N"] | None = None,
  offset: Float[Array, "B T N"] | None = None,
  ramp: int | float = 32.0,
  scale: float | None = None,
  implementation: kernel.Implementation | None = None,
) -> Float[Array, "B T N H"]:
  """Attention to as many keys at any T, that still finds far tokens.

  Every token sees its window and, outside of it, all keys of the `num_remote`
  blocks that `choose_blocks` finds for it: one exact softmax over both, see
  `kernels.block_sparse_attention`. Asking for more blocks than there are gives
  full attention. The choice itself has no gradient; what is seen has.

  Full attention is faster for short sequences
  (`experiments/results/attention.json` says from where on this one wins) and,
  trained from the first step on, learns far recall better: start full and
  anneal, see `DynamicAttention`.

  Args:
    q: queries of N heads.
    k: keys of K heads; K divides N.
    v: values of K heads.
    block_size: keys in a block, at least 1.
    window: tokens, a multiple of `block_size`; see `block_sparse_attention`.
    num_remote: blocks that a token chooses, at least 0.
    num_hashes: rounds of hashing; 4 finds most single tokens, 8 nearly all.
    hash_bits: signs in a hash; 3 or 4 for blocks of 64.
    selection: "lsh" scores blocks by the keys in the bucket of the query,
      "mean" by the mean of all their keys, "none" chooses none.
    projections: see `hash_projections`; drawn from a fixed key if None.
    is_causal: whether tokens see no later ones.
    segment_ids: as in `block_sparse_attention`.
    two_level: whether to search region by region, in T^1.5, see
      `long_selection`; None does from 32,768 tokens on.
    span: as in `block_sparse_attention`.
    offset: as in `block_sparse_attention`.
    ramp: as in `block_sparse_attention`.
    scale: of the logits; 1 / √H if None.
    implementation: as in `block_sparse_attention`.

  Returns:
    Outputs in the type of q; 0 where a token sees no key.

  Raises:
    ValueError: shapes or types do not fit, or a number is out of its range.
    NotImplementedError: the named implementation cannot do this here.

  >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 64, 2, 8))
  >>> dynamic_attention(q, k, v, block_size=8, window=16, num_remote=2).shape
  (1, 64, 2, 8)

  References:
    Kitaev et al., "Reformer: The Efficient Transformer", 2020,
    https://arxiv.org/abs/2001.04451 (hashing finds the keys)
    Yuan et al., "Native Sparse Attention", 2025,
    https://arxiv.org/abs/2502.11089 (blocks chosen per token and group)
  """
  layout = kernel.make_layout(block_size, window, is_causal, ramp)
  ids = choose_blocks(
    q, k, block_size=block_size, window=window, num_remote=num_remote,
    num_hashes=num_hashes, hash_bits=hash_bits, selection=selection,
    projections=projections, is_causal=is_causal, segment_ids=segment_ids,
    two_level=two_level,
  )  # fmt: skip
  return kernel.attend(
    q, k, v, ids, layout, segment_ids=segment_ids, span=span, offset=offset,
    scale=scale, implementation=implementation,
  )  # fmt: skip


def choose_blocks(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  *,
  block_size: int = 64,
  window: int = 256,
  num_remote: int = 4,
  num_hashes: int = 4,
  hash_bits: int = 3,
  selection: Selection = "lsh",
  projections: Float[Array, "rounds H bits"] | None = None,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
  two_level: bool | None = None,
) -> Int[Array, "B T K R"]:
  """Returns the far blocks of every token, best first, -1 for none.

  Each token chooses by itself, from blocks that lie wholly outside of its
  window and, if causal, in its past: no token after it has a say. The query
  heads that share keys choose together. `select_blocks` has the score.

  Args:
    q: queries.
    k: keys.
    block_size: as in `dynamic_attention`, and so are all others.
    window: tokens.
    num_remote: blocks to choose.
    num_hashes: rounds of hashing.
    hash_bits: signs in a hash.
    selection: "lsh", "mean" or "none".
    projections: see `hash_projections`.
    is_causal: whether tokens see no later ones.
    segment_ids: a block is open to a token whose number lies between the
      smallest and the largest in it. If causal, the keys of the last segment
      in a block make its score: where numbers rise along a row, no segment has
      a say in what another chooses.
    two_level: whether to search region by region.

  Raises:
    ValueError: shapes do not fit, or a number is out of its range.

  >>> q = k = jnp.ones((1, 12, 1, 4))
  >>> ids = choose_blocks(q, k, block_size=4, window=4, num_remote=1)
  >>> print(ids[0, ::4, 0])
  [[-1]
   [ 0]
   [ 0]]
  """
  check_heads(q, k, k)
  layout = kernel.make_layout(block_size, window, is_causal, 1.0)
  check_choice(selection, num_remote, num_hashes, hash_bits)
  check_rows("segment_ids", segment_ids, q.shape[:2], jnp.integer)
  if two_level is not None:
    check_flag(two_level=two_level)
  q, k = jnp.asarray(q), jnp.asarray(k)
  batch, time, kv_heads, size = k.shape
  if selection == "none" or num_remote == 0:
    return jnp.full((batch, time, kv_heads, 0), -1, jnp.int32)
  projections = choice_projections(
    selection, projections, num_hashes, size, hash_bits
  )
  candidates = Candidates(block_size, layout.reach, is_causal)
  blocks = -(-time // block_size)
  region = 0
  long = (time >= LONG) if two_level is None else two_level
  if long and num_remote < blocks:  # All blocks need no search.
    region = region_blocks(blocks, layout.reach)
    blocks = -(-blocks // region) * region
  more = blocks * block_size - time
  pad = lambda x: jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))
  valid = jnp.broadcast_to(jnp.arange(time + more) < time, (batch, time + more))
  segments = None
  if segment_ids is not None:
    segments = pad(jnp.asarray(segment_ids, jnp.int32))
    segments = jnp.where(valid, segments, -1)
    valid = keys_that_count(segments, block_size, is_causal)
  groups = pad(q).reshape(batch, time + more, kv_heads, -1, size)
  q, k = jax.lax.stop_gradient((groups, pad(k)))

  def choose(number):
    sequence, head = number // kv_heads, number % kv_heads
    of_head = lambda x: jax.lax.dynamic_index_in_dim(
      x[sequence], head, 1, False
    )
    summary = summarize_blocks(
      of_head(k), projections, block_size, valid[sequence]
    )
    rest = (of_head(q), summary, projections, candidates, num_remote)
    mine = None if segments is None else segments[sequence]
    if region:
      mine = jnp.where(valid[sequence], 0, -1) if mine is None else mine
      return select_long(of_head(k), *rest, size=region, segments=mine)
    return select_blocks(*rest, mine)

  ids = over_heads(choose, jnp.arange(batch * kv_heads))
  return by_token(ids, kv_heads)[:, :time]


def check_choice(
  selection: str, num_remote: int, num_hashes: int, hash_bits: int
) -> None:
  """Raises `ValueError` for a choice that cannot be made."""
  checks.require_choice(("lsh", "mean", "none"), selection=selection)
  checks.require_positive(num_hashes=num_hashes)
  for name, value, most in (
    ("num_remote", num_remote, None),
    ("hash_bits", hash_bits, 16),
  ):
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 0 or (most and value > most):
      limit = f"from 0 to {most}" if most else "of at least 0"
      raise ValueError(
        f"{name} must be an integer {limit}, got {name}={value!r}."
      )


def choice_projections(
  selection: Selection,
  projections: Float[Array, "rounds H bits"] | None,
  num_hashes: int,
  size: int,
  hash_bits: int,
) -> Float[Array, "rounds H bits"]:
  """Returns the directions that keys of a size are hashed along."""
  if selection == "mean":
    return jnp.zeros((1, size, 0))
  if projections is not None:
    check_rows("projections", projections, (-1, size, -1), jnp.floating)
    if not all(projections.shape[:2]):
      raise ValueError(
        "projections must have at least one round of hashing, got shape "
        f"{projections.shape}."
      )
    return projections
  if hash_bits > size:
    raise ValueError(
      "hash_bits must be at most the head size, the number of orthogonal "
      f"directions, got {hash_bits=} with {size}."
    )
  return hash_projections(jax.random.key(0), num_hashes, size, hash_bits)


def over_heads(function: Callable[[Any], Any], xs: Any) -> Any:
  """Maps over heads; on CPU one after the other, so that arrays stay close."""
  if jax.default_backend() == "cpu":
    return jax.lax.map(function, xs)
  return jax.vmap(function)(xs)
