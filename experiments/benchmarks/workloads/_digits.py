"""The handwritten digits, split once for all workloads that train on them."""

import functools

import jax
import numpy as np

BATCH = 64
_VALIDATION = 540  # Of 1,797 images.


@functools.cache
def images() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Images [B, 64] in [0, 1] and labels [B]: to train on, to validate on."""
  from sklearn.datasets import load_digits

  pixels, labels = load_digits(return_X_y=True)
  order = np.random.default_rng(0).permutation(len(labels))
  data = {
    "image": (pixels[order] / 16).astype(np.float32),
    "label": labels[order].astype(np.int32),
  }
  train = {name: array[_VALIDATION:] for name, array in data.items()}
  return train, {name: array[:_VALIDATION] for name, array in data.items()}


def batch(seed: int, step: int) -> dict[str, np.ndarray]:
  """The batch of a step."""
  import workloads

  train, _ = images()
  chosen = workloads.rows(seed, step, len(train["label"]), BATCH)
  return {name: array[chosen] for name, array in train.items()}


def shifted_batch(seed: int, step: int) -> dict[str, np.ndarray]:
  """The batch of a step, each image moved by up to a pixel.

  1,257 images are soon known by heart. A validation loss would then tell which
  optimizer overfits least, and targets found with some seeds be missed with
  others; of moved images there are nine times as many.
  """
  found = batch(seed, step)
  return found | {"image": _shifted(found["image"], (seed, step))}


@functools.cache
def shifted_validation() -> dict[str, np.ndarray]:
  """The images to validate on, each moved once and for all."""
  _, found = images()
  return found | {"image": _shifted(found["image"], (0,))}


def _shifted(flat: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
  rng = np.random.default_rng((*seed, 1))
  padded = np.pad(flat.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
  down, right = rng.integers(0, 3, (2, len(flat), 1))
  rows, columns = down + np.arange(8), right + np.arange(8)
  chosen = np.arange(len(flat))[:, None, None], rows[:, :, None]
  return padded[*chosen, columns[:, None, :]].reshape(flat.shape)


def dense(key: jax.Array, fan_in: int, fan_out: int) -> dict[str, jax.Array]:
  """A kernel for ReLU (He's variance) and a bias of zeros."""
  kernel = jax.random.normal(key, (fan_in, fan_out)) * (2 / fan_in) ** 0.5
  return {"kernel": kernel, "bias": jax.numpy.zeros(fan_out)}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean over a batch."""
  chosen = jax.numpy.take_along_axis(logits, labels[..., None], -1)[..., 0]
  return jax.numpy.mean(jax.nn.logsumexp(logits, -1) - chosen)
