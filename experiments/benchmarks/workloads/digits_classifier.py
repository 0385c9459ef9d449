"""The CNN -> LSTM -> attention classifier, small, on shifted digits."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax import models
from workloads import Workload, _digits


def model(seed):
  return models.Classifier(
    (8, 8, 1),
    num_classes=10,
    channels=(16, 32),
    sequence="positions",
    lstm_features=32,
    num_heads=2,
    dropout=0.0,
    rngs=nnx.Rngs(seed),
  )


@functools.cache
def structure():
  """Everything of the model but its parameters."""
  with jax.ensure_compile_time_eval():  # The first call may be in a trace.
    graph, _, rest = nnx.split(model(0), nnx.Param, ...)
  return graph, nnx.to_pure_dict(rest)


def init(seed):
  return nnx.to_pure_dict(nnx.split(model(seed), nnx.Param, ...)[1])


def loss(params, batch):
  images = jnp.asarray(batch["image"]).reshape(-1, 8, 8, 1)
  graph, rest = structure()
  logits = nnx.merge(graph, params, rest)(images)
  return _digits.cross_entropy(logits, batch["label"])


WORKLOAD = Workload(
  name="digits_classifier",
  steps=400,
  init=init,
  batch=_digits.shifted_batch,
  loss=loss,
  validation_loss=lambda params: loss(params, _digits.shifted_validation()),
)
