"""The hot step: one jitted function from (state, batch) to state."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from deepseek_jax import comm, parallel
from deepseek_jax import data as data_lib
from deepseek_jax.core import numerics, tree
from deepseek_jax.data.schema import Task
from deepseek_jax.train import losses as losses_lib
from deepseek_jax.train import metrics as metrics_lib
from deepseek_jax.train.replicas import Replicas
from deepseek_jax.train.state import TrainState, pure

Batch = Mapping[str, Array]

# Steps that may be under way at once. More would hold more batches in memory,
# and end a process of several CPU devices: XLA lets 32 computations a device be
# under way, and a thread that waits for its turn there is missing where the
# other devices wait for it in a collective.
IN_FLIGHT = 16

_LOSSES: dict[Task, Callable[[], losses_lib.Loss]] = {
  "classification": losses_lib.CrossEntropy,
  "regression": losses_lib.MeanSquaredError,
  "language": losses_lib.TokenCrossEntropy,
}


class RecompileWarning(UserWarning):
  """A step was traced a second time: some input changed its shape or type."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSpec:
  """What a step does, apart from the model and the optimizer.

  Attributes:
    loss: Loss per example.
    inputs: Names in the batch that go to the model, in order.
    target: Name in the batch that goes to the loss.
    task: What is predicted and counted.
    token_bytes: Bytes of text a token stands for, where the task is language.
    accumulate: Micro-batches a batch is cut into; at least 1.
    l1: Strength of the L1 penalty.
    l2: Strength of the L2 penalty.
    max_skipped: Non-finite steps in a row after which steps do nothing.
  """

  loss: losses_lib.Loss
  inputs: tuple[str, ...]
  target: str
  task: Task
  token_bytes: np.ndarray | None = None
  accumulate: int = 1
  l1: float = 0.0
  l2: float = 0.0
  max_skipped: int = 10

  @classmethod
  def of(
    cls,
    schema: data_lib.Schema,
    loss: losses_lib.Loss | None = None,
    **options: Any,
  ) -> "StepSpec":
    """Returns the step for a data set.

    Args:
      schema: What a batch holds.
      loss: Loss per example; None chooses cross entropy for labels and tokens
        and mean squared error for numbers.
      **options: The other fields.
    """
    if schema.tokenizer is not None:
      options["token_bytes"] = schema.tokenizer.token_bytes
    return cls(
      loss=_LOSSES[schema.task]() if loss is None else loss,
      inputs=schema.inputs,
      target=schema.target,
      task=schema.task,
      **options,
    )

  def __post_init__(self):
    """Checks the loss and the numbers."""
    if not isinstance(self.loss, losses_lib.Loss):
      raise ValueError(
        "loss must return a loss per example and have a method `weights`, as "
        f"train.CrossEntropy does, got {self.loss!r}."
      )
    for name in ("accumulate", "max_skipped"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be at least 1, got {name}={getattr(self, name)}."
        )
    for name in ("l1", "l2"):
      if not 0 <= getattr(self, name) < math.inf:
        raise ValueError(
          f"{name} must be finite and at least 0, got "
          f"{name}={getattr(self, name)}."
        )


def make_train_step(
  structure: nnx.GraphDef,
  tx: optax.GradientTransformation,
  spec: StepSpec,
  replicas: Replicas | None = None,
) -> Callable[[TrainState, Batch], TrainState]:
  """Returns the training step, not yet jitted.

  The loss is the exact weighted mean over the whole batch, whatever the number
  of micro-batches and however the rows are padded. A step whose loss or
  gradient is not finite changes nothing but its counters; after
  `spec.max_skipped` of them in a row every further step does nothing at all,
  so the state stays the one to look at.

  Args:
    structure: The model's graph definition, in training mode.
    tx: Any Optax transform; it gets the loss as `value`.
    spec: Loss, names, accumulation and penalties.
    replicas: The devices that exchange gradients by `tx`, which is then their
      `transform`; None leaves sums over devices to XLA.
  """
  tx = optax.with_extra_args_support(tx)

  def advance(state: TrainState, found) -> TrainState:
    value, grads, rest, metrics = found
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, value=value
    )
    return state._replace(
      params=optax.apply_updates(state.params, updates),
      rest=rest,
      opt_state=opt_state,
      metrics=metrics_lib.merge(state.metrics, metrics),
      skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row),
    )

  def skip(state: TrainState, found) -> TrainState:
    del found
    return state._replace(
      skipped=state.skipped + 1,
      skipped_in_a_row=state.skipped_in_a_row + 1,
    )

  def train_step(state: TrainState, batch: Batch) -> TrainState:
    found = _gradient(structure, spec, state, batch, replicas)
    value, grads, _, _ = found
    finite = jnp.isfinite(value) & numerics.all_finite(grads)
    if replicas is not None:
      finite = replicas.total(~finite) == 0
    halted = state.skipped_in_a_row >= spec.max_skipped
    state = state._replace(step=state.step + (~halted).astype(jnp.int32))
    # Branches, not `where`: choosing between the old and the new of donated
    # arrays would keep both alive, and copy every moment of the optimizer.
    branch = jnp.where(halted, 2, jnp.where(finite, 0, 1))
    return jax.lax.switch(
      branch, (advance, skip, lambda state, _: state), state, found
    )

  return train_step if replicas is None else replicas.step(train_step)


