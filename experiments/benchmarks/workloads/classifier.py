"""The library's CNN -> LSTM -> attention classifier, small, on the digits."""

import functools

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
  graph, _, rest = nnx.split(model(0), nnx.Param, ...)
  return graph, nnx.as_pure(rest)


def init(seed):
  params = nnx.split(model(seed), nnx.Param, ...)[1]
  return nnx.to_pure_dict(params)


def loss(params, batch):
  logits = nnx.merge(structure()[0], params, structure()[1])(
    batch["image"].reshape(-1, 8, 8, 1)
  )
  return _digits.cross_entropy(logits, batch["label"])


WORKLOAD = Workload(
  name="classifier",
  steps=400,
  init=init,
  batch=_digits.batch,
  loss=loss,
  validation_loss=lambda params: loss(params, _digits.images()[1]),
)
