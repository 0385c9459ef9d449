r"""One token after a long context: dynamic attention against full, with caches.

A layer of 512 features, eight heads of 64, float32: blocks of 64, a window of
256 and four blocks found by hashing. Ours is the whole `decode` of the layer:
projections, the cache, the search and what it found. The peers only attend, to
keys and values that are there already, which favours them:
`jax.nn.dot_product_attention`, the same as two products, and PyTorch's kernel.

  uv venv torch && uv pip install --python torch numpy torch
  uv run experiments/benchmarks/attention_decode.py \
    --torch-python torch/bin/python
"""

import argparse
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import harness
import harness_machine
import jax
import jax.numpy as jnp
from flax import nnx
from peers.turns import Worker

from deepseek_jax import nn

HEADS, SIZE = 8, 64
FEATURES = HEADS * SIZE
OURS = "dynamic, whole layer"
XLA, PRODUCTS, TORCH = "full, XLA", "full, two products", "full, PyTorch"
_CALLS = 20  # In a timing: a call takes about a millisecond.


def dynamic(time: int) -> Callable[[], object]:
  """Returns a call that decodes one token after `time` tokens."""
  layer = nn.DynamicAttention(
    FEATURES, num_heads=HEADS, head_dim=SIZE, block_size=64, window=256,
    num_remote=4, rngs=nnx.Rngs(0),
  )  # fmt: skip
  layer.eval()
  graph, state = nnx.split(layer)
  keys = jax.random.split(jax.random.key(0))
  cache = layer.init_cache(1, time + 64)
  tokens = jax.random.normal(keys[0], (1, time, FEATURES))
  prefill = jax.jit(lambda x, cache: nnx.merge(graph, state).prefill(x, cache))
  held = [jax.block_until_ready(prefill(tokens, cache)[1])]
  token = jax.random.normal(keys[1], (1, 1, FEATURES))

  def decode(cache):
    out, new = nnx.merge(graph, state).decode(token, cache)
    return out, new._replace(length=cache.length)  # The same again.

  step = jax.jit(decode, donate_argnums=0)

  def call():
    out, held[0] = step(held[0])
    jax.block_until_ready((out, held[0]))

  return call


def full(time: int) -> dict[str, Callable[[], object]]:
  """Returns calls that attend to all tokens."""
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (1, time, HEADS, SIZE)) for key in keys)
  q = q[:, :1]

  def products(q, k, v):  # [B, N, ...], as the cache would lie best
    logits = jnp.einsum("bnh,bnth->bnt", q, k) * SIZE**-0.5
    return jnp.einsum("bnt,bnth->bnh", jax.nn.softmax(logits), v)

  by_head = q[:, 0], jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
  attend = jax.jit(jax.nn.dot_product_attention)
  both = jax.jit(products)
  return {
    XLA: lambda: jax.block_until_ready(attend(q, k, v)),
    PRODUCTS: lambda: jax.block_until_ready(both(*by_head)),
  }


def measure(
  bench: harness.Benchmark, time: int, folder: pathlib.Path
) -> dict[str, Any]:
  """Times one length; returns seconds a token and ratios."""
  cases: dict[str, Callable[[], object]] = {}
  worker = None
  python = bench.arguments.torch_python
  if python and (path := shutil.which(python)):
    sizes = {
      "heads": HEADS, "head_dim": SIZE, "time": time, "calls": _CALLS,
      "threads": harness_machine.cores(),
    }  # fmt: skip
    worker = Worker(path, "torch_decode.py", sizes, folder, str(time))
    cases[TORCH] = worker.epoch
  cases |= {OURS: dynamic(time)} | full(time)
  cases = {
    name: call if name == TORCH else _often(call)
    for name, call in cases.items()
  }
  comparison = bench.compare(f"after {time:,} tokens", cases)
  if worker:
    worker.close()
  seconds = {n: comparison.spread(n).median / _CALLS for n in cases}
  ratios = {n: round(seconds[OURS] / s, 3) for n, s in seconds.items()}
  return {
    "seconds_a_token": {n: float(f"{s:.3g}") for n, s in seconds.items()},
    "ours_in_units_of": ratios,
  }


def _often(call: Callable[[], object]) -> Callable[[], None]:
  def calls() -> None:
    for _ in range(_CALLS):
      call()

  return calls


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--torch-python",
    default=os.environ.get("DEEPSEEK_JAX_TORCH_PYTHON"),
    help="interpreter of an environment with torch",
  )
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=[1024, 4096, 8192, 32768]
  )
  found = harness.flags(None, parser)
  bench = harness.Benchmark("attention_decode", found)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    rows = {time: measure(bench, time, path) for time in found.lengths}
  bench.finish(seeds=[0], details={"lengths": rows})


if __name__ == "__main__":
  main()