def _gradient(
  structure: nnx.GraphDef,
  spec: StepSpec,
  state: TrainState,
  batch: Batch,
  replicas: Replicas | None,
):
  """Returns (loss, gradient, other model state, metrics) of one batch."""
  weights = batch["mask"] * spec.loss.weights(batch[spec.target])
  if replicas is None:
    return _local_gradient(
      structure, spec, state, batch, weights, jnp.sum(weights)
    )
  # The mean over devices is to be the gradient of the mean over all rows.
  total = replicas.total(jnp.sum(weights)) / replicas.count
  local = state._replace(
    params=comm.local_params(state.opt_state, state.params),
    rest=replicas.own_streams(state.rest),
  )
  value, grads, rest, metrics = _local_gradient(
    structure, spec, local, batch, weights, total
  )
  return (
    replicas.mean(value),
    grads,
    replicas.joined(state.rest, rest),
    replicas.metrics(metrics),
  )


def _local_gradient(
  structure: nnx.GraphDef,
  spec: StepSpec,
  state: TrainState,
  batch: Batch,
  weights: Array,
  total: Array,
):
  scale = numerics.safe_ratio(1.0, total, default=0.0)

  def objective(params, rest, micro, weights):
    model = nnx.merge(structure, params, rest)
    with parallel.cut_batch(spec.accumulate):
      outputs = model(*[micro[name] for name in spec.inputs])
    losses = spec.loss(outputs, micro[spec.target])
    value = scale * jnp.sum(weights * losses)
    if spec.l1 or spec.l2:
      value += losses_lib.penalty(params, spec.l1, spec.l2) / spec.accumulate
    metrics = metrics_lib.measure(
      losses,
      outputs,
      micro[spec.target],
      weights=weights,
      mask=micro["mask"],
      task=spec.task,
      token_bytes=spec.token_bytes,
    )
    rest = pure(nnx.split(model, nnx.Param, ...)[2])
    return value, (rest, metrics)

  value_and_grad = jax.value_and_grad(objective, has_aux=True)
  if spec.accumulate == 1:
    (value, (rest, metrics)), grads = value_and_grad(
      state.params, state.rest, batch, weights
    )
    return value, grads, rest, metrics

  def body(carry, micro):
    value, grads, rest, metrics = carry
    (v, (rest, m)), g = value_and_grad(state.params, rest, *micro)
    grads = jax.tree.map(jnp.add, grads, g)
    return (value + v, grads, rest, metrics_lib.merge(metrics, m)), None

  zero = (
    jnp.zeros((), jnp.float32),
    jax.tree.map(jnp.zeros_like, state.params),
    state.rest,
    metrics_lib.empty(spec.task),
  )
  micros = jax.tree.map(
    lambda x: _interleave(x, spec.accumulate), (dict(batch), weights)
  )
  return jax.lax.scan(body, zero, micros)[0]


def _interleave(x: Array, parts: int) -> Array:
  """Cuts [B, ...] into [parts, B / parts, ...], micro-batch i from row i on.

  Striding rather than slicing: a batch sharded over its rows then gives every
  device its share of every micro-batch, without communication.
  """
  return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def make_eval_step(structure: nnx.GraphDef, spec: StepSpec) -> Callable:
  """Returns `(params, rest, metrics, batch) -> (metrics, outputs)`.

  Args:
    structure: The model's graph definition, in evaluation mode.
    spec: Loss and names; penalties do not count in evaluation.
  """

  def eval_step(params, rest, metrics, batch):
    model = nnx.merge(structure, params, rest)
    outputs = model(*[batch[name] for name in spec.inputs])
    targets = batch[spec.target]
    seen = metrics_lib.measure(
      spec.loss(outputs, targets),
      outputs,
      targets,
      weights=batch["mask"] * spec.loss.weights(targets),
      mask=batch["mask"],
      task=spec.task,
      token_bytes=spec.token_bytes,
    )
    return metrics_lib.merge(metrics, seen), outputs.astype(jnp.float32)

  return eval_step


def jit_once(
  function: Callable, name: str, *, mesh: Mesh | None = None, **options: Any
) -> Callable:
  """`jax.jit` that warns, with the shapes at fault, when it traces again.

  Costs nothing per call: the check runs only while tracing.

  Args:
    function: What to compile.
    name: What to call it in the warning.
    mesh: What modules find when they ask for the sizes of a mesh's axes.
    **options: Passed to `jax.jit`.

  Returns:
    The jitted function; its attribute `traces` lists the argument types of
    every trace.
  """
  traces: list[dict[str, str]] = []

  def traced(*args):
    types = {
      path: str(jax.typeof(leaf))
      for path, leaf in zip(
        tree.leaf_paths(args), jax.tree.leaves(args), strict=True
      )
    }
    if traces:
      warnings.warn(
        f"{name} was compiled again because its inputs changed: "
        + _difference(traces[-1], types),
        RecompileWarning,
        stacklevel=2,
      )
    traces.append(types)
    with on_mesh(mesh):
      return function(*args)

  jitted = jax.jit(traced, **options)
  jitted.traces = traces  # pyrefly: ignore
  return jitted


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """Returns the context in which modules are traced for a mesh."""
  if mesh is None or mesh.size == 1:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _difference(old: dict[str, str], new: dict[str, str]) -> str:
  changed = [
    f"{path}: {old.get(path, 'absent')} -> {new.get(path, 'absent')}"
    for path in sorted(old.keys() | new.keys())
    if old.get(path) != new.get(path)
  ]
  return "; ".join(changed) or "not its shapes (a static part changed)"
