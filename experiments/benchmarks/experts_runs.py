"""Small trainings of a byte language model that differ in their experts alone.

The model of `experiments/byte_lm.py` at half its width, with its optimizer: 4
layers, and in each 8 experts of which a token chooses 2, or one feed-forward of
the same active size.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import deepseek_jax as dj
from deepseek_jax import models, nn, optim

EXPERTS, TOP_K, HIDDEN, LAYERS = 8, 2, 88, 4
ROWS, LENGTH = 16, 128
_SCORED = 48  # Rows of text that are scored together.


def build(options: Mapping[str, Any] | None, seed: int) -> nnx.Module:
  """Returns the model, with these options of its experts; dense if None."""
  return models.LanguageModel(
    257,
    features=64,
    num_layers=LAYERS,
    num_heads=2,
    hidden=TOP_K * HIDDEN if options is None else HIDDEN,
    experts=0 if options is None else EXPERTS,
    experts_options=None if options is None else {"top_k": TOP_K, **options},
    separator=256,
    rngs=nnx.Rngs(seed),
  )


def optimizer(options: Mapping[str, Any] | None) -> Any:
  """Returns that of the byte model, which whitens every expert by itself."""
  stacked = () if options is None else ((r"layers/.*/experts/\w+", 1),)
  return optim.deepseek(1e-2, warmup_steps=20, stacked=stacked)


@functools.cache
def text() -> tuple[Any, Any]:
  """Returns tokens and targets to learn from, and others."""
  data = dj.data.load("python_text", length=LENGTH)
  read = lambda split: tuple(split[:][name] for name in ("tokens", "targets"))
  return read(data.train), read(data.test)


def stepper(
  options: Mapping[str, Any] | None, seed: int
) -> tuple[Callable[..., Any], Any]:
  """Returns a jitted (carry, tokens, targets) -> (carry, bits), and a carry."""
  structure, params, rest = split(build(options, seed))
  tx = optimizer(options)

  def loss(params, rest, tokens, targets):
    model = nnx.merge(structure, params, rest)
    return bits(model, tokens, targets), split(model)[2]

  @functools.partial(jax.jit, donate_argnums=0)
  def step(carry, tokens, targets):
    params, rest, state = carry
    (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(
      params, rest, tokens, targets
    )
    updates, state = tx.update(grads, state, params, value=value)
    return (optax.apply_updates(params, updates), rest, state), value

  return step, (params, rest, tx.init(params))


def train(
  options: Mapping[str, Any] | None,
  seed: int,
  *,
  steps: int,
  window: int,
  held_out: int,
) -> dict[str, Any]:
  """Trains once; returns how busy experts were, and what was learned.

  Of every window of steps and every layer, the mean over its steps of what the
  busiest expert gets, and what the busiest gets in the whole window.
  """
  step, carry = stepper(options, seed)
  (tokens, targets), _ = text()
  rng = np.random.default_rng(seed)
  losses, busiest, lasting = [], [], []
  for number in range(steps):
    chosen = rng.integers(len(tokens), size=ROWS)
    carry, value = step(carry, ids(tokens[chosen]), ids(targets[chosen]))
    losses.append(value)
    if options is not None and (number + 1) % window == 0:
      params, rest, state = carry
      loads, rest = _read_loads(options, params, rest)
      carry = params, rest, state
      busiest.append([round(load.busiest, 4) for load in loads])
      lasting.append([round(max(load.experts), 4) for load in loads])
  params, rest, state = carry
  averaged = optim.averaged_params(state, params)
  return {
    "bits_per_byte": _scored(options, averaged, rest, held_out),
    "train_bits": float(np.mean(jax.device_get(losses[-100:]))),
    "busiest": busiest,
    "lasting": lasting,
  }


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
  """Returns structure, parameters and other state."""
  structure, params, rest = nnx.split(model, nnx.Param, ...)
  pure = lambda state: nnx.to_pure_dict(nnx.as_pure(state))
  return structure, pure(params), pure(rest)


def ids(tokens: Any) -> jax.Array:
  """Returns tokens as models take them."""
  return jnp.asarray(tokens, jnp.int32)


def bits(model: Any, tokens: Any, targets: Any) -> jax.Array:
  """Returns the mean bits of a target."""
  losses = optax.softmax_cross_entropy_with_integer_labels(
    model(tokens), jnp.maximum(targets, 0)
  )
  counts = targets >= 0
  return (losses * counts).sum() / counts.sum() / np.log(2)


@functools.cache
def _structure(options: tuple[tuple[str, Any], ...] | None) -> Any:
  given = None if options is None else dict(options)
  return nnx.graphdef(nnx.eval_shape(lambda: build(given, 0)))


def _read_loads(options, params, rest):
  """Returns the loads since the last time, and the state to begin anew."""
  structure = _structure(tuple(sorted(options.items())))
  model = nnx.merge(structure, params, rest)
  loads = list(nn.expert_loads(model).values())
  for layer in model.layers.layers:
    calls = layer.feed_forward.reading.calls
    calls[...] = jnp.zeros_like(calls[...])
  return loads, split(model)[2]


def _scored(options, params, rest, held_out: int) -> float:
  """Returns the bits of a byte of text that was not trained on."""
  _, (tokens, targets) = text()
  model = build(options, 0)
  model.eval()
  structure = split(model)[0]
  chosen = np.linspace(0, len(tokens) - 1, held_out).astype(int)

  @jax.jit
  def score(tokens, targets):
    return bits(nnx.merge(structure, params, rest), tokens, targets)

  parts = np.array_split(chosen, max(1, held_out // _SCORED))
  return float(
    np.mean([score(ids(tokens[part]), ids(targets[part])) for part in parts])
  )
