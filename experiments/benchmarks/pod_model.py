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

  def model(self) -> models.LanguageModel:
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
      **self.options,
    )

  @property
  def options(self) -> dict[str, Any]:
    """Further arguments of the model."""
    return {}

  @property
  def num_params(self) -> int:
    """Numbers that are trained."""
    state = nnx.state(nnx.eval_shape(self.model), nnx.Param)
    return sum(x.size for x in jax.tree.leaves(nnx.as_pure(state)))

  def tokens(self, spec: parallel.MeshSpec) -> int:
    """Returns the tokens of a step, of all devices."""
    return math.prod(spec.sizes.values()) * self.rows * self.length

  def flops(self, spec: parallel.MeshSpec) -> float:
    """Returns the products that a step asks for, of all devices."""
    model = nnx.eval_shape(self.model)
    return self.tokens(spec) * models.token_flops(model, self.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(Dense):
  """The same with experts to choose among.

  Attributes:
    experts: of a layer, each with `hidden` units.
    top_k: experts of a token.
    num_shared: experts that all tokens go through besides.
    capacity_factor: room at an expert, see `nn.MixtureOfExperts`.
  """

  num_layers: int = 24
  features: int = 2048
  num_heads: int = 16
  hidden: int = 1024
  length: int = 4096
  experts: int = 64
  top_k: int = 4
  num_shared: int = 1
  capacity_factor: float = 1.25

  @property
  def options(self) -> dict[str, Any]:
    """Those of the experts."""
    names = ("top_k", "num_shared", "capacity_factor")
    return {
      "experts": self.experts,
      "experts_options": {name: getattr(self, name) for name in names},
    }

  def swapped(self, spec: parallel.MeshSpec) -> float:
    """Returns the bytes that a device sends in a step's all_to_alls, by hand.

    To each expert a device sends `capacity_factor` times what an expert would
    get of its tokens if all got equally many, rounded up: rows of `features` in
    two bytes. There and back again; as often on the way back; and once more
    there and back where layers are recomputed. Of what it sends, a share stays
    with itself.
    """
    n = spec.sizes["expert"]
    fair = self.rows * self.length * self.top_k / self.experts
    room = math.ceil(self.capacity_factor * fair)
    one_way = self.experts * room * self.features * 2 * (n - 1) / n
    return self.num_layers * (6 if self.remat else 4) * one_way


def build(size: Dense, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
  """Returns the trainer's step for a mesh, and its arguments' shapes.

  Args:
    size: a `Dense` or a `Mixture`.
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


def builder(size: Dense) -> Any:
  """Returns `build` for a size, as `preflight.run` takes it."""
  return functools.partial(build, size)
