"""Steps to a target of optimizers, against AdamW tuned for each workload.

A small AlgoPerf on a CPU: model, data, batches and start are fixed, only the
optimizer differs. Targets are the hardest validation losses that the best of
108 settings of AdamW reaches (median of 5 seeds) in half of the steps, and in
0.9 of them. Every run is remembered: a command that was killed goes on.

  optimizers.py tune                  # AdamW; freezes the targets
  optimizers.py tune --candidates muon soap ...       # a rate for every peer
  optimizers.py run --candidates deepseek             # scoring seeds, default
  optimizers.py run --candidates muon --settings best # scoring seeds, as tuned
  optimizers.py run --candidates deepseek --settings grid --seeds 0
  optimizers.py compare --candidates deepseek --seeds 0 1 2
  optimizers.py time --workloads byte_lm --candidates deepseek muon soap
  optimizers.py report                # optimizers.json and optimizers.svg

Development seeds (0 to 4) choose settings and targets; scoring seeds (100 to
104) judge. `--candidate-file FILE` brings in prototypes: a Python file that
defines CANDIDATES, name to optimizer_candidates.Candidate.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import harness_machine as machine
import optimizer_candidates as candidates
import optimizer_runs as training
import optimizer_scores as scores
import workloads

RESULTS = pathlib.Path(__file__).parents[1] / "results"
DEVELOPMENT, SCORING = (0, 1, 2, 3, 4), (100, 101, 102, 103, 104)
# Cheap ones first.
ORDER = ("autoencoder", "digits_mlp", "digits_classifier", "digits_cnn")


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = ("tune", "targets", "run", "compare", "time", "report")
  parser.add_argument("command", choices=commands)
  add = parser.add_argument
  add("--candidates", nargs="+", help="(tune: adamw, otherwise all)")
  add("--workloads", nargs="+", help="(all)")
  add("--seeds", nargs="+", type=int, help="(run: scoring, compare: 0-2)")
  add("--development", nargs="+", type=int, default=DEVELOPMENT, help="(0-4)")
  add("--scoring", nargs="+", type=int, default=SCORING, help="seeds (100-104)")
  add("--scales", nargs="+", type=int, default=(1, 4, 16), help="of batches")
  add("--settings", choices=("default", "grid", "best"), default="default")
  add("--jobs", type=int, default=1, help="processes, a core each (1)")
  add("--again", action="store_true", help="run also what was run already")
  add("--keep", type=int, help="settings that tune tries on all seeds (8; 3)")
  add("--candidate-file", type=pathlib.Path, help="of prototypes")
  add("--workload-folder", type=pathlib.Path, default=workloads.FOLDER)
  add("--results", type=pathlib.Path, default=RESULTS)
  add("--runs", type=pathlib.Path, help="(RESULTS/optimizers_runs.jsonl)")
  arguments = parser.parse_args()
  if arguments.runs is None:
    arguments.runs = arguments.results / "optimizers_runs.jsonl"
  if arguments.workloads is None:
    found = workloads.names(arguments.workload_folder)
    arguments.workloads = [name for name in ORDER if name in found]
    arguments.workloads += [name for name in found if name not in ORDER]
  return arguments


class Bench:
  """The commands; each makes the runs that it lacks."""

  def __init__(self, arguments: argparse.Namespace):
    self.arguments = arguments
    self.places = training.Places(
      arguments.runs, arguments.workload_folder, arguments.candidate_file
    )
    self.targets_path = arguments.results / "optimizers_targets.json"
    self.targets = scores.load(self.targets_path)

  def development(self, name: str = "") -> Sequence[int]:
    """Seeds that choose settings: all for the baseline, three for others."""
    return self.arguments.development[: None if name == scores.BASELINE else 3]

  def candidate(self, name: str) -> candidates.Candidate:
    """The optimizer of a name."""
    return candidates.find(name, self.places.candidates)

  def ensure(self, tasks: list[training.Task], again=False) -> scores.Runs:
    """Makes the runs that are missing; returns all."""
    return training.ensure(
      tasks,
      self.places,
      jobs=self.arguments.jobs,
      again=again,
      progress=progress,
    )

  def tune(self) -> None:
    """One seed for the whole grid, all development seeds for the best."""
    for workload in self.arguments.workloads:
      for name in self.arguments.candidates or [scores.BASELINE]:
        self._tune(workload, name)

  def _tune(self, workload: str, name: str) -> None:
    baseline = name == scores.BASELINE
    keep = self.arguments.keep or (8 if baseline else 3)
    seeds = self.development(name)
    grid = self.candidate(name).grid
    again = self.arguments.again
    runs = self.ensure(
      [training.Task.of(workload, name, s, seeds[0]) for s in grid], again
    )
    chosen = []
    for kind in scores.SHARES:
      target = None if baseline else self.targets.get(workload, {}).get(kind)
      rows = scores.ranked(runs, workload, name, seeds[:1], kind, target)
      chosen += [setting for _, setting in rows[:keep]]
    runs = self.ensure(
      [
        training.Task.of(workload, name, setting, seed)
        for setting in chosen
        for seed in seeds
      ]
    )
    if baseline:
      self._freeze(workload, runs, seeds)

  def freeze(self) -> None:
    """Freezes the targets of the workloads from the runs there are."""
    runs = training.read(self.places.runs)
    for workload in self.arguments.workloads:
      self._freeze(workload, runs, self.development(scores.BASELINE))

  def _freeze(self, workload: str, runs: scores.Runs, seeds) -> None:
    steps = workloads.load(workload, self.places.workloads).steps
    self.targets = scores.load(self.targets_path)  # Others may tune, too.
    self.targets[workload] = scores.targets_of(runs, workload, steps, seeds)
    scores.save(
      self.targets,
      self.targets_path,
      seeds=list(seeds),
      command=machine.command(),
      versions=machine.versions(),
      hardware=machine.hardware(),
    )
    for kind, target in self.targets[workload].items():
      print(f"{workload} {kind}: {target.loss:.5g} by {target.setting}")

  def settings(self, workload: str, name: str) -> list[candidates.Setting]:
    """The settings that `--settings` asks for; `best`, one for each target."""
    candidate, wanted = self.candidate(name), self.arguments.settings
    if name == scores.BASELINE and workload in self.targets:
      return [target.setting for target in self.targets[workload].values()]
    if wanted == "grid":
      return list(candidate.grid)
    if wanted == "default":
      return [candidate.default]
    return list(self.best(training.read(self.places.runs), workload, name))

  def best(self, runs: scores.Runs, workload: str, name: str) -> Any:
    """A candidate's best setting on development seeds for each target."""
    seeds = self.development(name)
    for kind, target in self.targets[workload].items():
      rows = scores.ranked(runs, workload, name, seeds, kind, target)
      if not rows:
        raise SystemExit(f"no tuned setting: tune --candidates {name} first")
      yield rows[0][1]

  def run(self, seeds=None) -> scores.Runs:
    """Runs candidates and the baseline's settings on the seeds."""
    names = self.arguments.candidates or list(candidates.CANDIDATES)
    seeds = seeds or self.arguments.seeds or self.arguments.scoring
    tasks = [
      training.Task.of(workload, name, setting, seed)
      for workload in self.arguments.workloads
      for name in dict.fromkeys([scores.BASELINE, *names])
      if workload in self.targets or name != scores.BASELINE
      for setting in self.settings(workload, name)
      for seed in seeds
    ]
    again = self.arguments.again
    if again:
      mine = [task for task in tasks if task.candidate != scores.BASELINE]
      self.ensure(mine, again=True)
    return self.ensure(tasks)

  def compare(self) -> None:
    """Runs on development seeds what is missing, and prints a table."""
    import optimizer_report

    seeds = self.arguments.seeds or self.development()
    runs = self.run(seeds)
    rows = {}
    for name in self.arguments.candidates or list(candidates.CANDIDATES):
      for workload in self.arguments.workloads:
        for setting in self.settings(workload, name):
          words = [f"{k}={v:g}" for k, v in setting.items()]
          label = name if name == scores.BASELINE else " ".join([name, *words])
          rows.setdefault(label, {}).setdefault(workload, []).append(
            scores.records_of(runs, workload, name, setting, seeds)
          )
    optimizer_report.print_comparison(
      rows, self.targets, runs, self.arguments.workloads, seeds
    )

  def time(self) -> None:
    """Times steps of the candidates and the baseline, one workload each."""
    import optimizer_times

    load, path = os.getloadavg()[0], self._times_path
    found = json.loads(path.read_text()) if path.exists() else {}
    names = self.arguments.candidates or list(candidates.CANDIDATES)
    chosen = {n: self.candidate(n) for n in [scores.BASELINE, *names]}
    for name in self.arguments.workloads:
      workload = workloads.load(name, self.places.workloads)
      found[name] = {
        "scales": optimizer_times.times(
          workload, chosen, scales=self.arguments.scales
        ),
        "load_before": round(load, 2),
        "verdict": machine.doubt(load, machine.cores()) or "judged",
        "hardware": machine.hardware(),
      }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))

  def report(self) -> None:
    """Writes the JSON file and the figure, and prints the tables."""
    import optimizer_report
    import optimizer_summary

    path = self._times_path
    summary = optimizer_summary.summarize(
      training.read(self.places.runs),
      self.targets,
      candidates.known(self.places.candidates),
      development=self.development(),
      scoring=self.arguments.scoring,
    )
    optimizer_report.write(
      summary,
      self.arguments.results,
      scoring_seeds=list(self.arguments.scoring),
      targets={
        f"{workload}/{kind}": dataclasses.asdict(target)
        for workload, kinds in self.targets.items()
        for kind, target in kinds.items()
      },
      ablations=list(candidates.ABLATIONS),
      times=json.loads(path.read_text()) if path.exists() else {},
    )

  @property
  def _times_path(self) -> pathlib.Path:
    return self.arguments.results / "optimizers_times.json"


def progress(records: Iterator[Any], total: int) -> Iterator[Any]:
  """A bar on a terminal, otherwise a line now and then."""
  if sys.stderr.isatty():
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(records, "runs", total=total, console=console)
    return
  started = said = time.monotonic()
  for done, record in enumerate(records, 1):
    yield record
    now = time.monotonic()
    if now - said > 20 or done == total:
      left = (now - started) / done * (total - done)
      print(
        f"{done}/{total} runs, {left:.0f} s left; {record['key']}",
        file=sys.stderr,
        flush=True,
      )
      said = now


def main() -> None:
  arguments = parse()
  os.environ.setdefault("XLA_FLAGS", training.XLA_FLAGS)
  bench = Bench(arguments)
  commands = {
    "tune": bench.tune,
    "targets": bench.freeze,
    "run": bench.run,
    "compare": bench.compare,
    "time": bench.time,
    "report": bench.report,
  }
  commands[arguments.command]()


if __name__ == "__main__":
  main()
