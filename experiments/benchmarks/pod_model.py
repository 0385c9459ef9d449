"""The models that `pod.py` takes to pods, as the trainer would run them."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from deepseek_jax import models, parallel, train
from deepseek_jax.train import plan
from deepseek_jax.train import step as step_lib

VOCABULARY = 32_768


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
  """A decoder, and what a device gets of a batch.

  Attributes:
    num_layers: of the decoder.
    features: size of a token's vector.
    num_heads: of attention.
    hidden: units of the feed-forward.
    length: tokens of a row.
    rows: of a device, whatever the mesh: those of a group along other axes
      than a batch's are together.
    remat: see `nn.LayerStack`.
  """

  num_layers: int = 32
  features: int = 4096
  num_heads: int = 32
  hidden: int = 11_264
  length: int = 8192
  rows: int = 1
  remat: bool | str = "dots"

  def model(self) -> nnx.Module:
    """Returns it with bfloat16 computation and float32 parameters."""
    return models.LanguageModel(
      VOCABULARY,
      features=self.features,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      hidden=self.hidden,
      tied=False,
      scan=True,
      remat=self.remat,
      dtype=jnp.bfloat16,
      rngs=nnx.Rngs(0),
    )

  @property
  def product_params(self) -> int:
    """Parameters that every token is multiplied with."""
    layer = 4 * self.features**2 + 3 * self.features * self.hidden
    return self.num_layers * layer + self.features * VOCABULARY

  def flops(self, spec: parallel.MeshSpec) -> float:
    """Returns the products of a step: 6 a parameter and token, and attention's.

    Of attention it is the half that a causal mask leaves: 4·D·T/2 a token and
    layer forwards, twice that backwards.
    """
    tokens = math.prod(spec.sizes.values()) * self.rows * self.length
    attention = 6 * self.num_layers * self.features * self.length
    return float(tokens) * (6 * self.product_params + attention)


def build(size: Any, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
  """Returns the trainer's step for a mesh, and its arguments' shapes.

  Args:
    size: a `Dense`.
    mesh: of devices that need not be there.
  """
  shape = (mesh.size * size.rows, size.length)
  tokens = jax.ShapeDtypeStruct(shape, np.int32)
  rows = jax.ShapeDtypeStruct(shape[:1], np.float32)
  step = plan.Plan(
    build=size.model,
    tx=optax.adamw(3e-4, weight_decay=0.1),
    spec=step_lib.StepSpec(
      loss=train.TokenCrossEntropy(),
      inputs=("tokens",),
      target="targets",
      task="language",
    ),
    batch={"tokens": tokens, "targets": tokens, "mask": rows},
    mesh=parallel.MeshSpec(**dict(mesh.shape)),
  )
  return step.build_step(mesh)


def builder(size: Any) -> Any:
  """Returns `build` for a size, as `preflight.run` takes it."""
  return functools.partial(build, size)
