"""The whole step with full attention: ours, by hand in JAX, and PyTorch.

All hold the same weights, read the same batches and take AdamW; their losses
of the first batch must agree to 1e-4 before anything is timed. By hand stands
for the better of two ways to attend; PyTorch for the better of eager and
compiled. Where documents are told apart, PyTorch needs a mask, which keeps its
kernel from skipping the future: hence also one text without end.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import harness
import harness_machine
import jax
import language_model_parts as parts
import numpy as np
import optax
import plain_language_model as plain
from peers.turns import Worker, save_arrays

from deepseek_jax.train.state import split

OURS = "ours"
PLAIN = {
  "by hand, own softmax": plain.softmax_attention,
  "by hand, jax.nn": plain.library_attention,
}
TORCH = {"PyTorch, eager": False, "PyTorch, compiled": True}
_RATE, _DECAY = 1e-3, 1e-4
_AGREE = 1e-4  # Relative difference of losses.
_STREAM = 8  # Batches that are read in turn.


def add_flags(parser: argparse.ArgumentParser) -> None:
  parts.add_model_flags(parser)
  parser.add_argument(
    "--torch-python",
    default=os.environ.get("DEEPSEEK_JAX_TORCH_PYTHON"),
    help="interpreter of an environment with torch; skipped without",
  )
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=[256, 512], help="(256 512)"
  )
  parser.add_argument(
    "--tokens", type=int, default=4096, help="in a batch (4096)"
  )
  parser.add_argument("--steps", type=int, default=4, help="in a turn (4)")
  parser.add_argument(
    "--text", nargs="+", choices=("documents", "endless"),
    default=["documents", "endless"],
    help="whether documents are told apart (both)",
  )  # fmt: skip


def run(flags: argparse.Namespace) -> None:
  """Times all lengths and texts and writes the result."""
  bench = harness.Benchmark("language_model_peers", flags)
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    for length in flags.lengths:
      for text in flags.text:
        label = f"step of {flags.tokens:,} tokens, T {length:,}, {text}"
        separator = parts.SEPARATOR if text == "documents" else None
        found[label] = _measure(
          bench, label, length, separator, pathlib.Path(folder)
        )
  bench.finish(seeds=[0], details={"model": parts.sizes(flags), "cases": found})
  for label, told in found.items():
    print(f"{label}: {told['ratios']}")


def _measure(
  bench: harness.Benchmark,
  label: str,
  length: int,
  separator: int | None,
  folder: pathlib.Path,
) -> dict[str, Any]:
  flags = bench.arguments
  stream = _stream(length, max(1, flags.tokens // length))
  cases, losses = _jax_cases(flags, stream, separator)
  with _torch_workers(flags, stream, separator, folder) as workers:
    losses |= {name: worker.about["loss"] for name, worker in workers.items()}
    _check_equal(losses)
    cases |= {name: worker.epoch for name, worker in workers.items()}
    cases[OURS] = cases.pop(OURS)  # The last: divided by all others.
    comparison = bench.compare(label, cases, calls=flags.steps)
  versions = {name: w.about["versions"] for name, w in workers.items()}
  best = lambda names: min(
    names, key=lambda name: comparison.spread(name).median
  )
  peers = [best(PLAIN)] + ([best(workers)] if workers else [])
  return {
    "first_losses": losses,
    "versions": versions,
    "ratios": {
      f"{OURS} / {name}": round(comparison.ratio(OURS, name).median, 3)
      for name in peers
    },
  }


def _stream(length: int, rows: int) -> list[parts.Batch]:
  """Returns batches, the first with a document that begins in its midst."""
  batches = parts.batches(length, rows)
  stream = [next(batches) for _ in range(_STREAM)]
  while not (stream[0][0][:, 1:] == parts.SEPARATOR).any():
    stream[0] = next(batches)
  return stream


def _jax_cases(
  flags: argparse.Namespace,
  stream: list[parts.Batch],
  separator: int | None,
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
  """Returns steps to time, and the losses of the first batch."""
  model = parts.model(flags, "full", separator=separator)
  make = functools.partial(optax.adamw, _RATE, weight_decay=_DECAY)
  trainings = {
    name: parts.plain_training(
      model, make(), heads=flags.heads, separator=separator, attend=attend
    )
    for name, attend in PLAIN.items()
  }
  trainings[OURS] = parts.our_training(model, make())
  rows, length = stream[0][0].shape
  cases: dict[str, Callable[[], object]] = {}
  losses = {}
  for name, training in trainings.items():
    cases[name] = case = parts.Run(
      training, training.compiled(length, rows), stream
    )
    case()
    losses[name] = case.losses[0]
  return cases, losses


@contextlib.contextmanager
def _torch_workers(
  flags: argparse.Namespace,
  stream: list[parts.Batch],
  separator: int | None,
  folder: pathlib.Path,
) -> Iterator[dict[str, Worker]]:
  python = flags.torch_python and shutil.which(flags.torch_python)
  if not python:
    print(
      "PyTorch skipped. Make an environment with `uv venv torch && uv pip "
      "install --python torch numpy torch` and pass --torch-python "
      "torch/bin/python."
    )
    yield {}
    return
  common = _torch_sizes(flags, stream, separator, folder)
  with contextlib.ExitStack() as stack:
    workers = {}
    for name, compiled in TORCH.items():
      worker = Worker(
        python, "torch_language_model.py", common | {"compile": compiled},
        folder, f"compile_{compiled}",
      )  # fmt: skip
      stack.callback(worker.close)
      workers[name] = worker
    yield workers


def _torch_sizes(flags, stream, separator, folder) -> dict[str, Any]:
  """Writes batches and weights; returns what the workers must know."""
  tokens, targets = (np.stack(columns) for columns in zip(*stream, strict=True))
  save_arrays(folder / "batches.npz", tokens, targets)
  model = parts.model(flags, "full", separator=separator)
  params = split(model)[1]
  leaves = jax.tree_util.tree_leaves_with_path(params)
  named: dict[str, Any] = {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
    for path, x in leaves
  }
  np.savez(folder / "weights.npz", **named)
  hidden = params["layers"]["layers"][0]["feed_forward"]["outward"]["kernel"]
  return {
    "features": flags.features, "layers": flags.layers, "heads": flags.heads,
    "hidden": hidden.shape[0], "vocab": parts.VOCAB, "separator": separator,
    "length": tokens.shape[-1], "data": str(folder / "batches.npz"),
    "weights": str(folder / "weights.npz"), "learning_rate": _RATE,
    "weight_decay": _DECAY, "threads": harness_machine.cores(),
  }  # fmt: skip


def _check_equal(losses: dict[str, float]) -> None:
  """Raises when the cases are not the same model.

  Raises:
    RuntimeError: If a loss of the first batch differs.
  """
  for name, loss in losses.items():
    if abs(loss - losses[OURS]) > _AGREE * losses[OURS]:
      raise RuntimeError(f"losses differ: {name} has {loss}, got {losses}.")
