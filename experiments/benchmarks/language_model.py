r"""The byte language model: quality, time, memory, peers and generation.

A model of 128 features, 4 layers and 2 heads of 64 on the source text of
Python's library, float32. One case a run, each with files of its own:

  quality   bits per byte with dynamic attention beside full, T 2,048
  step      a training step with dynamic and with full attention over T
  memory    what a step at T 16,384 takes, compiled and resident
  peers     a step with full attention by hand in JAX and in PyTorch
  generate  a token after 1k to 32k tokens, with a cache

  uv venv torch && uv pip install --python torch numpy torch
  uv run experiments/benchmarks/language_model.py step
  uv run experiments/benchmarks/language_model.py peers \
    --torch-python torch/bin/python
  uv run experiments/benchmarks/language_model.py step --help
"""

import argparse
import importlib
import sys

import harness

CASES = ("quality", "step", "memory", "peers", "generate")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("case", choices=CASES)
  asked = sys.argv[1] if len(sys.argv) > 1 else None
  if asked not in CASES:
    parser.parse_args()
    raise SystemExit(2)  # The case is not the first word.
  case = importlib.import_module(f"language_model_{asked}")
  case.add_flags(parser)
  case.run(harness.flags(None, parser))


if __name__ == "__main__":
  main()
