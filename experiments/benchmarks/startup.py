"""How long one waits before anything happens: imports and `--help`.

Whole processes, so the interpreter's own start counts on every side.

  uv run experiments/benchmarks/startup.py
"""

import functools
import subprocess
import sys

import harness


def case(*words: str):
  """Returns a function that runs Python with these words to its end."""
  return functools.partial(
    subprocess.run, [sys.executable, *words], check=True, capture_output=True
  )


def main() -> None:
  """Times the starts and writes the result."""
  bench = harness.Benchmark("startup", harness.flags(__doc__))
  bench.compare(
    "import",
    {
      "import jax, optax": case("-c", "import jax, optax"),
      "import deepseek_jax": case("-c", "import deepseek_jax"),
      "… and touch optim": case("-c", "import deepseek_jax as d; d.optim"),
    },
    warmup=1,
  )
  bench.compare(
    "command line",
    {
      "python -c pass": case("-c", "pass"),
      "deepseek-jax --help": case("-m", "deepseek_jax.cli", "--help"),
    },
    warmup=1,
  )
  bench.finish()


if __name__ == "__main__":
  main()
