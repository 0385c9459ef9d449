"""What an optimizer's update costs beside `optax.adamw`, in time and bytes.

Updates of Transformer-like parameters with random gradients: `tx.update` and
`optax.apply_updates` in one jitted function with donated arguments, no forward
or backward pass. Cases of a group take turns with AdamW, group by group, so
that a few states fit in memory at a time.

A method that needs fewer steps but more time a step wins from some number of
tokens a step on. That crossover is computed from forward and backward passes
of 6 FLOPs a parameter and token at the speed of a plain matrix product; real
passes are slower, so that the true crossover lies lower.

  uv run experiments/benchmarks/optimizer_cost.py --step-ratio 0.7
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import harness
import harness_machine
import jax
import jax.numpy as jnp
import optax

from deepseek_jax import optim
from deepseek_jax.optim.averaging import anytime_average
from deepseek_jax.optim.compact import bytes_per_parameter, compact_moments
from deepseek_jax.optim.polyak import cap_by_polyak
from deepseek_jax.optim.variance import scale_by_relative_snr

RATE = 1e-3
LOSS = 2.0
# Width and layers of twelve squares each, and the rows of an embedding.
SIZES = {"10M": (512, 3, 1024), "50M": (1024, 4, 256), "tiny": (32, 1, 64)}


def adamw(inner: optax.GradientTransformation | None = None) -> Any:
  """AdamW with something else where its moments were."""
  moments = optax.scale_by_adam() if inner is None else inner
  decay = optax.add_decayed_weights(1e-4)
  return optax.chain(moments, decay, optax.scale_by_learning_rate(RATE))


def with_layers() -> Any:
  rules = [(".*/attention/.*", 0.5), (".*", 1.0)]
  return optax.chain(adamw(), optim.scale_by_layer(rules))


def compact(dtype: Any) -> Any:
  return adamw(compact_moments(optax.scale_by_adam(), dtype))


BASE = "adamw"
GROUPS: dict[str, dict[str, Callable[[], Any]]] = {
  "scales of the rate": {
    "+ loss ratio": lambda: optax.chain(adamw(), optim.scale_by_loss_ratio()),
    "+ layer rules": with_layers,
    "+ relative SNR": lambda: adamw(
      scale_by_relative_snr(inner=optax.scale_by_adam())
    ),
    "+ Polyak cap": lambda: cap_by_polyak(inner=adamw()),
  },
  "averages": {
    "+ anytime average": lambda: anytime_average(adamw()),
    "+ average in bfloat16": lambda: anytime_average(
      adamw(), dtype=jnp.bfloat16
    ),
    "schedule_free_adamw": lambda: optax.contrib.schedule_free_adamw(RATE),
  },
  "compact moments": {
    "int8": lambda: compact("int8"),
    "bfloat16": lambda: compact("bfloat16"),
    "mu_dtype=bfloat16": lambda: optax.adamw(RATE, mu_dtype=jnp.bfloat16),
  },
  "whole recipes": {
    "deepseek()": optim.deepseek,
    "deepseek, Newton-Schulz": lambda: optim.deepseek(kind="newton_schulz"),
    "muon": lambda: optax.contrib.muon(RATE),
  },
}


def parameters(size: str) -> dict[str, Any]:
  """Returns the parameters of a Transformer without its forward pass."""
  width, layers, rows = SIZES[size]
  normal = lambda *shape: 0.02 * jax.random.normal(jax.random.key(0), shape)
  block = lambda: {
    "attention": {name: normal(width, width) for name in "qkvo"},
    "mlp": {"up": normal(width, 4 * width), "down": normal(4 * width, width)},
    "norm": {"scale": jnp.ones(width)},
  }
  blocks = {str(i): block() for i in range(layers)}
  return {"embedding": normal(rows, width), "layers": blocks}


def gradients(params: dict[str, Any]) -> dict[str, Any]:
  """Returns random gradients, other ones for every leaf."""
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  pairs = zip(keys, leaves, strict=True)
  noise = [1e-3 * jax.random.normal(key, leaf.shape) for key, leaf in pairs]
  return jax.tree.unflatten(treedef, noise)


def updater(make: Callable[[], Any], params: Any, grads: Any) -> Callable:
  """Returns a function that does one update in place."""
  tx = optax.with_extra_args_support(make())

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, grads, value):
    updates, state = tx.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jnp.copy, params)
  held = [params, jax.jit(tx.init)(params)]
  value = jnp.float32(LOSS)

  def run() -> None:
    held[:] = step(*held, grads, value)
    jax.block_until_ready(held)

  return run


def crossover(
  seconds: float, base: float, step_ratio: float, count: int, flops: float
) -> float:
  """Tokens a step from which fewer, slower steps take less time than AdamW.

  With c seconds a token, base + c·N = step_ratio·(seconds + c·N).

  >>> crossover(3.0, 1.0, step_ratio=0.5, count=1, flops=6.0)
  1.0
  """
  a_token = 6 * count / flops
  extra = step_ratio * seconds - base
  return max(0.0, extra / (a_token * (1 - step_ratio)))


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--sizes", nargs="+", choices=SIZES, default=["10M", "50M"],
    help="which models (10M 50M)",
  )  # fmt: skip
  parser.add_argument(
    "--step-ratio", type=float, default=0.7,
    help="steps to the target by those of AdamW, for the crossover (0.7)",
  )  # fmt: skip
  found = harness.flags(__doc__, parser)
  if not 0 < found.step_ratio < 1:
    parser.error(f"step-ratio must be in (0, 1), got {found.step_ratio}")
  return found


def measure_group(
  bench: harness.Benchmark, label: str, makes: dict[str, Any], size: str
) -> dict[str, dict[str, float]]:
  """Times one group; returns bytes and crossover of every case."""
  params = parameters(size)
  grads = gradients(params)
  makes = {BASE: adamw} | makes
  cases = {name: updater(make, params, grads) for name, make in makes.items()}
  comparison = bench.compare(f"{size}: {label}", cases)
  base = comparison.spread(BASE).median
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  flops = 1e9 * harness_machine.matmul_speed()
  return {
    name: {
      "state_bytes_per_parameter": round(
        bytes_per_parameter(jax.eval_shape(make().init, params), params), 3
      ),
      "crossover_tokens_per_step": round(
        crossover(
          base * comparison.ratio(name).median,
          base,
          bench.arguments.step_ratio,
          count,
          flops,
        )
      ),
    }
    for name, make in makes.items()
  }


def show(details: dict[str, dict[str, dict[str, float]]], ratio: float) -> None:
  """Prints bytes and crossovers, one row a case."""
  from rich.console import Console
  from rich.table import Table

  for size, rows in details.items():
    table = Table(title=f"{size} parameters")
    table.add_column("case")
    table.add_column("state bytes / parameter", justify="right")
    table.add_column(f"tokens / step to win, steps x {ratio}", justify="right")
    for name, row in rows.items():
      bytes_, tokens = row.values()
      table.add_row(name, f"{bytes_:.2f}", f"{tokens:,}")
    Console().print(table)


def main() -> None:
  """Times all groups and writes the result."""
  found = arguments()
  bench = harness.Benchmark("optimizer_cost", found)
  details: dict[str, Any] = {}
  for size in found.sizes:
    details[size] = {}
    for label, makes in GROUPS.items():
      details[size] |= measure_group(bench, label, makes, size)
  show(details, found.step_ratio)
  bench.finish(
    seeds=[0, 1], details={"step_ratio": found.step_ratio, "sizes": details}
  )


if __name__ == "__main__":
  main()
