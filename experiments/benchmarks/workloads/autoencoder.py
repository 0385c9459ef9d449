"""Digits through a bottleneck of 16 and back: mean squared error of pixels."""

import jax
import jax.numpy as jnp

from workloads import Workload, _digits

_SIZES = (64, 64, 16, 64, 64)
_NAMES = ("encoder/0", "encoder/1", "decoder/0", "decoder/1")
_LINEAR = ("encoder/1", "decoder/1")  # The code and the pixels.


def init(seed):
  keys = jax.random.split(jax.random.key(seed), len(_NAMES))
  params = {"encoder": {}, "decoder": {}}
  for i, (name, key) in enumerate(zip(_NAMES, keys, strict=True)):
    part, number = name.split("/")
    params[part][number] = _digits.dense(key, _SIZES[i], _SIZES[i + 1])
  return params


def loss(params, batch):
  hidden = batch["image"]
  for name in _NAMES:
    part, number = name.split("/")
    layer = params[part][number]
    hidden = hidden @ layer["kernel"] + layer["bias"][None]
    if name not in _LINEAR:
      hidden = jax.nn.relu(hidden)
  return jnp.mean(jnp.square(hidden - batch["image"]))


WORKLOAD = Workload(
  name="autoencoder",
  steps=400,
  init=init,
  batch=_digits.batch,
  loss=loss,
  validation_loss=lambda params: loss(params, _digits.images()[1]),
)
