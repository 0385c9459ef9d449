"""A causal language model: norm, attention and gated feed-forward, repeated."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Integer

from deepseek_jax import nn
from deepseek_jax.kernels.block_sparse_attention.checks import check_rows
from deepseek_jax.models import checks
from deepseek_jax.models.feed_forward import feed_forward
from deepseek_jax.nn.checks import require_positive
from deepseek_jax.parallel import BATCH_AXES, constrain

Caches = list[nn.DecodeCache]


class LanguageModel(nnx.Module):
  """Predicts every next token of a text from the tokens before it.

  Embedding, `num_layers` of `DecoderLayer`, norm, and a linear head. Where a
  `separator` is given, it begins a document: tokens do not see beyond it, so
  that many documents may share a row (see `data.load`).

  With "dynamic" attention, time and memory of a token do not grow with the
  text; with "full", they do. Both have the same parameters, but for the
  directions of hashing, and may be mixed by layer. On a CPU "full" is faster
  below some 1,200 tokens, see `experiments/results/language_model_step.json`.

  >>> model = LanguageModel(256, features=16, num_layers=2, rngs=nnx.Rngs(0))
  >>> model(jnp.zeros((1, 8), jnp.int32)).shape
  (1, 8, 256)

  Args:
    vocab_size: V, number of tokens, at least 2.
    features: D, size of a token's vector, at least 1.
    num_layers: at least 1.
    num_heads: heads of queries in a layer, at least 1.
    num_kv_heads: heads of keys and values, which divides `num_heads`; the same
      number if None.
    head_dim: size of a head, even; `features // num_heads` if None.
    hidden: units of the feed-forward, or of each expert; 8/3 of `features`, in
      whole eights, if None.
    activation: of the feed-forward: a name in `nn.ACTIVATIONS` or
      `nn.SPARSE_ACTIVATIONS`, or a function.
    activation_options: arguments of a sparse activation.
    experts: feed-forwards that the tokens of a layer choose among, in all
      layers; 0 for one that all go through. See `nn.MixtureOfExperts`, also for
      the names of its parameters, `layers/layers/<i>/feed_forward/...`, and
      `nn.expert_loads` for how busy they are.
    experts_options: its arguments, in JSON's types, such as {"top_k": 2}.
    attention: "full" or "dynamic"; or one for each layer of a pattern, such as
      ("dynamic", "dynamic", "full"), which repeats.
    attention_options: arguments of `nn.DynamicAttention` for the dynamic
      layers, in JSON's types, such as {"block_size": 64, "window": 256}.
    rotary_base: about a sixth of the longest wave in tokens; at least 1.
    tied: whether the head is the embedding.
    dropout: fraction of what attention and feed-forward give that is set to
      zero in training, in [0, 1).
    separator: token that begins a document, in [0, V); None for none.
    scan: whether to compile one body for all layers, see `nn.LayerStack`;
      parameters have an axis of layers in front then.
    remat: what to recompute of layers on the way back, see there.
    microbatches: parts that a scan takes the rows in, as a pipeline does on a
      mesh with stages, see there.
    repeats: groups of layers that a stage of the pipeline holds, see there.
    dtype: of the computation; parameters, norms' statistics, softmax and logits
      are float32 in either.
    rngs: streams "params" and "dropout".

  Raises:
    ValueError: a number is out of its range, or the pattern does not divide the
      layers.

  References:
    Vaswani et al., "Attention Is All You Need", 2017,
    https://arxiv.org/abs/1706.03762
    Touvron et al., "LLaMA", 2023, https://arxiv.org/abs/2302.13971 (the parts)
  """

  def __init__(
    self,
    vocab_size: int,
    *,
    features: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden: int | None = None,
    activation: str | nn.Activation = "silu",
    activation_options: Mapping[str, Any] | None = None,
    experts: int = 0,
    experts_options: Mapping[str, Any] | None = None,
    attention: nn.Attention | Sequence[nn.Attention] = "full",
    attention_options: Mapping[str, Any] | None = None,
    rotary_base: int | float = 10_000.0,
    tied: bool = True,
    dropout: int | float = 0.0,
    separator: int | None = None,
    scan: bool = False,
    remat: nn.Remat = False,
    microbatches: int | None = None,
    repeats: int = 1,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    require_positive(num_layers=num_layers, features=features)
    pattern = checks.checked_pattern(attention, attention_options, num_layers)
    checks.check_vocabulary(vocab_size, separator)
    self.vocab_size = vocab_size
    self.separator = separator
    self.scale = math.sqrt(features)
    self.embedding = nnx.Embed(
      vocab_size,
      features,
      embedding_init=nnx.initializers.normal(features**-0.5),
      dtype=dtype,
      rngs=rngs,
    )
    layers = [
      DecoderLayer(
        features,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden=8 * math.ceil(features / 3) if hidden is None else hidden,
        activation=activation,
        activation_options=activation_options,
        experts=experts,
        experts_options=experts_options,
        attention=kind,
        attention_options=attention_options if kind == "dynamic" else None,
        rotary_base=rotary_base,
        dropout=dropout,
        dtype=dtype,
        rngs=rngs,
      )
      for kind in pattern * (num_layers // len(pattern))
    ]
    self.layers = nn.LayerStack(
      layers,
      scan=scan,
      remat=remat,
      period=len(pattern),
      microbatches=microbatches,
      repeats=repeats,
    )
    self.norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)
    self.head = (
      None
      if tied
      else nnx.Linear(
        features,
        vocab_size,
        use_bias=False,
        dtype=dtype,
        preferred_element_type=jnp.float32,
        rngs=rngs,
      )
    )

  def __call__(
    self,
    tokens: Integer[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float32[Array, "B T V"]:
    """Returns for each token the logits of the one after it.

    Args:
      tokens: in [0, V); whoever calls sees to it.
      segment_ids: tokens see each other only if they have the same number; a
        negative one marks padding. Found from the separators if None.

    Raises:
      ValueError: shapes do not fit, or something is not integers.
    """
    tokens = checks.checked_tokens(tokens)
    check_rows("segment_ids", segment_ids, tokens.shape, jnp.integer)
    if segment_ids is None and self.separator is not None:
      segment_ids = jnp.cumsum(tokens == self.separator, axis=1)
    x = self._embed(tokens)
    return self._logits(self.layers(x, segment_ids))

  def init_cache(
    self, batch: int, max_length: int, dtype: DTypeLike | None = None
  ) -> Caches:
    """Returns an empty cache for every layer.

    Args:
      batch: rows.
      max_length: tokens it has room for, rounded up to whole blocks.
      dtype: of keys and values; that of the computation if None.

    Raises:
      ValueError: a number is below 1.
    """
    return [
      layer.attention.init_cache(batch, max_length, dtype)
      for layer in self.layers.unstacked()
    ]

  def prefill(
    self,
    tokens: Integer[Array, "B T"],
    caches: Caches,
    length: Int[Array, ""] | int | None = None,
  ) -> tuple[Float32[Array, "B V"], Caches]:
    """Returns the logits after the last token, and caches of the tokens.

    They are one document: the separator, if there is one, comes first.

    Args:
      tokens: the beginning of all rows.
      caches: of `init_cache`; what they hold is dropped.
      length: how many of the tokens count, the same in every row; all if None.
        What comes after is padding, for fewer shapes to compile.

    Raises:
      ValueError: the caches have too few rows or too little room, or not so
        many tokens can count.
    """
    tokens = checks.checked_tokens(tokens)
    checks.check_length(length, tokens.shape[1])
    x, filled = self._embed(tokens), []
    for layer, cache in zip(self.layers.unstacked(), caches, strict=True):
      x, cache = layer.prefill(x, cache, length)
      filled.append(cache)
    last = tokens.shape[1] - 1 if length is None else length - 1
    x = jnp.take(x, jnp.asarray(last)[None], axis=1)
    return self._logits(x)[:, 0], filled

  def decode(
    self, token: Integer[Array, "B"], caches: Caches
  ) -> tuple[Float32[Array, "B V"], Caches]:
    """Returns the logits after one more token, and the caches with it.

    Donate the caches to the jitted step: they are then changed in place.

    Args:
      token: the next token of every row, of the same document.
      caches: of `prefill` or `decode`.

    Raises:
      ValueError: the caches are full (logits are NaN where nobody could tell
        before running).
    """
    if jnp.ndim(token) != 1:
      raise ValueError(
        f"token must be one of every row, [B], got shape {jnp.shape(token)}."
      )
    x, grown = self._embed(checks.checked_tokens(token[:, None])), []
    for layer, cache in zip(self.layers.unstacked(), caches, strict=True):
      x, cache = layer.decode(x, cache)
      grown.append(cache)
    return self._logits(x)[:, 0], grown

  def looped(self) -> "LanguageModel":
    """Returns this model, or one whose scanned layers are cut out one by one.

    The same function of the same values, faster token by token.
    """
    if not self.layers.scan:
      return self
    model = nnx.clone(self)
    model.layers = nn.LayerStack(self.layers.unstacked())
    return model

  def _embed(self, tokens):
    words = self.embedding.embedding[...].astype(self.embedding.dtype)
    # Cut over "tensor" alone: rows of a batch lie where the rest was cut.
    words = constrain(words, "tensor")
    return _cut(jnp.take(words, tokens, axis=0) * self.scale)

  def _logits(self, x):
    x = self.norm(x)
    if self.head is not None:
      return _cut(self.head(x), "tensor")
    words = self.embedding.embedding[...].astype(x.dtype)
    logits = jnp.matmul(x, words.T, preferred_element_type=jnp.float32)
    return _cut(logits, "tensor")


class DecoderLayer(nnx.Module):
  """x + attention(norm(x)), then x + feed-forward(norm(x)); causal.

  >>> layer = DecoderLayer(16, hidden=32, rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((2, 8, 16))).shape
  (2, 8, 16)

  Args:
    features: size of a token's vector.
    hidden: units of the feed-forward.
    num_heads: as in `LanguageModel`, and so are all others.
    num_kv_heads: heads of keys and values.
    head_dim: size of a head.
    activation: of the feed-forward.
    activation_options: its arguments.
    experts: how many feed-forwards tokens choose among; 0 for one.
    experts_options: arguments of `nn.MixtureOfExperts`.
    attention: "full" or "dynamic".
    attention_options: arguments of `nn.DynamicAttention`.
    rotary_base: at least 1.
    dropout: in [0, 1).
    dtype: of the computation.
    rngs: streams "params" and "dropout".
  """

  def __init__(
    self,
    features: int,
    *,
    hidden: int,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    activation: str | nn.Activation = "silu",
    activation_options: Mapping[str, Any] | None = None,
    experts: int = 0,
    experts_options: Mapping[str, Any] | None = None,
    attention: nn.Attention = "full",
    attention_options: Mapping[str, Any] | None = None,
    rotary_base: int | float = 10_000.0,
    dropout: int | float = 0.0,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    checks.check_attention([attention], attention_options)
    options: dict[str, Any] = dict(attention_options or {})
    if attention == "full":
      options["num_remote"] = None
    self.attention_norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)
    self.attention = nn.DynamicAttention(
      features,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      head_dim=head_dim,
      rotary_base=rotary_base,
      dropout=dropout,
      use_bias=False,
      dtype=dtype,
      rngs=rngs,
      **options,
    )
    self.feed_forward_norm = nnx.RMSNorm(features, dtype=dtype, rngs=rngs)
    self.feed_forward = feed_forward(
      features,
      hidden,
      activation=activation,
      activation_options=activation_options,
      experts=experts,
      experts_options=experts_options,
      dtype=dtype,
      rngs=rngs,
    )
    self.dropout = nnx.Dropout(dropout, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Returns tokens that know their past."""
    read = self.attention(self.attention_norm(x), segment_ids=segment_ids)
    return self._think(x + read)

  def prefill(
    self,
    x: Float[Array, "B T D"],
    cache: nn.DecodeCache,
    length: Int[Array, ""] | int | None = None,
  ) -> tuple[Float[Array, "B T D"], nn.DecodeCache]:
    """Returns what a call returns, and a cache of the tokens."""
    read, cache = self.attention.prefill(self.attention_norm(x), cache, length)
    return self._think(x + read), cache

  def decode(
    self, x: Float[Array, "B 1 D"], cache: nn.DecodeCache
  ) -> tuple[Float[Array, "B 1 D"], nn.DecodeCache]:
    """Returns the next token's vector, and the cache with it."""
    read, cache = self.attention.decode(self.attention_norm(x), cache)
    x = x + read
    return x + self.feed_forward.decode(self.feed_forward_norm(x)), cache

  def _think(self, x):
    thought = self.feed_forward(self.feed_forward_norm(x))
    return _cut(x + self.dropout(thought))


def _cut(x: Float[Array, "B T D"], *last: str) -> Float[Array, "B T D"]:
  """Returns `x`, where there is a mesh cut by rows and tokens.

  What is before and behind a pipeline, all of its stages share in.
  """
  return constrain(x, (*BATCH_AXES, "stage"), "sequence", *last)
