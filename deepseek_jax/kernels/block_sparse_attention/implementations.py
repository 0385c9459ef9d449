"""Which implementation can run, and why another cannot."""

import importlib
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention.problem import (
  Layout,
  Tokens,
  by_head,
  by_token,
)

Implementation = Literal["xla", "tpu", "gpu"]
IMPLEMENTATIONS = ("tpu", "gpu", "xla")  # The fastest first.
_HOPPER = "9.0"


def reasons(layout: Layout, tokens: Tokens) -> dict[str, str | None]:
  """Returns for every implementation why it cannot run here; None if it can."""
  return {name: _reason(name, layout, tokens) for name in IMPLEMENTATIONS}


def choose(
  layout: Layout, tokens: Tokens, implementation: Implementation | None
) -> Implementation:
  """Returns the implementation to use.

  Raises:
    ValueError: there is no such implementation.
    NotImplementedError: the one asked for cannot run here.
  """
  if implementation is None:
    found = reasons(layout, tokens)
    return next(name for name in IMPLEMENTATIONS if found[name] is None)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation must be one of {IMPLEMENTATIONS} or None, got "
      f"{implementation=}."
    )
  if reason := _reason(implementation, layout, tokens):
    raise NotImplementedError(
      f"{implementation=} cannot run: {reason}. Use implementation='xla', or "
      "None for the fastest that can."
    )
  return implementation


def run(
  implementation: Implementation,
  layout: Layout,
  tokens: Tokens,
  ids: Int[Array, "B T K R"],
) -> Float[Array, "B T K G H"]:
  """Returns the outputs of an implementation."""
  module = _module(implementation)
  if implementation == "xla":
    return module.attend(layout, module.tuning(layout, tokens), tokens, ids)[0]
  heads = tokens.heads(layout.scale)
  tuning = module.tuning(layout, heads)
  out = module.attend(layout, tuning, heads, by_head(ids))[0]
  return by_token(out, ids.shape[2])


def _module(name: str) -> Any:
  # Each loads compilers of its own, which others need not wait for.
  return importlib.import_module(f"{__package__}.{name}")


def _reason(name: str, layout: Layout, tokens: Tokens) -> str | None:
  if name == "xla":
    return None
  backend = jax.default_backend()
  if backend != name:
    return f"it needs a {name.upper()}, but the default backend is {backend!r}"
  if name == "gpu":
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability != _HOPPER:
      return (
        f"it needs compute capability {_HOPPER} (Hopper), but "
        f"{device.device_kind} has {capability}"
      )
  module = _module(name)
  heads = jax.eval_shape(lambda tokens: tokens.heads(1.0), tokens)
  return module.why_not(layout, module.tuning(layout, heads), heads)
