"""Configuration of an experiment: frozen dataclasses that read like a spec.

Each validates its own fields and knows how to make what it describes. Library
classes take plain arguments and never see a configuration.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax import data as data_lib
from deepseek_jax import models, optim
from deepseek_jax.train import losses
from deepseek_jax.train.fit import fit
from deepseek_jax.train.result import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """Which data set to read, and how much of it at a time."""

  name: str = "digits"
  """"digits", or "tfds:NAME" for any TFDS data set."""
  batch_size: int = 64
  """Examples a step."""
  data_dir: str | None = None
  """Where data sets are prepared; TFDS's own default when None."""

  def load(self) -> data_lib.Dataset:
    """Returns the data set."""
    return data_lib.load(self.name, data_dir=self.data_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
  """The CNN -> LSTM -> attention classifier; fields as `models.Classifier`."""

  def build(self, schema: data_lib.Schema, rngs: nnx.Rngs) -> nnx.Module:
    """Returns the model for a data set."""
    return nnx.Linear(1, 1, rngs=rngs)
