"""Metrics and predictions of given weights on a split."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from deepseek_jax import data as data_lib
from deepseek_jax.nn import LayerStack
from deepseek_jax.train import metrics as metrics_lib
from deepseek_jax.train.placement import Placement
from deepseek_jax.train.step import (
  IN_FLIGHT,
  StepSpec,
  jit_once,
  make_eval_step,
)

_ROWS = 512
_TOKENS = 16_384  # Of a batch of text; beyond, activations leave the caches.


def batch_rows(
  placement: Placement, model: nnx.Module, *splits: data_lib.Split
) -> int:
  """Returns a batch size that fits every split and shares out over devices.

  In a pipeline it shares out over micro-batches too.

  Raises:
    ValueError: If a split has fewer examples than that takes.
  """
  rows = min(_ROWS, *map(len, splits))
  parts = placement.row_parts * _microbatches(placement, model)
  if splits[0].schema.task == "language":
    length = splits[0].schema.target_feature.shape[0]
    rows = min(rows, max(_TOKENS // length, parts))
  shared = rows - rows % parts
  if not shared:
    raise ValueError(
      f"a split must hold at least {parts} examples to be evaluated, one for "
      "each part that the mesh, and micro-batches, cut rows into, got "
      f"{rows}."
    )
  return shared


def _microbatches(placement: Placement, model: nnx.Module) -> int:
  """Returns the least common multiple of what pipelines cut rows into."""
  stacks = [x for _, x in nnx.iter_modules(model) if isinstance(x, LayerStack)]
  given = [x.microbatches for x in stacks if x.microbatches is not None]
  automatic = placement.mesh.shape["stage"] if len(given) < len(stacks) else 1
  return math.lcm(automatic, *given)


class Evaluator:
  """Runs one jitted evaluation step over any split of a data set.

  Every batch has the same shape, the last one padded and masked, so the step is
  traced once whatever the split.

  Args:
    structure: The model's graph definition, in evaluation mode.
    spec: Loss and names.
    batch_size: Rows a batch; splits smaller than that use all of theirs.
    placement: Where things live.
  """

  def __init__(
    self,
    structure: nnx.GraphDef,
    spec: StepSpec,
    *,
    batch_size: int,
    placement: Placement,
  ):
    self._spec = spec
    self._batch_size = batch_size
    self._placement = placement
    self._step = jit_once(
      make_eval_step(structure, spec),
      "evaluation step",
      mesh=placement.mesh,
      donate_argnums=2,
      out_shardings=(placement.replicated, placement.rows),
    )

  def metrics(
    self, params: Any, rest: Any, split: data_lib.Split
  ) -> dict[str, float]:
    """Returns the metrics over a whole split, as `split/metric` -> float."""
    total = self._empty()
    for number, batch in enumerate(self._batches(split), start=1):
      total, _ = self._step(params, rest, total, batch)
      if number % IN_FLIGHT == 0:
        jax.block_until_ready(total)
    values = jax.device_get(metrics_lib.compute(total))
    return metrics_lib.named(split.name, values)

  def predict(
    self, params: Any, rest: Any, split: data_lib.Split
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (outputs, targets) of every example, in the split's order."""
    outputs, targets = [], []
    for batch in self._batches(split):
      _, found = self._step(params, rest, self._empty(), batch)
      found, wanted, mask = self._placement.on_host(
        (found, batch[self._spec.target], batch["mask"])
      )
      outputs.append(found[mask > 0])
      targets.append(wanted[mask > 0])
    return np.concatenate(outputs), np.concatenate(targets)

  def _empty(self) -> metrics_lib.Metrics:
    return jax.device_put(
      metrics_lib.empty(self._spec.task), self._placement.replicated
    )

  def _batches(self, split: data_lib.Split) -> Iterator[dict[str, Any]]:
    return iter(
      data_lib.batches(
        split,
        self._batch_size,
        shuffle=False,
        epochs=1,
        prefetch=0,
        **self._placement.reading(self._batch_size),
      )
    )


def predictions(
  outputs: np.ndarray,
  targets: np.ndarray,
  split: data_lib.Split,
  *,
  classification: bool,
  pictures: int = 24,
) -> dict[str, np.ndarray]:
  """Returns what predictions.npz holds: all answers, and the worst as pictures.

  Args:
    outputs: [N, K] logits, or [N, 1] numbers.
    targets: [N] labels, or numbers.
    split: Where the answers belong.
    classification: Whether `outputs` are logits.
    pictures: How many of the worst examples to keep.
  """
  if classification:
    badness = _confidence_in_wrong(outputs, targets)
  else:
    error = outputs.reshape(len(outputs), -1) - targets.reshape(
      len(targets), -1
    )
    badness = np.square(error).mean(axis=1)
  worst = np.argsort(-badness, kind="stable")[:pictures]
  result = {
    "labels": targets,
    "logits": outputs,
    "index": np.arange(len(targets)),
    "worst": worst,
  }
  schema = split.schema
  images = [n for n in schema.inputs if schema.features[n].kind == "image"]
  if images:
    feature = schema.features[images[0]]
    result["worst_images"] = feature.to_batch(split.take(worst)[images[0]])
  return result


def _confidence_in_wrong(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns the probability of the best wrong class less that of the label."""
  logits = logits - logits.max(axis=1, keepdims=True)
  p = np.exp(logits)
  p /= p.sum(axis=1, keepdims=True)
  rows = np.arange(len(p))
  right = p[rows, labels].copy()
  p[rows, labels] = -1
  return p.max(axis=1) - right
