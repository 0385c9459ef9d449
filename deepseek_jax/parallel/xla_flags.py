"""The compiler's flags that let communication run beside computation.

XLA reads them when the first device is touched, and dies of one that it does
not know: those below were accepted by jaxlib 0.10.2 and 0.12.0.1, and by
libtpu 0.0.42.1 and 0.0.50.1. A flag that the user has set, to whatever value,
is left alone.

References:
  OpenXLA, "XLA:GPU optimization levels", 2025.
  https://openxla.org/xla/gpu_optimization_levels
  OpenXLA, "XLA flags guidance", 2025. https://openxla.org/xla/flags_guidance
"""

import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType

import jax

from deepseek_jax.core.arguments import require_one_of

GPU: Mapping[str, str] = MappingProxyType(
  {
    "xla_gpu_enable_latency_hiding_scheduler": (
      "starts a collective early and waits for it late"
    ),
    "xla_gpu_enable_pipelined_all_gather": (
      "fetches the parameters of the next layer of a scan during this one"
    ),
    "xla_gpu_enable_pipelined_reduce_scatter": (
      "scatters the gradients of a layer during the next one"
    ),
    "xla_gpu_enable_pipelined_all_reduce": (
      "sums the gradients of a layer during the next one"
    ),
    "xla_gpu_enable_while_loop_double_buffering": (
      "unrolls a scan by two, so that two layers can overlap at all"
    ),
  }
)
"""Flags of `XLA_FLAGS`, all set to true, and why."""

TPU: Mapping[str, str] = MappingProxyType(
  {
    "xla_tpu_enable_latency_hiding_scheduler": (
      "starts a collective early and waits for it late"
    ),
    "xla_tpu_overlap_compute_collective_tc": (
      "computes while the network's engine moves bytes"
    ),
    "xla_enable_async_all_gather": "makes all-gathers asynchronous at all",
    "xla_tpu_enable_data_parallel_all_reduce_opt": (
      "overlaps the sum of gradients over the slow network between slices"
    ),
    "xla_tpu_data_parallel_opt_different_sized_ops": (
      "the same for gradients of unequal size"
    ),
  }
)
"""Flags of `LIBTPU_INIT_ARGS`, all set to true, and why.

Whether products carry all-gathers along is the compiler's choice: told to (by
`xla_tpu_enable_async_collective_fusion` and its kin), libtpu 0.0.50.1 refuses
to compile for any chip but v5e.
"""

_TABLES = {"gpu": ("XLA_FLAGS", GPU), "tpu": ("LIBTPU_INIT_ARGS", TPU)}
_PLUGINS = {
  "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"),
  "tpu": ("libtpu",),
}
_NAMES = {"gpu": ("gpu", "cuda"), "tpu": ("tpu",)}


def flags(platform: str) -> str:
  """Returns the flags for a platform as one writes them in the environment.

  >>> flags("gpu").split()[0]
  '--xla_gpu_enable_latency_hiding_scheduler=true'

  Args:
    platform: "gpu" or "tpu".
  """
  require_one_of(tuple(_TABLES), platform=platform)
  return " ".join(f"--{name}=true" for name in _TABLES[platform][1])


def set_xla_flags(environment: MutableMapping[str, str] = os.environ) -> None:
  """Adds the flags of the platforms that JAX will use to the environment.

  `deepseek-jax train` calls it, and `parallel.initialize` in jobs of several
  processes. In a script of your own where one process has many devices, call it
  before anything touches a device.

  Args:
    environment: Where to set them.
  """
  for platform, (variable, table) in _TABLES.items():
    if not _used(platform):
      continue
    given = environment.get(variable, "")
    known = {word.lstrip("-").partition("=")[0] for word in given.split()}
    ours = [f"--{name}=true" for name in table if name not in known]
    environment[variable] = " ".join([*given.split(), *ours])


def _used(platform: str) -> bool:
  """Says whether JAX may choose this platform."""
  chosen = jax.config.jax_platforms  # pyrefly: ignore
  if chosen:
    return any(name in _NAMES[platform] for name in chosen.split(","))
  found = (importlib.util.find_spec(name) for name in _PLUGINS[platform])
  return any(spec is not None for spec in found)
