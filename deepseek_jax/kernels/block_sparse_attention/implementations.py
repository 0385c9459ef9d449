"""Which implementation can run, and why another cannot."""

import importlib
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout

Implementation = Literal["xla", "tpu", "gpu"]
IMPLEMENTATIONS = ("tpu", "gpu", "xla")  # The fastest first.
_HOPPER = "9.0"


def reasons(layout: Layout, heads: Heads) -> dict[str, str | None]:
  """Returns for every implementation why it cannot run here; None if it can."""
  return {name: _reason(name, layout, heads) for name in IMPLEMENTATIONS}


def choose(
  layout: Layout, heads: Heads, implementation: Implementation | None
) -> Implementation:
  """Returns the implementation to use.

  Raises:
    ValueError: there is no such implementation.
    NotImplementedError: the one asked for cannot run here.
  """
  if implementation is None:
    found = reasons(layout, heads)
    return next(name for name in IMPLEMENTATIONS if found[name] is None)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"implementation must be one of {IMPLEMENTATIONS} or None, got "
      f"{implementation=}."
    )
  if reason := _reason(implementation, layout, heads):
    raise NotImplementedError(
      f"{implementation=} cannot run: {reason}. Use implementation='xla', or "
      "None for the fastest that can."
    )
  return implementation


def run(
  implementation: Implementation,
  layout: Layout,
  heads: Heads,
  ids: Int[Array, "P T R"],
) -> Float[Array, "P T G H"]:
  """Returns the outputs of an implementation."""
  module = _module(implementation)
  return module.attend(layout, module.tuning(layout, heads), heads, ids)[0]


def _module(name: str) -> Any:
  # Each loads compilers of its own, which others need not wait for.
  return importlib.import_module(f"{__package__}.{name}")


def _reason(name: str, layout: Layout, heads: Heads) -> str | None:
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
  return module.why_not(layout, module.tuning(layout, heads), heads)
