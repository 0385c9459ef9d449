"""Everything a step changes, as one tree of plain arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int

from deepseek_jax.comm.workers import Workers
from deepseek_jax.data.schema import Task
from deepseek_jax.optim.averaging import averaged_params
from deepseek_jax.train import metrics as metrics_lib


class TrainState(NamedTuple):
  """What one step takes and gives back; all of it goes into a checkpoint.

  Attributes:
    step: Steps taken so far, skipped ones included; int32, no dimensions.
    params: Nested dict of the model's parameters.
    rest: Nested dict of the model's other state: random streams, running
      statistics.
    opt_state: State of the Optax transform.
    metrics: Sums since the last log line.
    skipped: Steps skipped so far because something was not finite; int32.
    skipped_in_a_row: How many of them came last, without a good one between;
      int32.
  """

  step: Int[Array, ""]
  params: Any
  rest: Any
  opt_state: Any
  metrics: metrics_lib.Metrics
  skipped: Int[Array, ""]
  skipped_in_a_row: Int[Array, ""]


def pure(state: Any) -> Any:
  """Returns a nested dict of arrays for an `nnx.State` of Variables.

  Dicts flatten in C++, which `nnx.State` does not, and their key paths carry no
  wrapper: `['layer']['kernel']`.
  """
  return nnx.to_pure_dict(nnx.as_pure(state))


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
  """Returns the model's structure, its parameters and its other state.

  `nnx.merge(structure, params, rest)` gives the model back, inside a traced
  function too.
  """
  structure, params, rest = nnx.split(model, nnx.Param, ...)
  return structure, pure(params), pure(rest)


def structures(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.GraphDef]:
  """Returns the model's structure in training mode and in evaluation mode.

  Leaves the model in evaluation mode.
  """
  model.train()
  training = split(model)[0]
  model.eval()
  return training, split(model)[0]


def create(
  model: nnx.Module,
  tx: optax.GradientTransformation,
  *,
  task: Task,
) -> TrainState:
  """Returns the state before the first step.

  Parameters are copied: the step donates its state, and the caller's model
  keeps its arrays.

  Args:
    model: Any module; its `nnx.Param` variables are trained.
    tx: Any Optax transform.
    task: What is counted, see `metrics.empty`.

  Raises:
    ValueError: If the model has no parameters.
  """
  _, params, rest = split(model)
  if not jax.tree.leaves(params):
    raise ValueError(
      f"model must have nnx.Param variables, got none in {type(model)}."
    )
  params, rest = jax.tree.map(jnp.copy, (params, rest))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    rest=rest,
    opt_state=tx.init(params),
    metrics=metrics_lib.empty(task),
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_a_row=jnp.zeros((), jnp.int32),
  )


def evaluated(state: TrainState) -> Any:
  """Returns the parameters to evaluate and to save.

  The optimizer's average, if it has one; of workers that step for themselves
  the common ones: their averages are of ways that end at every meeting.
  """
  if has_workers(state.opt_state):
    return state.params
  return averaged_params(state.opt_state, state.params)


def has_workers(opt_state: optax.OptState) -> bool:
  """Says whether devices step for themselves, see `comm.diloco`."""
  is_worker = lambda x: isinstance(x, Workers)
  return any(map(is_worker, jax.tree.leaves(opt_state, is_leaf=is_worker)))
