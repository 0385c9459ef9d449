"""A whole training step over T: dynamic attention, and full in two ways.

Loss, gradient and AdamW, state donated, as many tokens a step at any T. "full,
ours" is the model of the library with full attention, which goes block by
block beyond 1,024 tokens; "full, XLA" is what one would write by hand around
`jax.nn.dot_product_attention`, with all logits at once.
"""

import argparse
from typing import Any

import harness
import jax
import language_model_parts as parts
import optax

VARIANTS = (parts.DENSE, parts.FULL, parts.DYNAMIC)


def add_flags(parser: argparse.ArgumentParser) -> None:
  parts.add_model_flags(parser)
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384]
  )
  parser.add_argument(
    "--tokens", type=int, default=16384, help="in a step (16384)"
  )
  parser.add_argument(
    "--dense-most", type=int, default=4096,
    help="longest T that all logits at once are timed at (4096)",
  )  # fmt: skip


def training(flags: argparse.Namespace, variant: str) -> parts.Training:
  """Returns a training of a variant with AdamW, all from the same weights."""
  kind = "dynamic" if variant == parts.DYNAMIC else "full"
  model, tx = parts.model(flags, kind), optax.adamw(1e-3)
  if variant == parts.DENSE:
    return parts.plain_training(model, tx, heads=flags.heads)
  return parts.our_training(model, tx)


def taken(compiled: jax.stages.Compiled) -> dict[str, float]:
  """Returns megabytes of a compiled step: its state, and all it needs."""
  found = compiled.memory_analysis()
  if found is None:
    return {}
  held = found.argument_size_in_bytes
  new = found.output_size_in_bytes - found.alias_size_in_bytes
  total = held + new + found.temp_size_in_bytes
  return {
    "arguments_mb": round(held / 1e6, 1),
    "temporary_mb": round(found.temp_size_in_bytes / 1e6, 1),
    "total_mb": round(total / 1e6, 1),
  }


def run(flags: argparse.Namespace) -> None:
  """Times all lengths and writes the result."""
  bench = harness.Benchmark("language_model_step", flags)
  rows = {length: _measure(bench, length) for length in flags.lengths}
  found = {
    "model": parts.sizes(flags), "tokens_a_step": flags.tokens,
    "lengths": rows, "dynamic_against": _summary(bench, flags.lengths),
  }  # fmt: skip
  bench.finish(seeds=[0], details=found)
  for peer, told in found["dynamic_against"].items():
    print(f"dynamic / {peer}: {told}")


def _measure(bench: harness.Benchmark, length: int) -> dict[str, Any]:
  """Times one length; returns memory and the losses of the first step."""
  flags = bench.arguments
  rows = max(1, flags.tokens // length)
  batches = parts.batches(length, rows)
  stream = [next(batches) for _ in range(4)]
  cases, memory = {}, {}
  for variant in VARIANTS:
    if variant == parts.DENSE and length > flags.dense_most:
      continue
    made = training(flags, variant)
    compiled = made.compiled(length, rows)
    memory[variant] = taken(compiled)
    cases[variant] = parts.Run(made, compiled, stream)
  bench.compare(f"T {length:,}, batch {rows}", cases, warmup=1)
  return {
    "rows": rows,
    "memory": memory,
    "first_losses": {name: case.losses[0] for name, case in cases.items()},
  }


def _summary(
  bench: harness.Benchmark, lengths: list[int]
) -> dict[str, dict[str, Any]]:
  """Returns ratios over T, and where they fall through 1."""
  found = {}
  for peer in (parts.FULL, parts.DENSE):
    ratios = {
      length: round(comparison.ratio(parts.DYNAMIC, peer).median, 3)
      for length, comparison in zip(lengths, bench.comparisons, strict=True)
      if peer in comparison.seconds
    }
    crossover = None
    if len(ratios) > 1:
      crossover = harness.crossover(list(ratios), list(ratios.values()))
    found[peer] = {"ratios": ratios, "crossover_tokens": crossover}
  return found
