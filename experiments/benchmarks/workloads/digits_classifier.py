"""The CNN -> LSTM -> attention classifier, small, on shifted digits."""

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


def split(seed):
  """The model, its parameters, and what else it holds, as nested dicts."""
  graph, params, rest = nnx.split(model(seed), nnx.Param, ...)
  return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


# Everything of the model but its parameters. Found here and not in the loss,
# whose trace would leak into it; jitted, the parameters are never computed.
_GRAPH = nnx.graphdef(nnx.eval_shape(lambda: model(0)))
_REST = jax.jit(lambda: split(0)[2])()


def init(seed):
  return split(seed)[1]


def loss(params, batch):
  images = jnp.asarray(batch["image"]).reshape(-1, 8, 8, 1)
  logits = nnx.merge(_GRAPH, params, _REST)(images)
  return _digits.cross_entropy(logits, batch["label"])


WORKLOAD = Workload(
  name="digits_classifier",
  steps=400,
  init=init,
  batch=_digits.shifted_batch,
  loss=loss,
  validation_loss=lambda params: loss(params, _digits.shifted_validation()),
)
