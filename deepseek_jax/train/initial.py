"""The state before the first step, made where it is to lie."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from deepseek_jax.data.schema import Task
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.placement import Placement
from deepseek_jax.train.state import TrainState

Build = Callable[[], nnx.Module]
"""Makes a model with its initial weights."""


def without_values(model: nnx.Module | Build) -> nnx.Module:
  """Returns a model; one that is yet to be built has shapes for arrays."""
  return model if isinstance(model, nnx.Module) else nnx.eval_shape(model)


def initial_state(
  model: nnx.Module | Build,
  tx: optax.GradientTransformation,
  task: Task,
  placement: Placement,
) -> TrainState:
  """Returns the state before the first step, on the devices of a mesh.

  What is yet to be built is built in parts: no device, and no host, ever holds
  the whole of a model that is cut over devices.

  Args:
    model: A module, whose arrays are copied, or what builds one.
    tx: Any Optax transform.
    task: What is counted.
    placement: Where arrays go.

  Raises:
    ValueError: If the model has no parameters, or rules do not fit it.
  """
  shapes, shardings = abstract_state(model, tx, task, placement)
  make = functools.partial(state_lib.create, tx=tx, task=task)
  if not isinstance(model, nnx.Module):
    return jax.jit(lambda: make(model()), out_shardings=shardings)()
  del shapes
  structure, *arrays = state_lib.split(model)
  # Arrays may come from another mesh, as those of an earlier result do.
  arrays = jax.device_put(arrays, [shardings.params, shardings.rest])
  return jax.jit(
    lambda params, rest: make(nnx.merge(structure, params, rest)),
    out_shardings=shardings,
  )(*arrays)


def abstract_state(
  model: nnx.Module | Build,
  tx: optax.GradientTransformation,
  task: Task,
  placement: Placement,
) -> tuple[TrainState, Any]:
  """Returns shapes and shardings of the state; allocates nothing.

  Args:
    model: A module, or what builds one.
    tx: Any Optax transform.
    task: What is counted.
    placement: Where arrays would go.
  """
  build = (lambda: model) if isinstance(model, nnx.Module) else model
  shapes = jax.eval_shape(lambda: state_lib.create(build(), tx, task=task))
  return shapes, placement.shardings(shapes, without_values(model))
