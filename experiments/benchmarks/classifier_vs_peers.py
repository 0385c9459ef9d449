r"""Time of an epoch of the default classifier: ours, Keras 3 and PyTorch.

One worker process for each case, in the virtual environment of its library;
they take turns, an epoch at a time, and sleep in between. All train the same
layers of the same sizes with AdamW on the digits, in float32, on all cores;
epochs that compile are not counted.

The peers' environments are yours to make, and skipped where they are missing:

  uv venv keras && uv pip install --python keras keras jax
  uv venv torch && uv pip install --python torch numpy torch
  uv run experiments/benchmarks/classifier_vs_peers.py \
    --keras-python keras/bin/python --torch-python torch/bin/python
"""

import argparse
import contextlib
import inspect
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import harness
import harness_machine
from peers.turns import Worker, save_arrays

import deepseek_jax as dj

OURS = "deepseek_jax"
# Case: library, worker, what is different. The better case of each library is
# the one to quote.
CASES = {
  OURS: ("deepseek_jax", "our_classifier.py", {}),
  "Keras 3 (JAX)": ("keras", "keras_classifier.py", {"unroll": False}),
  "Keras 3 (JAX), unrolled": ("keras", "keras_classifier.py", {"unroll": True}),
  "PyTorch, eager": ("torch", "torch_classifier.py", {"compile": False}),
  "PyTorch, compiled": ("torch", "torch_classifier.py", {"compile": True}),
}
REMEDIES = {
  "keras": "uv venv keras && uv pip install --python keras keras jax",
  "torch": "uv venv torch && uv pip install --python torch numpy torch",
}


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for library in REMEDIES:
    parser.add_argument(
      f"--{library}-python",
      default=os.environ.get(f"DEEPSEEK_JAX_{library.upper()}_PYTHON"),
      help=f"interpreter of an environment with {library}",
    )
  parser.add_argument(
    "--batch-sizes", type=int, nargs="+", default=[64], help="(64)"
  )
  parser.add_argument(
    "--warmup", type=int, default=4, help="epochs before the first counted (4)"
  )
  return harness.flags(None, parser)


def interpreters(arguments: argparse.Namespace) -> dict[str, str]:
  """Returns the interpreter of every library that is to be had."""
  found = {"deepseek_jax": sys.executable}
  for library, remedy in REMEDIES.items():
    python = getattr(arguments, f"{library}_python")
    if python and (path := shutil.which(python)):
      found[library] = path
      continue
    why = f"no interpreter at {python!r}" if python else "not asked for"
    print(
      f"{library} skipped: {why}. Make an environment with `{remedy}` and pass "
      f"--{library}-python {library}/bin/python."
    )
  return found


def default_sizes() -> dict[str, Any]:
  """Returns the arguments of `models.Classifier` that the peers must match."""
  parameters = inspect.signature(dj.models.Classifier.__init__).parameters
  sizes: dict[str, Any] = {
    name: parameter.default
    for name, parameter in parameters.items()
    if isinstance(parameter.default, int | float | str | tuple)
  }
  sizes["head_dim"] = sizes["lstm_features"] // sizes["num_heads"]
  return sizes


def prepare(folder: pathlib.Path) -> dict[str, Any]:
  """Writes the training images; returns what all workers have in common."""
  digits = dj.data.load("digits")
  everything = next(
    iter(
      dj.data.batches(
        digits.train, len(digits.train), shuffle=False, epochs=1, prefetch=0
      )
    )
  )
  path = folder / "digits.npz"
  save_arrays(path, everything["image"], everything["label"])
  return default_sizes() | {
    "image_shape": digits.schema.input_shapes["image"],
    "num_classes": digits.schema.num_classes,
    "data": str(path),
    "data_set": "digits",
    "threads": harness_machine.cores(),
    "learning_rate": 3e-3,
    "weight_decay": 1e-4,
    "seed": 0,
  }


@contextlib.contextmanager
def workers(
  pythons: dict[str, str], sizes: dict[str, Any], folder: pathlib.Path
) -> Iterator[dict[str, Worker]]:
  """Starts a worker for every case whose library is there."""
  with contextlib.ExitStack() as stack:
    started = {}
    for case, (library, script, difference) in CASES.items():
      if library in pythons:
        name = f"case_{len(started)}"
        worker = Worker(
          pythons[library], script, sizes | difference, folder, name
        )
        stack.callback(worker.close)
        started[case] = worker
    yield started


def take_turns(
  started: dict[str, Worker], *, rounds: int, warmup: int
) -> dict[str, list[float]]:
  """Returns the seconds of every counted epoch, in turns."""
  for worker in started.values():
    for _ in range(warmup):
      worker.epoch()
  seconds: dict[str, list[float]] = {case: [] for case in started}
  for _ in range(rounds):
    for case, worker in started.items():
      seconds[case].append(worker.epoch())
  return seconds


def about(started: dict[str, Worker]) -> dict[str, Any]:
  """Returns what makes the comparison fair: parameters and falling losses.

  Raises:
    RuntimeError: If the models differ by more than 1 % in size.
  """
  ours = started[OURS].about["parameters"]
  for case, worker in started.items():
    if abs(worker.about["parameters"] - ours) > 0.01 * ours:
      raise RuntimeError(
        f"{case} has {worker.about['parameters']} parameters, {OURS} {ours}."
      )
  return {
    case: worker.about | {"first_loss": worker.losses[0],
                          "last_loss": worker.losses[-1]}
    for case, worker in started.items()
  }  # fmt: skip


def main() -> None:
  arguments = parse()
  bench = harness.Benchmark("classifier_vs_peers", arguments)
  pythons = interpreters(arguments)
  details = {}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    sizes = prepare(path)
    for batch_size in arguments.batch_sizes:
      label = f"epoch of 1,257 digits, batch {batch_size}"
      batch = {"batch_size": batch_size}
      with workers(pythons, sizes | batch, path) as started:
        seconds = take_turns(
          started, rounds=arguments.rounds, warmup=arguments.warmup
        )
        details[label] = about(started)
      bench.record(label, seconds)
  for label, cases in details.items():
    for case, told in cases.items():
      print(
        f"{label}: {case} has {told['parameters']:,} parameters, training loss "
        f"{told['first_loss']:.3f} -> {told['last_loss']:.3f}"
      )
  private = {"data", "data_set", "threads"}
  bench.finish(
    seeds=[sizes["seed"]],
    details={
      "sizes": {k: v for k, v in sizes.items() if k not in private},
      "cases": details,
    },
  )


if __name__ == "__main__":
  main()
