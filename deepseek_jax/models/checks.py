"""Errors for what no language model can be built from or read."""

import difflib
import inspect
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer

from deepseek_jax import nn
from deepseek_jax.nn import checks

_OF_THE_MODEL = (
  "features", "num_heads", "num_kv_heads", "head_dim", "is_causal",
  "rotary_base", "dropout", "use_bias", "dtype", "rngs",
)  # fmt: skip


def checked_pattern(
  attention: str | Sequence[str],
  options: Mapping[str, Any] | None,
  num_layers: int,
) -> list[Any]:
  """Returns the kinds of attention that repeat.

  Raises:
    ValueError: they do not divide the layers, or the options are not theirs.
  """
  pattern = [attention] if isinstance(attention, str) else list(attention)
  if not pattern or num_layers % len(pattern):
    raise ValueError(
      "attention must be one kind or a pattern whose length divides the "
      f"layers, got {attention=} for {num_layers=}."
    )
  check_attention(pattern, options)
  return pattern


def check_attention(
  kinds: Sequence[str], options: Mapping[str, Any] | None
) -> None:
  """Raises `ValueError` for options that no layer has, and unknown kinds."""
  for kind in kinds:
    checks.require_choice(("full", "dynamic"), attention=kind)
  if options and "dynamic" not in kinds:
    raise ValueError(
      "attention_options are those of attention='dynamic', got "
      f"attention_options={dict(options)} with attention={tuple(kinds)}."
    )
  for name in options or {}:
    if name in _OF_THE_MODEL:
      raise ValueError(
        f"attention_options must not have {name}, which is the same in all "
        f"layers of a language model, got {name}={(options or {})[name]!r}."
      )
  check_names("attention_options", options, nn.DynamicAttention, _OF_THE_MODEL)


def check_names(
  argument: str,
  options: Mapping[str, Any] | None,
  kind: type,
  given: Sequence[str],
) -> None:
  """Raises `ValueError` for options that a module does not take.

  >>> class Window:
  ...   def __init__(self, window, rngs): ...
  >>> check_names("options", {"windw": 3}, Window, given=["rngs"])
  Traceback (most recent call last):
  ...
  ValueError: options must be of window, got 'windw'; did you mean 'window'?

  Args:
    argument: What the options are called.
    options: Arguments of the module.
    kind: The module's class.
    given: Arguments that it gets from elsewhere.
  """
  named = inspect.signature(kind.__init__).parameters
  known = [name for name in named if name not in ("self", *given)]
  for name in options or {}:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
      raise ValueError(
        f"{argument} must be of {', '.join(known)}, got {name!r}; did you mean "
        f"{near[0]!r}?"
      )


def check_vocabulary(vocab_size: int, separator: int | None) -> None:
  """Raises `ValueError` for a vocabulary or a separator that is none."""
  if not isinstance(vocab_size, int) or vocab_size < 2:
    raise ValueError(
      f"vocab_size must be an integer of at least 2, got {vocab_size=}."
    )
  if separator is None:
    return
  whole = isinstance(separator, numbers.Integral)
  if not whole or not 0 <= separator < vocab_size:
    raise ValueError(
      f"separator must be a token in [0, {vocab_size}) or None, got "
      f"{separator=}."
    )


def checked_tokens(tokens: Integer[Array, "B T"]) -> Int[Array, "B T"]:
  """Returns tokens as int32.

  A smaller type might not hold the separator.

  Raises:
    ValueError: they are not integers, not rows, or none.
  """
  shape, kind = jnp.shape(tokens), jnp.result_type(tokens)
  rows = len(shape) == 2 and all(shape)
  if not rows or not jnp.issubdtype(kind, jnp.integer):
    raise ValueError(
      "tokens must be integers [B, T], at least one, got shape "
      f"{shape} of {kind}."
    )
  return jnp.asarray(tokens, jnp.int32)


def check_length(length: Int[Array, ""] | int | None, time: int) -> None:
  """Raises `ValueError` unless so many of the tokens can count.

  Where the length is traced, nobody knows before it runs.
  """
  if length is None or isinstance(length, jax.core.Tracer):
    return
  if not 1 <= length <= time:
    raise ValueError(
      f"length must be from 1 to the number of tokens, {time}, got {length=}."
    )
