"""Adaptive optimizers, dynamic attention and a trainer, for JAX.

Every namespace loads when it is first touched, so importing the library costs
no more than importing what you use of it:

>>> import deepseek_jax as dj
>>> tx = dj.optim.deepseek(1e-2, warmup_steps=100)
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
  "comm",
  "core",
  "data",
  "kernels",
  "models",
  "nn",
  "optim",
  "parallel",
  "train",
]

if TYPE_CHECKING:
  from deepseek_jax import comm as comm
  from deepseek_jax import core as core
  from deepseek_jax import data as data
  from deepseek_jax import kernels as kernels
  from deepseek_jax import models as models
  from deepseek_jax import nn as nn
  from deepseek_jax import optim as optim
  from deepseek_jax import parallel as parallel
  from deepseek_jax import train as train


def __getattr__(name: str):
  if name in __all__:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
