"""Running metrics: sums and counts on the device, means on the host."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import metrax
import numpy as np
from jaxtyping import Array, Float, Int, Num

from deepseek_jax.data.schema import Task

# Name -> a metrax metric, a small tree of sums that merges.
Metrics = dict[str, Any]


# What is counted beside the loss, for each kind of task.
KINDS = {
  "classification": {"accuracy": metrax.Accuracy},
  "regression": {"rmse": metrax.RMSE},
  "language": {"accuracy": metrax.Accuracy, "bits_per_byte": metrax.Average},
}


def empty(task: Task) -> Metrics:
  """Returns metrics that have seen nothing.

  Args:
    task: "classification" counts accuracy beside the loss, "regression" the
      root mean squared error, "language" the accuracy and the bits that the
      loss is worth for each byte of text.

  Examples:
    >>> sorted(empty("classification"))
    ['accuracy', 'loss']
  """
  # Every metric gets arrays of its own: the step donates them, and a buffer
  # may be donated only once.
  return {
    name: jax.tree.map(
      lambda x: jnp.zeros(jnp.shape(x), jnp.float32), kind.empty()
    )
    for name, kind in {"loss": metrax.Average, **KINDS[task]}.items()
  }


def measure(
  losses: Float[Array, "B"],
  outputs: Float[Array, "B *K"],
  targets: Num[Array, "B *_"],
  *,
  weights: Float[Array, "B"],
  mask: Float[Array, "B"],
  task: Task,
  token_bytes: Int[np.ndarray, "V"] | None = None,
) -> Metrics:
  """Returns the metrics of one batch; padded rows (mask 0) count nothing.

  Args:
    losses: Loss of each example.
    outputs: What the model returned: logits, or predictions.
    targets: Integer labels, numbers, or tokens with -1 for none.
    weights: Weight of each example in the mean loss, padding included as 0.
    mask: 1 for a real row, 0 for padding; accuracy and error count rows, not
      class weights.
    task: As in `empty`.
    token_bytes: Bytes of text a token stands for; None for one each.
  """
  # A padded row repeats a real one, so its loss is finite and 0 * loss is 0.
  result: Metrics = {
    "loss": metrax.Average.from_model_output(losses, weights),
  }
  if task == "regression":
    flat = outputs.astype(jnp.float32).reshape(outputs.shape[0], -1)
    wanted = targets.astype(jnp.float32).reshape(flat.shape)
    result["rmse"] = metrax.RMSE.from_model_output(
      flat, wanted, jnp.broadcast_to(mask[:, None], flat.shape)
    )
  else:
    if task == "language":
      mask = mask[:, None] * (targets >= 0)
      sizes = (
        mask
        if token_bytes is None
        else mask * jnp.asarray(token_bytes)[targets]
      )
      result["bits_per_byte"] = metrax.Average(
        total=jnp.sum(weights * losses) / np.log(2), count=jnp.sum(sizes)
      )
    result["accuracy"] = metrax.Accuracy.from_model_output(
      jnp.argmax(outputs, axis=-1), targets, mask
    )
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), result)


def merge(first: Metrics, second: Metrics) -> Metrics:
  """Returns the metrics of both batches together."""
  return {name: metric.merge(second[name]) for name, metric in first.items()}


def compute(metrics: Metrics) -> dict[str, Float[Array, ""]]:
  """Returns the value of every metric; 0 where nothing was counted."""
  return {name: metric.compute() for name, metric in metrics.items()}


def number(value: Any) -> float:
  """Returns a float32 scalar as the shortest number that reads back equal.

  Examples:
    >>> number(jnp.float32(0.1))
    0.1
  """
  return float(str(np.float32(value)))


def named(split: str, values: Mapping[str, Any]) -> dict[str, float]:
  """Returns host floats under the names `split/metric`.

  Examples:
    >>> named("test", {"loss": 0.5})
    {'test/loss': 0.5}
  """
  return {f"{split}/{name}": number(value) for name, value in values.items()}
