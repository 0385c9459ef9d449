"""What all benchmark scripts share: fair turns, spread, and doubt.

A script names what it compares; the harness times it in turns, so that a slow
minute of the machine falls on everyone, and writes a table, a JSON file and a
figure. It brackets the timings with a matrix product, and refuses to judge on
a machine that is busy with something else:

    bench = harness.Benchmark("train_step", harness.flags(__doc__))
    bench.compare("tiny MLP", {"plain jit": plain, "ours": ours})
    bench.finish(seeds=[0])

The first case of a comparison is what the others are divided by. Every case is
a function without arguments that returns when its work is done: for JAX,
`lambda: jax.block_until_ready(step(state))`.

Needs NumPy, rich and matplotlib, and nothing of the library it measures.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness_machine as machine
import numpy as np
from harness_figure import Comparison, draw, readable

RESULTS = pathlib.Path(__file__).parents[1] / "results"
_DRIFT = 1.25  # A matrix product this much slower or faster: another machine.


def measure(
  cases: Mapping[str, Callable[[], object]],
  *,
  rounds: int = 21,
  warmup: int = 2,
  calls: int = 1,
) -> dict[str, list[float]]:
  """Times cases in turns: A B C, A B C, and so on.

  Args:
    cases: name to a function that returns when its work is done.
    rounds: how often each case has its turn; at least 1.
    warmup: turns before the first that counts (compilation, caches).
    calls: calls in one turn, for work of less than about a millisecond.

  Returns:
    Case to seconds a call, one number a round.

  Raises:
    ValueError: a number out of range, or no case.
  """
  if not cases:
    raise ValueError("cases must name at least one function, got none.")
  if rounds < 1 or warmup < 0 or calls < 1:
    raise ValueError(
      "rounds and calls must be at least 1 and warmup at least 0, got "
      f"{rounds=}, {calls=}, {warmup=}."
    )
  seconds: dict[str, list[float]] = {name: [] for name in cases}
  for turn in range(-warmup, rounds):
    for name, function in cases.items():
      start = time.perf_counter()
      for _ in range(calls):
        function()
      if turn >= 0:
        seconds[name].append((time.perf_counter() - start) / calls)
  return seconds


def crossover(sizes: Sequence[float], ratios: Sequence[float]) -> float | None:
  """The size at which a ratio of times falls through 1, on log axes.

  Below it the baseline is the better choice. None when the ratio does not fall
  from above 1 to below it.

  >>> round(crossover([100, 1_000, 10_000], [4.0, 2.0, 0.5]))
  3162
  """
  logs = np.log(np.asarray(sizes, float)), np.log(np.asarray(ratios, float))
  pairs = itertools.pairwise(zip(*logs, strict=True))
  for (size, ratio), (next_size, next_ratio) in pairs:
    if ratio > 0 >= next_ratio:
      share = ratio / (ratio - next_ratio)
      return float(np.exp(size + share * (next_size - size)))
  return None


def flags(
  description: str | None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
  """Parses the flags of every benchmark, and those of `parser` with them."""
  parser = parser or argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--force",
    action="store_true",
    help="measure on a busy machine too; the result is marked as not judged",
  )
  parser.add_argument(
    "--rounds", type=int, default=21, help="turns of each case (21)"
  )
  parser.add_argument(
    "--results",
    type=pathlib.Path,
    default=RESULTS,
    help="folder of the JSON file and the figure (experiments/results)",
  )
  return parser.parse_args()


class Benchmark:
  """One benchmark, from the look at the machine to the files.

  Args:
    name: of the files it writes.
    arguments: what `flags` returned.

  Raises:
    SystemExit: the machine is busy, and `--force` was not given.
  """

  def __init__(self, name: str, arguments: argparse.Namespace):
    """Looks at the machine first."""
    self.name = name
    self.arguments = arguments
    self.comparisons: list[Comparison] = []
    self._load = os.getloadavg()[0]
    self._doubt = machine.doubt(self._load, machine.cores())
    if self._doubt and not arguments.force:
      raise SystemExit(f"{self._doubt}; wait, or measure anyway with --force")
    self._speed = machine.matmul_speed()

  def compare(
    self,
    label: str,
    cases: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 2,
    calls: int = 1,
  ) -> Comparison:
    """Times cases in turns; the first is the baseline. See `measure`."""
    rounds = self.arguments.rounds
    seconds = measure(cases, rounds=rounds, warmup=warmup, calls=calls)
    return self.record(label, seconds)

  def record(self, label: str, seconds: dict[str, list[float]]) -> Comparison:
    """Takes timings made elsewhere, one a round, the baseline first."""
    lengths = {len(values) for values in seconds.values()}
    if len(lengths) != 1 or 0 in lengths:
      raise ValueError(
        "seconds must hold equally many timings of each case, at least one, "
        f"got lengths={sorted(lengths)}."
      )
    self.comparisons.append(Comparison(label, seconds))
    return self.comparisons[-1]

  def finish(
    self, *, seeds: Sequence[int] = (), details: dict[str, Any] | None = None
  ) -> dict[str, Any]:
    """Prints the table and writes NAME.json and NAME.svg.

    Args:
      seeds: those the benchmark used.
      details: anything else worth keeping, as plain JSON: sizes, parameter
        counts, the crossover.

    Returns:
      What the JSON file holds.
    """
    speeds, load = (self._speed, machine.matmul_speed()), os.getloadavg()[0]
    result = {
      "name": self.name,
      "verdict": self._verdict(load, speeds),
      "command": machine.command(),
      "date": datetime.date.today().isoformat(),
      "seeds": list(seeds),
      "details": details or {},
      "comparisons": [_plain(c) for c in self.comparisons],
      "load": {"before": round(self._load, 2), "after": round(load, 2)},
      "matmul_gflops": [round(speed, 1) for speed in speeds],
      "hardware": machine.hardware(),
      "versions": machine.versions(),
    }
    _print(self.comparisons, result)
    self._write(result)
    return result

  def _verdict(self, load: float, speeds: tuple[float, float]) -> str:
    if self._doubt:
      return self._doubt
    before, after = speeds
    if max(speeds) > _DRIFT * min(speeds):
      return f"not judged: matmul went from {before:.0f} to {after:.0f} GFLOP/s"
    # Our own threads are part of the later load, hence twice the cores.
    return machine.doubt(load, machine.cores(), limit=2.0) or "judged"

  def _write(self, result: dict[str, Any]) -> None:
    folder = pathlib.Path(self.arguments.results)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    # A list of numbers on one line: the file is read by people too.
    text = re.sub(r"\[[\d\s.,e+-]+\]", lambda m: " ".join(m[0].split()), text)
    (folder / f"{self.name}.json").write_text(text + "\n")
    draw(self.comparisons, result, folder / f"{self.name}.svg")


def _plain(comparison: Comparison) -> dict[str, Any]:
  names = list(comparison.seconds)
  return {
    "label": comparison.label,
    "baseline": comparison.baseline,
    "rows": [
      {"case": name, **dataclasses.asdict(comparison.spread(name))}
      for name in names
    ],
    "ratios": {
      f"{mine} / {theirs}": dataclasses.asdict(comparison.ratio(mine, theirs))
      for theirs, mine in itertools.combinations(names, 2)
    },
    "seconds": {
      name: [float(f"{value:.5g}") for value in values]
      for name, values in comparison.seconds.items()
    },
  }


def _print(comparisons: Sequence[Comparison], result: dict[str, Any]) -> None:
  from rich.console import Console
  from rich.markup import escape
  from rich.table import Table

  console = Console()
  for comparison in comparisons:
    table = Table(title=escape(f"{result['name']}: {comparison.label}"))
    table.add_column("case")
    ratio_head = f"x {comparison.baseline}"
    for head in ("median", "quartiles", escape(ratio_head), "quartiles"):
      table.add_column(head, justify="right")
    for name in comparison.seconds:
      time_, ratio = comparison.spread(name), comparison.ratio(name)
      table.add_row(
        escape(name),
        readable(time_.median),
        f"{readable(time_.lower)} .. {readable(time_.upper)}",
        f"{ratio.median:.3f}",
        f"{ratio.lower:.3f} .. {ratio.upper:.3f}",
      )
    console.print(table)
  before, after = result["matmul_gflops"]
  console.print(
    f"{result['verdict']}; matmul {before} GFLOP/s before, {after} after; "
    f"load {result['load']['before']} before, {result['load']['after']} after",
    markup=False,
  )
