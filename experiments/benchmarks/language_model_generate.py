"""A token after a long context: dynamic attention and full, with caches.

The library's own loop, `models.stream`'s, at batch 1 and without sampling, in
caches as large as `generate` makes them; weights are untrained. Each call
writes tokens after the same context, which is real text. The smallest model
lies in the cache of the processor as a whole; the wider one does not, as models
in use.
"""

import argparse
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import language_model_parts as parts
import numpy as np

from deepseek_jax import nn
from deepseek_jax.models import generation

_CHUNK = 16  # Tokens in a call of the library's loop.
_HEAD = 64
_AHEAD = 64  # Tokens the cache has room for beyond the context.
_GREEDY = 0.0, 1.0


def add_flags(parser: argparse.ArgumentParser) -> None:
  parts.add_model_flags(parser)
  parser.add_argument(
    "--widths", type=int, nargs="+", default=[128, 512],
    help=f"features, in heads of {_HEAD}; instead of --features and --heads",
  )  # fmt: skip
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 16384, 32768]
  )
  parser.add_argument(
    "--calls", type=int, default=1, help=f"of {_CHUNK} tokens in a turn (1)"
  )
  parser.add_argument(
    "--attention", nargs="+", choices=("full", "dynamic"),
    default=["full", "dynamic"],
  )  # fmt: skip


def run(flags: argparse.Namespace) -> None:
  """Times all widths and lengths and writes the result."""
  bench = harness.Benchmark("language_model_generate", flags)
  found = {}
  for width in flags.widths:
    flags.features, flags.heads = width, max(1, width // _HEAD)
    seconds = _measure(bench)
    found[width] = {
      "model": parts.sizes(flags),
      "seconds_a_token": seconds,
      "in_units_of_the_shortest": {n: _growth(s) for n, s in seconds.items()},
    }
  bench.finish(seeds=[0], details={"widths": found})
  for width, told in found.items():
    print(f"width {width}, by the shortest: {told['in_units_of_the_shortest']}")


def _measure(bench: harness.Benchmark) -> dict[str, dict[int, float]]:
  """Returns seconds a token for each way to attend and length."""
  flags = bench.arguments
  names = {"full": parts.FULL, "dynamic": parts.DYNAMIC}
  seconds: dict[str, dict[int, float]] = {
    names[kind]: {} for kind in flags.attention
  }
  for length in flags.lengths:
    cases = {names[kind]: writer(flags, kind, length) for kind in
             flags.attention}  # fmt: skip
    label = f"width {flags.features}, {_CHUNK} tokens after {length:,}"
    comparison = bench.compare(label, cases, calls=flags.calls)
    for name in cases:
      median = comparison.spread(name).median / _CHUNK
      seconds[name][length] = float(f"{median:.4g}")
    told = {name: f"{1e3 * s[length]:.3g} ms" for name, s in seconds.items()}
    print(f"{label}: a token takes {told}", flush=True)
  return seconds


def _growth(seconds: dict[int, float]) -> dict[int, float]:
  least = seconds[min(seconds)]
  return {length: round(s / least, 3) for length, s in seconds.items()}


def writer(
  flags: argparse.Namespace, kind: nn.Attention, length: int
) -> Callable[[], None]:
  """Returns a call that writes some tokens after a context."""
  # Without separator: untrained weights would soon write it, and end.
  model = parts.model(flags, kind, separator=None)
  structure, weights = generation._evaluation(model)
  room = generation._checked_room(length, _AHEAD, None)
  tokens, _ = next(parts.batches(length, 1))
  padding = generation._rounded(length) - length
  padded = np.pad(tokens, ((0, 0), (0, padding)))
  begun = generation._begin(
    structure, room, None, True, weights, padded, length, jax.random.key(0),
    *_GREEDY,
  )  # fmt: skip
  held: list[Any] = [jax.block_until_ready(begun)]

  def call() -> None:
    writing, found = generation._go_on(
      structure, True, weights, held[0], _CHUNK, *_GREEDY
    )
    jax.block_until_ready((writing, found))
    back = [
      cache._replace(length=jnp.full((), length, jnp.int32))
      for cache in writing.caches
    ]
    held[0] = writing._replace(caches=back)  # The same again.

  return call
