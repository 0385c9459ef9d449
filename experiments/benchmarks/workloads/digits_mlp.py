"""Shifted digits through two hidden layers of 128."""

import jax

from workloads import Workload, _digits

_SIZES = (64, 128, 128, 10)


def init(seed):
  keys = jax.random.split(jax.random.key(seed), len(_SIZES) - 1)
  layers = {
    str(i): _digits.dense(key, _SIZES[i], _SIZES[i + 1])
    for i, key in enumerate(keys)
  }
  return {"head": layers.pop(str(len(keys) - 1)), "layers": layers}


def loss(params, batch):
  hidden = batch["image"]
  for layer in params["layers"].values():
    hidden = jax.nn.relu(hidden @ layer["kernel"] + layer["bias"][None])
  head = params["head"]
  logits = hidden @ head["kernel"] + head["bias"][None]
  return _digits.cross_entropy(logits, batch["label"])


WORKLOAD = Workload(
  name="digits_mlp",
  steps=400,
  init=init,
  batch=_digits.shifted_batch,
  loss=loss,
  validation_loss=lambda params: loss(params, _digits.shifted_validation()),
)
