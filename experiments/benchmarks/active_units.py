r"""One token through a gated feed-forward layer, most of whose units are zero.

The layer as it is, which reads all three matrices, against the same layer when
it reads only the rows of units that fire (`nn.combine_active`). The gate is
always read whole: without it nobody knows which fire. So no more than two
thirds of the time can be saved.

  uv run experiments/benchmarks/active_units.py
"""

import argparse
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax import nn

_CALLS = 20  # In a timing: a call takes well below a millisecond.


def layer(features: int, zeros: float) -> tuple[nn.GatedFeedForward, jax.Array]:
  """Returns a layer and a token for which this share of its units is zero."""
  hidden = 8 * -(-features // 3)
  token = jax.random.normal(jax.random.key(0), (1, 1, features))
  plain = nn.GatedFeedForward(
    features, hidden, activation="identity", rngs=nnx.Rngs(0)
  )
  threshold = jnp.quantile(plain.gate(token), zeros)
  fires = lambda x: jnp.where(x > threshold, x, 0)
  sparse = nn.GatedFeedForward(
    features, hidden, activation=fires, rngs=nnx.Rngs(0)
  )
  return sparse, token


def cases(features: int, zeros: float) -> dict[str, Callable[[], object]]:
  """Returns both ways through the layer."""
  module, token = layer(features, zeros)
  graph, state = nnx.split(module)

  def rows(state, x):
    one = nnx.merge(graph, state)
    hidden = one.activation(one.gate(x)).reshape(-1)
    kernels = one.inward[...], one.outward.kernel[...]
    return nn.combine_active(hidden, x.reshape(-1), *kernels)

  dense = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
  return {
    "active rows": _often(jax.jit(rows), state, token),
    "all rows": _often(dense, state, token),
  }


def _often(call: Callable[..., jax.Array], *arguments: Any):
  def calls() -> None:
    for _ in range(_CALLS):
      jax.block_until_ready(call(*arguments))

  return calls


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--features", type=int, nargs="+", default=[128, 512, 1024, 2048]
  )
  parser.add_argument(
    "--zeros", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95, 0.98]
  )
  found = harness.flags(None, parser)
  bench = harness.Benchmark("active_units", found)
  table: dict[str, Any] = {}
  for features in found.features:
    ratios = {}
    for zeros in found.zeros:
      label = f"{features} features, {zeros:.0%} zeros"
      comparison = bench.compare(label, cases(features, zeros))
      spread = comparison.spread
      ours, theirs = spread("active rows"), spread("all rows")
      ratios[zeros] = round(ours.median / theirs.median, 3)
    pays = [zeros for zeros, ratio in ratios.items() if ratio < 1]
    table[str(features)] = {
      "ratio_by_share_of_zeros": ratios,
      "pays_from": min(pays, default=None),
    }
  bench.finish(seeds=[0], details={"features": table})


if __name__ == "__main__":
  main()
