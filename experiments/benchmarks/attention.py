r"""Dynamic attention against full attention: time, memory and where it pays.

Eight heads of 64, float32, causal; blocks of 64, a window of 256 and four
blocks found by hashing, the search included: 512 keys a token at any length.
The peers are `jax.nn.dot_product_attention` and, in an environment of its own,
PyTorch's fused kernel; all take turns.

  uv venv torch && uv pip install --python torch numpy torch
  uv run experiments/benchmarks/attention.py --torch-python torch/bin/python
"""

import argparse
import functools
import math
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
from peers.turns import Worker

from deepseek_jax import nn
from deepseek_jax.kernels import block_sparse_attention

HEADS, SIZE = 8, 64
BLOCK, WINDOW, REMOTE = 64, 256, 4
VISITED = WINDOW + REMOTE * BLOCK
DENSE, TORCH = "full, XLA", "full, PyTorch"
OURS, CORE, SEARCH = "dynamic", "blocks given", "search alone"
_DENSE_MOST = 4096  # Tokens; beyond it does not fit.


def inputs(time: int) -> tuple[jax.Array, ...]:
  """Returns queries, keys and values."""
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(jax.random.normal(k, (1, time, HEADS, SIZE)) for k in keys)


def ours(q, k, v):
  return nn.dynamic_attention(
    q, k, v, block_size=BLOCK, window=WINDOW, num_remote=REMOTE
  )


def dense(q, k, v):
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def search(q, k, v):
  del v
  return nn.choose_blocks(
    q, k, block_size=BLOCK, window=WINDOW, num_remote=REMOTE
  )


def core(ids, q, k, v):
  return block_sparse_attention(q, k, v, ids, block_size=BLOCK, window=WINDOW)


def with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the gradients of a weighted sum of the outputs."""

  def gradients(q, k, v, weights):
    loss = lambda *args: jnp.vdot(attend(*args), weights)
    return jax.grad(loss, (0, 1, 2))(q, k, v)

  return gradients


class Case:
  """A compiled function with its arguments, ready to be called."""

  def __init__(self, function: Callable[..., Any], *args: Any):
    self.compiled = jax.jit(function).lower(*args).compile()
    self.args = args

  def __call__(self) -> None:
    """Calls it and waits."""
    jax.block_until_ready(self.compiled(*self.args))

  def megabytes(self) -> float:
    """Returns the temporary memory of a call."""
    found = self.compiled.memory_analysis()
    return round(found.temp_size_in_bytes / 1e6, 1) if found else math.nan


def jax_cases(time: int, backward: bool) -> dict[str, Case]:
  """Returns the cases of one length, the peer that XLA offers first."""
  args = inputs(time)
  ids = jax.block_until_ready(jax.jit(search)(*args))
  wrap = with_gradients if backward else lambda attend: attend
  more = (jax.random.normal(jax.random.key(1), args[0].shape),) * backward
  cases = {}
  if time <= _DENSE_MOST:
    cases[DENSE] = Case(wrap(dense), *args, *more)
  cases[OURS] = Case(wrap(ours), *args, *more)
  given = lambda ids, *rest: wrap(functools.partial(core, ids))(*rest)
  cases[CORE] = Case(given, ids, *args, *more)
  if not backward:
    cases[SEARCH] = Case(search, *args)
  return cases


def torch_worker(
  python: str | None, time: int, backward: bool, folder: pathlib.Path
) -> Worker | None:
  if not python or not (path := shutil.which(python)):
    return None
  sizes = {
    "heads": HEADS, "head_dim": SIZE, "time": time, "backward": backward,
    "threads": harness_machine.cores(),
  }  # fmt: skip
  name = f"{time}_{backward}"
  return Worker(path, "torch_attention.py", sizes, folder, name)


def measure(
  bench: harness.Benchmark, time: int, backward: bool, folder: pathlib.Path
) -> dict[str, Any]:
  """Times one length; returns efficiency and memory."""
  compiled = jax_cases(time, backward)
  cases: dict[str, Callable[[], object]] = {}
  worker = torch_worker(bench.arguments.torch_python, time, backward, folder)
  if worker:
    cases[TORCH] = worker.epoch
  cases |= compiled
  kind = "forward and backward" if backward else "forward"
  comparison = bench.compare(f"{kind}, {time:,} tokens", cases)
  if worker:
    worker.close()
  median = {name: comparison.spread(name).median for name in cases}
  # Two products a visited key forward, five more backward.
  flops = (14 if backward else 4) * HEADS * time * VISITED * SIZE
  peak = 1e9 * harness_machine.matmul_speed()
  return {
    "seconds": {name: float(f"{s:.4g}") for name, s in median.items()},
    "core_share_of_matmul_peak": round(flops / median[CORE] / peak, 3),
    "temporary_megabytes": {n: c.megabytes() for n, c in compiled.items()},
  } | (
    {"search_share": round(median[SEARCH] / median[OURS], 3)}
    if not backward
    else {}
  )


def summary(rows: dict[int, dict[str, Any]]) -> dict[str, Any]:
  """Returns growth and the lengths from which on ours is faster."""
  lengths = sorted(rows)
  seconds = {n: [rows[t]["seconds"].get(n) for t in lengths] for n in
             (OURS, TORCH, DENSE)}  # fmt: skip
  found: dict[str, Any] = {}
  for peer in (TORCH, DENSE):
    pairs = [
      (t, mine / theirs)
      for t, mine, theirs in zip(
        lengths, seconds[OURS], seconds[peer], strict=True
      )
      if theirs
    ]
    if len(pairs) > 1:
      sizes, ratios = zip(*pairs, strict=True)
      found[f"crossover_tokens_{peer}"] = harness.crossover(sizes, ratios)
      found[f"ratios_{peer}"] = {t: round(r, 3) for t, r in pairs}
  long = [t for t in lengths if t >= 2048]
  if len(long) > 1:
    first, last = long[0], long[-1]
    times = rows[last]["seconds"][OURS] / rows[first]["seconds"][OURS]
    found["time_exponent"] = round(math.log(times) / math.log(last / first), 3)
  return found


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--torch-python",
    default=os.environ.get("DEEPSEEK_JAX_TORCH_PYTHON"),
    help="interpreter of an environment with torch",
  )
  lengths = [1024, 2048, 4096, 8192, 16384, 32768]
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=lengths, help="forward"
  )
  parser.add_argument(
    "--backward-lengths", type=int, nargs="*", default=lengths[:4],
    help="forward and backward",
  )  # fmt: skip
  return harness.flags(None, parser)


def main() -> None:
  found = arguments()
  bench = harness.Benchmark("attention", found)
  details: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    for kind, lengths in (
      ("forward", found.lengths),
      ("forward and backward", found.backward_lengths),
    ):
      rows = {t: measure(bench, t, "back" in kind, path) for t in lengths}
      details[kind] = {"lengths": rows} | summary(rows)
  bench.finish(seeds=[0], details=details)


if __name__ == "__main__":
  main()
