"""What the cases of the language model benchmark share: model, text, step."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_language_model as plain
from flax import nnx

import deepseek_jax as dj
from deepseek_jax.train.state import split

VOCAB, SEPARATOR = 256, 0
DYNAMIC, FULL, DENSE = "dynamic", "full, ours", "full, XLA"

Batch = tuple[np.ndarray, np.ndarray]


def add_model_flags(
  parser: argparse.ArgumentParser, *, features: int = 128, layers: int = 4
) -> None:
  """Adds the sizes of the model."""
  for name, default, what in (
    ("features", features, "size of a token's vector"),
    ("layers", layers, "layers"),
    ("heads", 2, "heads of attention"),
    ("block-size", 64, "keys in a block"),
    ("window", 256, "tokens that dynamic attention always reads"),
    ("remote", 4, "blocks that it finds"),
  ):
    parser.add_argument(
      f"--{name}", type=int, default=default, help=f"{what} ({default})"
    )


def model(
  flags: argparse.Namespace,
  attention: dj.nn.Attention,
  *,
  seed: int = 0,
  separator: int | None = SEPARATOR,
  **options: Any,
) -> dj.models.LanguageModel:
  """Returns a model of the asked sizes.

  Args:
    flags: of `add_model_flags`.
    attention: "full" or "dynamic".
    seed: of its weights.
    separator: what begins a document, or None for one text without end.
    **options: of dynamic attention, where they differ from the flags.
  """
  sparse = {
    "block_size": flags.block_size, "window": flags.window,
    "num_remote": flags.remote,
  }  # fmt: skip
  return dj.models.LanguageModel(
    VOCAB, features=flags.features, num_layers=flags.layers,
    num_heads=flags.heads, separator=separator, attention=attention,
    attention_options=sparse | options if attention == "dynamic" else None,
    rngs=nnx.Rngs(seed),
  )  # fmt: skip


def sizes(flags: argparse.Namespace) -> dict[str, int]:
  """Returns what the flags say of the model, and how many weights it has."""
  params = split(model(flags, "full"))[1]
  names = ("features", "layers", "heads", "block_size", "window", "remote")
  return {name: getattr(flags, name) for name in names} | {
    "parameters": sum(x.size for x in jax.tree.leaves(params))
  }


def batches(
  length: int, rows: int, *, part: str = "train", seed: int = 0
) -> Iterator[Batch]:
  """Yields rows of Python's library as bytes, with the bytes that follow.

  Every row once, in an order of the seed, then again in another. A split's last
  row, which is padded, is left out.
  """
  data = dj.data.load("python_text", length=length)
  reader = getattr(data, part)
  rng = np.random.default_rng(seed)
  whole = len(reader) - 1
  while True:
    order = rng.permutation(whole)
    for start in range(0, whole - rows + 1, rows):
      columns = reader[order[start : start + rows]]
      yield columns["tokens"].astype(np.int32), columns["targets"]


class Training(NamedTuple):
  """A step (state, tokens, targets) -> (state, loss), and its first state."""

  step: Any  # Jitted.
  state: Any

  def compiled(self, length: int, rows: int) -> jax.stages.Compiled:
    """Returns the step for rows of a length; nothing runs."""
    shapes = [jax.ShapeDtypeStruct((rows, length), jnp.int32)] * 2
    return self.step.lower(self.state, *shapes).compile()


def our_training(
  model: nnx.Module, tx: optax.GradientTransformation
) -> Training:
  """Returns a training of a model of the library, state donated.

  `nnx.split` outside of the step, `nnx.merge` within.
  """
  model.train()
  structure, params, rest = split(model)
  tx = optax.with_extra_args_support(tx)

  def mean_loss(params, rest, tokens, targets):
    model = nnx.merge(structure, params, rest)
    losses = plain.cross_entropies(model(tokens), targets)
    return losses.mean(), split(model)[2]

  def step(state, tokens, targets):
    params, rest, opt_state = state
    (loss, rest), grads = jax.value_and_grad(mean_loss, has_aux=True)(
      params, rest, tokens, targets
    )
    updates, opt_state = tx.update(grads, opt_state, params, value=loss)
    return (optax.apply_updates(params, updates), rest, opt_state), loss

  params, rest = jax.tree.map(jnp.copy, (params, rest))
  return Training(
    jax.jit(step, donate_argnums=0), (params, rest, tx.init(params))
  )


def plain_training(
  model: nnx.Module,
  tx: optax.GradientTransformation,
  *,
  heads: int,
  separator: int | None = SEPARATOR,
  attend: Callable[..., jax.Array] = plain.library_attention,
) -> Training:
  """Returns a training of the same weights by hand, state donated."""

  def step(state, tokens, targets):
    params, opt_state = state
    mean_loss = lambda params: plain.loss(
      params, tokens, targets, heads=heads, separator=separator, attend=attend
    )
    loss, grads = jax.value_and_grad(mean_loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  params = jax.tree.map(jnp.copy, split(model)[1])
  return Training(jax.jit(step, donate_argnums=0), (params, tx.init(params)))


class Run:
  """Takes one step when called, on the next batch, and waits for it."""

  def __init__(
    self, training: Training, compiled: Callable[..., Any], stream: list[Batch]
  ):
    self.losses: list[float] = []
    self._state, self._step = training.state, compiled
    self._stream = [jax.device_put(batch) for batch in stream]

  def __call__(self) -> None:
    """Takes a step."""
    batch = self._stream[len(self.losses) % len(self._stream)]
    self._state, loss = self._step(self._state, *batch)
    self.losses.append(float(loss))
