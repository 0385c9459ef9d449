"""Text from a language model, token by token, with a cache."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from deepseek_jax.models.language import Caches, LanguageModel
from deepseek_jax.nn import checks

_CHUNK = 16  # Tokens between two looks from the host.
_MOST = 2**31 - 1  # Tokens that an int32 can count.


def generate(
  model: LanguageModel,
  prompt: npt.ArrayLike,
  num_tokens: int,
  *,
  temperature: int | float = 0.0,
  top_p: int | float = 1.0,
  key: Key[Array, ""] | None = None,
  max_length: int | None = None,
  cache_dtype: DTypeLike | None = None,
) -> Int[np.ndarray, "B L"]:
  """Returns prompts with the tokens that follow them.

  Computed as without a cache, in evaluation mode, at a cost for each token that
  hardly grows with the text where attention is dynamic. A row ends with the
  model's `separator`, if it has one: what comes after is separators. One
  compilation serves prompts of similar length, see `stream`.

  Args:
    model: it stays as it is.
    prompt: tokens [B, T] or [T], at least one; of one document, which begins
      with the separator, if there is one, or in its midst.
    num_tokens: how many to add, at least 1.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: draws from the likeliest tokens that have this probability together,
      in (0, 1].
    key: for the draws; needed with a temperature above 0.
    max_length: tokens the cache has room for; as many as needed if None.
    cache_dtype: of keys and values; that of the computation if None.

  Returns:
    Tokens [B, T + num_tokens], or fewer if all rows ended before; [B=1, ...]
    for a prompt of one row.

  Raises:
    ValueError: a number is out of its range, a token is unknown, a separator
      lies within the prompt, or the cache is too small.

  >>> model = LanguageModel(256, features=16, num_layers=1, rngs=nnx.Rngs(0))
  >>> generate(model, [[1, 2, 3]], 4).shape
  (1, 7)

  References:
    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020,
    https://arxiv.org/abs/1904.09751 (top-p)
  """
  prompt = checked_prompt(model, prompt)
  steps = stream(
    model, prompt, num_tokens, temperature=temperature, top_p=top_p, key=key,
    max_length=max_length, cache_dtype=cache_dtype,
  )  # fmt: skip
  return np.concatenate([prompt, *steps], axis=1)


def stream(
  model: LanguageModel,
  prompt: npt.ArrayLike,
  num_tokens: int,
  *,
  temperature: int | float = 0.0,
  top_p: int | float = 1.0,
  key: Key[Array, ""] | None = None,
  max_length: int | None = None,
  cache_dtype: DTypeLike | None = None,
) -> Iterator[Int[np.ndarray, "B L"]]:
  """Yields what `generate` adds, some tokens at a time, as they come.

  Prompts are padded, and caches rounded up, to a few lengths, so that other
  prompts find compiled what they need.

  Args:
    model: as in `generate`, and so are all others.
    prompt: tokens.
    num_tokens: how many to add.
    temperature: 0 takes the likeliest token.
    top_p: in (0, 1].
    key: for the draws.
    max_length: tokens the cache has room for.
    cache_dtype: of keys and values.
  """
  tokens = checked_prompt(model, prompt)
  key = _check_sampling(temperature, top_p, key)
  checks.require_positive(num_tokens=num_tokens)
  room = _checked_room(tokens.shape[1], num_tokens, max_length)
  if cache_dtype is not None and not jnp.issubdtype(cache_dtype, jnp.floating):
    raise ValueError(f"cache_dtype must be floating, got {cache_dtype=}.")
  # What is checked is checked at the call, not when the first token is wanted.
  return _stream(
    model, tokens, num_tokens, room, float(temperature), float(top_p), key,
    cache_dtype,
  )  # fmt: skip


def _stream(
  model, tokens, num_tokens, room, temperature, top_p, key, cache_dtype
):
  structure, weights = _evaluation(model)
  length = tokens.shape[1]
  padded = np.pad(tokens, ((0, 0), (0, _rounded(length) - length)))
  writing = _begin(
    structure, room, cache_dtype, temperature == 0,
    weights, padded, length, key, temperature, top_p,
  )  # fmt: skip
  yield np.asarray(writing.token)[:, None]
  made = 1
  while made < num_tokens and not np.asarray(writing.done).all():
    count = min(_CHUNK, num_tokens - made)
    writing, found = _go_on(
      structure, temperature == 0, weights, writing, count, temperature, top_p
    )
    found = np.asarray(found)[:, :count]
    made += count
    yield found


class _Writing(NamedTuple):
  """Where a text is: its last token, and what decoding remembers."""

  token: Int[Array, "B"]
  done: Bool[Array, "B"]
  caches: Caches
  key: Key[Array, ""]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _begin(
  structure, room, dtype, greedy, weights, tokens, length, key, *sampling
) -> _Writing:
  """Reads the prompt and draws the first token."""
  model = nnx.merge(structure, *weights)
  caches = model.init_cache(tokens.shape[0], room, dtype)
  logits, caches = model.prefill(tokens, caches, length)
  key, now = jax.random.split(key)
  token = sample(now, logits, *sampling, greedy=greedy)
  done = jnp.zeros(token.shape, bool)
  if model.separator is not None:
    done = token == model.separator
  return _Writing(token, done, caches, key)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _go_on(structure, greedy, weights, writing, count, *sampling):
  """Draws some more tokens, at most `_CHUNK`."""
  model = nnx.merge(structure, *weights)
  # Cut out of a scanned model once, and not for every token.
  model = model.looped()
  separator = model.separator

  def step(i, carry):
    writing, found = carry
    logits, caches = model.decode(writing.token, writing.caches)
    key, now = jax.random.split(writing.key)
    token = sample(now, logits, *sampling, greedy=greedy)
    done = writing.done
    if separator is not None:
      token = jnp.where(done, separator, token)
      done |= token == separator
    found = jax.lax.dynamic_update_index_in_dim(found, token, i, axis=1)
    return _Writing(token, done, caches, key), found

  found = jnp.zeros((writing.token.shape[0], _CHUNK), writing.token.dtype)
  return jax.lax.fori_loop(0, count, step, (writing, found))


def sample(
  key: Key[Array, ""],
  logits: Float[Array, "B V"],
  temperature: Float[Array, ""] | float = 1.0,
  top_p: Float[Array, ""] | float = 1.0,
  *,
  greedy: bool = False,
) -> Int[Array, "B"]:
  """Returns one token for each row of logits.

  Args:
    key: for the draws.
    logits: of the tokens.
    temperature: divides the logits, above 0.
    top_p: the likeliest tokens that have this probability together are drawn
      from; the likeliest is always among them.
    greedy: whether to take the likeliest token and draw nothing.

  >>> sample(jax.random.key(0), jnp.array([[0.0, 3.0, 1.0]]), top_p=0.5)
  Array([1], dtype=int32)
  """
  if greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # From the largest down: 0 stays 0, however small the temperature is.
  logits -= logits.max(-1, keepdims=True)
  least = jnp.finfo(logits.dtype).tiny
  logits /= jnp.maximum(temperature, least)
  order = jnp.argsort(logits, axis=-1, descending=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  p = jax.nn.softmax(ranked)
  before = jnp.cumsum(p, axis=-1) - p
  # Rounded sums of many reach 1 before the last.
  kept = ((before < top_p) | (top_p >= 1)).at[:, 0].set(True)
  drawn = jax.random.categorical(key, jnp.where(kept, ranked, -jnp.inf))
  token = jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]
  return token.astype(jnp.int32)


def checked_prompt(
  model: LanguageModel, prompt: npt.ArrayLike
) -> Int[np.ndarray, "B T"]:
  """Returns a prompt as rows of tokens.

  Raises:
    ValueError: it is empty, not integers, holds an unknown token, or a
      separator that is not its beginning.
  """
  try:
    tokens = np.atleast_2d(np.asarray(prompt))
  except ValueError as error:
    raise ValueError(
      "prompt must be rows of as many tokens each; prompts of several lengths "
      "are generated one by one."
    ) from error
  if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
    raise ValueError(
      "prompt must be at least one token, integers [B, T] or [T], got shape "
      f"{np.shape(prompt)} of type {tokens.dtype}."
    )
  unknown = (tokens < 0) | (tokens >= model.vocab_size)
  if unknown.any():
    raise ValueError(
      f"prompt must be tokens in [0, {model.vocab_size}), got "
      f"{tokens[unknown][0]}."
    )
  if model.separator is not None and (tokens[:, 1:] == model.separator).any():
    raise ValueError(
      "prompt must be of one document, got the separator, token "
      f"{model.separator}, after its beginning; tokens do not see beyond it: "
      "give what follows the last."
    )
  return tokens.astype(np.int32)


def _check_sampling(temperature, top_p, key) -> Key[Array, ""]:
  if not 0 <= temperature < float("inf"):
    raise ValueError(
      f"temperature must be finite and at least 0, got {temperature=}."
    )
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p must be in (0, 1], got {top_p=}.")
  if temperature > 0 and key is None:
    raise ValueError(
      "key must be given with a temperature above 0, as "
      f"jax.random.key(0), got None with {temperature=}."
    )
  return jax.random.key(0) if key is None else key


def _checked_room(length: int, num_tokens: int, most: int | None) -> int:
  """Returns how many tokens the cache shall have room for."""
  needed = length + num_tokens
  if needed > _MOST:
    raise ValueError(
      f"num_tokens must be at most {_MOST} with the prompt, got {num_tokens=}."
    )
  if most is not None:
    checks.require_positive(max_length=most)
  if most is not None and needed > most:
    raise ValueError(
      f"max_length must hold the prompt and num_tokens, {length} + "
      f"{num_tokens}, got max_length={most}."
    )
  return _rounded(needed) if most is None else max(most, _rounded(length))


def _rounded(length: int) -> int:
  """Returns at least as much, in steps of an eighth of a power of two."""
  step = max(64, 2 ** max((length - 1).bit_length() - 3, 0))
  return -(-length // step) * step


def _evaluation(model: LanguageModel) -> tuple[nnx.GraphDef, Any]:
  """Returns the structure of a model in evaluation mode, and its arrays."""
  structure, *state = nnx.split(model, nnx.Param, ...)
  weights = [nnx.to_pure_dict(nnx.as_pure(part)) for part in state]
  copy = nnx.merge(structure, *weights)
  copy.eval()
  return nnx.split(copy, nnx.Param, ...)[0], weights
