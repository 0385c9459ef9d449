"""Shifted digits, 8 x 8 pixels, through two convolutions and a linear head."""

import jax
import jax.numpy as jnp

from workloads import Workload, _digits

_CHANNELS = (1, 16, 32)


def init(seed):
  *keys, last = jax.random.split(jax.random.key(seed), len(_CHANNELS))
  stages = {}
  for i, key in enumerate(keys):
    layer = _digits.dense(key, 9 * _CHANNELS[i], _CHANNELS[i + 1])
    kernel = layer["kernel"].reshape(3, 3, *_CHANNELS[i : i + 2])
    stages[str(i)] = {"kernel": kernel, "bias": layer["bias"]}
  return {"stages": stages, "head": _digits.dense(last, 16 * 32, 10)}


def loss(params, batch):
  hidden = batch["image"].reshape(-1, 8, 8, 1)
  for stage in params["stages"].values():
    hidden = jax.lax.conv_general_dilated(
      hidden,
      stage["kernel"],
      window_strides=(1, 1),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    hidden = jax.nn.relu(hidden + stage["bias"][None, None, None])
  # 2 x 2 max pooling by reshaping, whose gradient is fast on a CPU.
  size, side, _, channels = hidden.shape
  windows = hidden.reshape(size, side // 2, 2, side // 2, 2, channels)
  hidden = jnp.max(windows, axis=(2, 4)).reshape(size, -1)
  head = params["head"]
  logits = hidden @ head["kernel"] + head["bias"][None]
  return _digits.cross_entropy(logits, batch["label"])


WORKLOAD = Workload(
  name="digits_cnn",
  steps=400,
  init=init,
  batch=_digits.shifted_batch,
  loss=loss,
  validation_loss=lambda params: loss(params, _digits.shifted_validation()),
)
