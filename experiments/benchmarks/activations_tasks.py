"""Two small trainings that differ in their activation alone.

Digits: two hidden layers of 256 with layer norm before the activation. Text: a
byte language model of two layers with a gated feed-forward. Both give the loss
on what was not trained on, the share of zeros there, and that of dead units.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import deepseek_jax as dj
from deepseek_jax import nn

_SCORED = 48  # Rows of text that are scored together.


class Method(NamedTuple):
  """An activation, by name or made by a class, and its arguments."""

  activation: str | type[nn.SparseReLU]
  options: Mapping[str, Any] = {}

  def build(self, features: int) -> nn.Activation:
    """Returns a new layer, or the function."""
    if isinstance(self.activation, str):
      return nn.activation_layer(
        self.activation, features, options=self.options
      )
    return self.activation(features, **self.options)


class TopK(nn.SparseReLU):
  """Keeps of every token the largest channels, if they are positive.

  The k-th largest is found by bisection: ten times faster here than sorting.
  """

  def __init__(self, features: int, *, sparsity: float):
    super().__init__(features)
    self.keep = max(1, round(features * (1 - sparsity)))

  def _levels(self, x):
    x = jax.lax.stop_gradient(x)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    for _ in range(24):
      middle = (low + high) / 2
      many = (x > middle).sum(-1, keepdims=True) >= self.keep
      low, high = jnp.where(many, middle, low), jnp.where(many, high, middle)
    return jnp.maximum(low, 0), self.width


def _split(model):
  structure, params, rest = nnx.split(model, nnx.Param, ...)
  return structure, nnx.as_pure(params), nnx.as_pure(rest)


def _gradient(structure, loss):
  """Returns a function (params, rest, *batch) -> (gradient, new rest)."""

  def objective(params, rest, *batch):
    model = nnx.merge(structure, params, rest)
    return loss(model, *batch), _split(model)[2]

  return jax.grad(objective, has_aux=True)


# Digits.


class Mlp(nnx.Module):
  """Two hidden layers: linear, layer norm, activation."""

  def __init__(self, method: Method, width: int, *, rngs: nnx.Rngs):
    sizes = (64, width, width)
    self.linear = nnx.List(
      [nnx.Linear(sizes[i], width, rngs=rngs) for i in (0, 1)]
    )
    self.norm = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in "12"])
    self.activation = nnx.List([method.build(width) for _ in "12"])
    self.head = nnx.Linear(width, 10, rngs=rngs)

  def __call__(self, x):
    """Returns logits and what each activation gave."""
    given = []
    parts = zip(self.linear, self.norm, self.activation, strict=True)
    for linear, norm, activation in parts:
      x = activation(norm(linear(x)))
      given.append(x)
    return self.head(x), given


@functools.cache
def _digits():
  """Returns pixels and labels: to learn from, and not."""
  data = dj.data.load("digits")
  splits = [s[:] for s in (data.train, data.validation, data.test)]
  read = lambda s: (s["image"].reshape(-1, 64).astype(np.float32), s["label"])
  learned, *held = [read(split) for split in splits]
  return learned, tuple(map(np.concatenate, zip(*held, strict=True)))


def digits(method: Method, seeds: list[int], *, steps: int) -> list[dict]:
  """Trains all seeds at once; returns what each reached."""
  (x, y), (held_x, held_y) = jax.tree.map(jnp.asarray, _digits())
  x, held_x = x / 16, held_x / 16
  make = lambda key: Mlp(method, 256, rngs=nnx.Rngs(key))
  structure = _split(make(jax.random.key(0)))[0]
  tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=0.01)

  def loss(model, pixels, labels):
    logits, _ = model(pixels)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  def train(key):
    _, params, rest = _split(make(key))

    def step(carry, number):
      params, rest, state = carry
      chosen, noise = jax.random.split(jax.random.fold_in(key, number))
      rows = jax.random.randint(chosen, (64,), 0, len(x))
      # Noise, as all of them overfit; more of it costs ReLU accuracy.
      pixels = x[rows] + 0.2 * jax.random.normal(noise, (64, 64))
      grads, rest = _gradient(structure, loss)(params, rest, pixels, y[rows])
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), rest, state), None

    start = params, rest, tx.init(params)
    (params, rest, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
    return score(params, rest)

  def score(params, rest):
    model = nnx.merge(structure, params, rest)
    model.eval()
    logits, given = model(held_x)
    _, seen = model(x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, held_y)
    return {
      "accuracy": (logits.argmax(-1) == held_y).mean(),
      "loss": losses.mean(),
      "zeros": jnp.stack([(h == 0).mean() for h in given]).mean(),
      "dead": jnp.stack([(h == 0).all(0).mean() for h in seen]).mean(),
    }

  keys = jnp.stack([jax.random.key(seed) for seed in seeds])
  found = jax.jit(jax.vmap(train))(keys)
  return [
    {name: float(values[i]) for name, values in found.items()}
    for i in range(len(seeds))
  ]


# Text.


@functools.cache
def _text(length: int):
  data = dj.data.load("python_text", length=length)
  read = lambda split: tuple(split[:][name] for name in ("tokens", "targets"))
  return read(data.train), read(data.test)


def text(
  method: Method, seeds: list[int], *, steps: int, rows: int = 16,
  length: int = 128, held_out: int = 384,
) -> list[dict]:  # fmt: skip
  """Trains one seed after the other; returns what each reached."""
  schedule = optax.warmup_cosine_decay_schedule(
    0, 4e-3, min(20, steps), max(steps, 21), 2e-4
  )
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.98, weight_decay=0.01),
  )
  model = functools.partial(_language_model, method)
  structure = _split(model(0))[0]

  @functools.partial(jax.jit, donate_argnums=0)
  def step(carry, tokens, targets):
    params, rest, state = carry
    grads, rest = _gradient(structure, _bits)(params, rest, tokens, targets)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), rest, state

  def train(seed):
    _, params, rest = _split(model(seed))
    carry = params, rest, tx.init(params)
    (tokens, targets), _ = _text(length)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
      chosen = rng.integers(len(tokens), size=rows)
      carry = step(carry, _ids(tokens[chosen]), _ids(targets[chosen]))
    return nnx.merge(structure, *carry[:2])

  return [_scored(train(seed), length, held_out) for seed in seeds]


def _language_model(method: Method, seed: int):
  model = dj.models.LanguageModel(
    256, features=96, num_layers=2, num_heads=2, hidden=256, activation="relu",
    rngs=nnx.Rngs(seed),
  )  # fmt: skip
  for layer in model.layers.layers:
    built = method.build(256)
    if isinstance(built, nnx.Module):
      built = nnx.data(built)
    layer.feed_forward.activation = built  # pyrefly: ignore
  return model


def _ids(tokens):
  return jnp.asarray(tokens, jnp.int32)


def _bits(model, tokens, targets):
  losses = optax.softmax_cross_entropy_with_integer_labels(
    model(tokens), targets
  )
  return losses.mean() / np.log(2)


def _scored(model, length: int, held_out: int) -> dict[str, float]:
  _, (tokens, targets) = _text(length)
  chosen = np.linspace(0, len(tokens) - 1, held_out).astype(int)
  model.eval()
  structure, params, rest = _split(model)
  bits = jax.jit(lambda p, r, *b: _bits(nnx.merge(structure, p, r), *b))
  parts = np.array_split(chosen, max(1, held_out // _SCORED))
  losses = [
    float(bits(params, rest, _ids(tokens[part]), _ids(targets[part])))
    for part in parts
  ]
  found = nn.measure_sparsity(model, [_ids(tokens[part]) for part in parts])
  mean = lambda name: float(
    np.mean([getattr(one, name) for one in found.values()] or [0.0])
  )
  return {
    "bits_per_byte": float(np.mean(losses)),
    "zeros": mean("zeros"),
    "dead": mean("dead"),
  }
