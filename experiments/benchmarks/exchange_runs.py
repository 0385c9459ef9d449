"""Small trainings that differ in how gradients are exchanged alone.

* "mlp": 64-256-256-10 on digits with noise of their own in every step, so that
  little is learned by heart; "small mlp": 64-64-64-10;
* "bytes": a language model of bytes with two layers.

On 4 fake devices. All see the same batches, from the same weights. Adam's rate
goes down to zero along a cosine; `deepseek()` has a constant one and is scored
at its average. "float32 nudged" starts a thousandth off: how far runs part that
differ in nothing that matters.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import exchange_methods as methods
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import deepseek_jax as dj
from deepseek_jax import models, optim

WORKERS = 4
BLOCKED = 10  # Fake devices run into each other with many steps under way.
_NOISE = 0.5  # Of a pixel from 0 to 1.
_LENGTH, _ROWS = 64, 16
NUDGED = "float32 nudged"
STEPS = {"mlp": 1000, "small mlp": 200, "bytes": 300}


@dataclasses.dataclass(frozen=True)
class Task:
  """Something small to learn.

  Attributes:
    start: Seed to parameters.
    loss: Of parameters and a batch.
    batch: Of a generator of random numbers.
    objective: Batches to score, of what is trained on: with other noise.
    held_out: Likewise, of what is not.
    rate: Of Adam.
  """

  start: Callable[[int], Any]
  loss: Callable[..., jax.Array]
  batch: Callable[[np.random.Generator], tuple[np.ndarray, ...]]
  objective: list[tuple[np.ndarray, ...]]
  held_out: list[tuple[np.ndarray, ...]]
  rate: float


@functools.cache
def digits(width: int = 256) -> Task:
  """Returns the classification of noisy digits."""
  data = dj.data.load("digits")
  read = lambda split: (split[:]["image"].reshape(-1, 64), split[:]["label"])
  train, test = read(data.train), read(data.test)

  def draw(rng, images, labels, rows):
    chosen = rng.integers(len(images), size=rows)
    noise = _NOISE * rng.normal(size=(rows, 64))
    pixels = images[chosen] / np.max(images) + noise
    return pixels.astype(np.float32), labels[chosen].astype(np.int32)

  rng = np.random.default_rng(0)
  return Task(
    start=lambda seed: methods.mlp(seed, (64, width, width, 10)),
    loss=methods.mlp_loss,
    batch=lambda rng: draw(rng, *train, 256),
    objective=[draw(rng, *train, 16384)],
    held_out=[draw(rng, *test, 8192)],
    rate=3e-3,
  )


@functools.cache
def text() -> Task:
  """Returns the language model."""
  data = dj.data.load("python_text", length=_LENGTH)
  read = lambda split: tuple(
    np.asarray(split[:][name], np.int32) for name in ("tokens", "targets")
  )
  train, test = read(data.train), read(data.test)

  def split(seed):
    model = models.LanguageModel(
      257, features=64, num_layers=2, num_heads=2, hidden=176, separator=256,
      rngs=nnx.Rngs(seed),
    )  # fmt: skip
    structure, params, rest = nnx.split(model, nnx.Param, ...)
    pure = lambda state: nnx.to_pure_dict(nnx.as_pure(state))
    return structure, pure(params), pure(rest)

  structure, _, rest = split(0)

  def loss(params, tokens, targets):
    model = nnx.merge(structure, params, rest)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      model(tokens), jnp.maximum(targets, 0)
    )
    counts = targets >= 0
    return (losses * counts).sum() / counts.sum() / np.log(2)

  def batch(rng):
    chosen = rng.integers(len(train[0]), size=_ROWS)
    return train[0][chosen], train[1][chosen]

  def scored(
    tokens: np.ndarray, targets: np.ndarray
  ) -> list[tuple[np.ndarray, ...]]:
    rows = np.linspace(0, len(tokens) - 1, 384).astype(int).reshape(8, -1)
    return [(tokens[part], targets[part]) for part in rows]

  return Task(
    start=lambda seed: split(seed)[1],
    loss=loss,
    batch=batch,
    objective=scored(*train),
    held_out=scored(*test),
    rate=3e-3,
  )


TASKS = {
  "mlp": digits,
  "small mlp": functools.partial(digits, 64),
  "bytes": text,
}


def optimizer(
  name: str, task: Task, steps: int
) -> optax.GradientTransformation:
  """Returns Adam, or `deepseek` without its average."""
  warmup = max(1, steps // 20)
  if name == "adam":
    return optax.adam(
      optax.warmup_cosine_decay_schedule(0.0, task.rate, warmup, steps)
    )
  return optim.deepseek(1e-2, warmup_steps=warmup, average=0)


class Runner:
  """Trains a task with one method, from several seeds; compiles once."""

  def __init__(self, task: str, optimizer_name: str, method: str, steps: int):
    self._task, self._steps = TASKS[task](), steps
    inner = optimizer(optimizer_name, self._task, steps)
    alone = method in methods.ALONE
    self._nudge = 1e-3 if method == NUDGED else 0.0
    method = "float32" if method == NUDGED else method
    tx = methods.build(method, inner, max(1, steps // 10))
    if optimizer_name != "adam":
      tx = optim.anytime_average(tx)
    self._make = functools.partial(
      methods.stepper,
      self._task.loss,
      tx,
      methods.make_mesh(jax.devices()[:WORKERS]),
      alone=alone,
      count=2,
    )
    self._step = None
    self._score = jax.jit(self._task.loss)

  def __call__(self, seed: int) -> dict[str, float]:
    """Returns losses: the one that is minimized, held out, and the last."""
    rng = np.random.default_rng(seed + 1000)
    start = jax.tree.map(
      lambda x: (
        x * (1 + self._nudge * rng.normal(size=x.shape)).astype(x.dtype)
      ),
      self._task.start(seed),
    )
    step, (params, state) = self._make(start)
    step = self._step = self._step or step
    rng = np.random.default_rng(seed)
    losses = []
    for number in range(self._steps):
      params, state, value = step(params, state, *self._task.batch(rng))
      if number % BLOCKED == 0:
        jax.block_until_ready(value)
      losses.append(value)
    params = optim.averaged_params(state, params)
    params = jax.device_put(params, jax.devices()[0])
    mean = lambda rows: round(float(np.mean(jax.device_get(rows))), 6)
    score = lambda batches: mean([self._score(params, *x) for x in batches])
    return {
      "loss": score(self._task.objective),
      "held_out": score(self._task.held_out),
      "train_loss": mean(losses[-max(1, self._steps // 10) :]),
    }
