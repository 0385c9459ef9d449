"""The command line: `deepseek-jax train FILE.py`, `evaluate RUN`, and so on.

Exit codes: 0 done; 2 the input was wrong (one line says how); 3 the loss stayed
non-finite; 4 a file could not be written; 75 stopped by SIGTERM or
SIGINT after writing a checkpoint, run the same command again to go on.
"""

import argparse
import functools
import inspect
import json
import pathlib
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from deepseek_jax import command_words
from deepseek_jax.experiment_file import configured, load_experiment

if TYPE_CHECKING:
  from deepseek_jax.train.config import Experiment
  from deepseek_jax.train.result import Result

# In which several processes have to read the experiment.
_START_SECONDS = 600

OK, BAD_INPUT, NON_FINITE, NOT_WRITTEN, STOPPED = 0, 2, 3, 4, 75

_EXIT_CODES = (
  "exit codes: 0 done · 2 wrong input · 3 loss stayed non-finite · "
  "4 file not written · 75 stopped by a signal, run again to go on"
)


_HELP = (
  "--dry-run trains nothing: it reads the data set (prepares it if missing), "
  "compiles the training step alone, and prints what that needs.\n\n"
  f"{_EXIT_CODES}"
)


def main(args: Sequence[str] | None = None) -> int:
  """Runs one command; returns its exit code.

  Args:
    args: Words of the command line; those of the process when None.
  """
  if args is None:
    args = sys.argv[1:]
    # Until the training loop listens itself, SIGTERM is as good as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
  args = list(args)
  commands = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "report": report,
    "launch": launch,
    "preflight": preflight,
  }
  try:
    command_words.check_command(args, commands)
    if args[:1] == ["launch"]:
      return _launch(args[1:])
    if args[:1] == ["train"]:
      args[1:] = command_words.of_train(args[1:])
    # `train FILE` has the flags of FILE's experiment, which tyro cannot know
    # before the file is read.
    of_file = {"train": train, "preflight": _preflight}
    if len(args) > 1 and args[1][:1] != "-" and args[0] in of_file:
      return of_file[args[0]](pathlib.Path(args[1]), args[2:])
    return tyro.extras.subcommand_cli_from_dict(
      commands,
      prog="deepseek-jax",
      description=f"Train, evaluate and look at models.\n\n{_EXIT_CODES}",
      args=args or ["--help"],
    )
  except (ValueError, FileNotFoundError) as error:
    return _fail(error, BAD_INPUT)
  except KeyboardInterrupt:
    # Outside the training loop there is nothing to save: all is on disk.
    print("deepseek-jax: interrupted; run again to go on", file=sys.stderr)
    return STOPPED
  except RuntimeError as error:
    from deepseek_jax.data import NotPreparedError
    from deepseek_jax.parallel import StartError

    if isinstance(error, NotPreparedError | StartError):
      return _fail(error, BAD_INPUT)
    raise
  except OSError as error:
    # The threads of Orbax and TensorBoard meet the same failure once more.
    threading.excepthook = sys.unraisablehook = lambda *_: None
    return _fail(error, NOT_WRITTEN)


def train(
  file: tyro.conf.Positional[pathlib.Path],
  overrides: tyro.conf.Suppress[Sequence[str]] = (),
) -> int:
  """Train the experiment in FILE.py, or go on with it.

  Every field of the experiment is a flag: `deepseek-jax train FILE.py --help`
  lists them with their defaults, `--train.epochs 5` sets one. With `--dry-run`
  nothing is trained: it reads the data set (prepares it if missing), compiles
  the training step alone, and prints parameters, memory and bytes on the wire;
  where there are other devices than the mesh asks for, for fake ones.

  Args:
    file: A Python file that defines `experiment`.
    overrides: Flags for the experiment's fields.
  """
  from deepseek_jax import parallel

  # Before the file is read: what it does may ask for the devices. The flags are
  # for a process that is alone, too, with many devices.
  parallel.set_xla_flags()
  parallel.initialize()
  from deepseek_jax.train.processes import watched

  with watched(_START_SECONDS):
    flags = [flag for flag in overrides if flag != "--dry-run"]
    experiment = configured(
      file, flags, prog="deepseek-jax train", epilog=_HELP
    )
    if len(flags) == len(overrides):
      return _train(experiment)
    from deepseek_jax.train.plan import Plan, devices_for

    devices, here = devices_for(experiment.mesh)
    print(Plan.of(experiment).dry_run(devices, here))
    return OK


def _train(experiment: "Experiment") -> int:
  """Trains, and tells how it went."""
  from deepseek_jax.train.processes import of_first, pause, watched

  with watched(experiment.train.watchdog_seconds) as watchdog:
    result = experiment.run()

    def tell():
      with pause(watchdog, "writing the report"):
        _tell(result, experiment.summary(result.workdir))

    # The others wait: who ends ends the connections of all.
    of_first(tell)
  return _exit_code(result)


def _tell(result: "Result", summary: str) -> None:
  """Prints how a run went, and where its report is."""
  if not result.complete:
    print(
      f"stopped by {result.ended_by} at step {result.steps}; the same "
      f"command goes on from there",
      file=sys.stderr,
    )
    return
  for name, value in result.metrics.items():
    print(f"{name:22} {value:.4f}")
  if summary:
    print(summary)
  from deepseek_jax.train.report import write_report

  print(f"report: {write_report(result.workdir)}")
  if result.ended_by == "non-finite":
    kept = (
      "no evaluation was finite"
      if result.best_step is None
      else f"the best weights, of step {result.best_step}, were kept"
    )
    print(
      f"the loss or its gradient stayed non-finite up to step {result.steps}; "
      f"{kept}",
      file=sys.stderr,
    )


def _exit_code(result: "Result") -> int:
  if not result.complete:
    return STOPPED
  return NON_FINITE if result.ended_by == "non-finite" else OK


def evaluate(
  run: tyro.conf.Positional[pathlib.Path],
  split: Literal["train", "validation", "test"] = "test",
  file: pathlib.Path | None = None,
  data_dir: str | None = None,
) -> int:
  """Evaluate the best weights of RUN, and print its metrics as JSON.

  Args:
    run: A run directory that `train` wrote.
    split: Which split to evaluate on.
    file: The experiment's file, when it defines classes of its own.
    data_dir: Where the data set is prepared, when not in the default place.
  """
  from deepseek_jax import train as train_lib

  kind = None if file is None else type(load_experiment(file))
  print(
    json.dumps(
      train_lib.evaluate(run, split=split, kind=kind, data_dir=data_dir),
      indent=2,
    )
  )
  return OK


def generate(
  run: tyro.conf.Positional[pathlib.Path],
  prompt: str = "",
  num_tokens: int = 300,
  temperature: float = 0.8,
  top_p: float = 0.95,
  seed: int = 0,
  file: pathlib.Path | None = None,
) -> int:
  """Print text that the language model of RUN writes.

  Args:
    run: A run directory that `train` wrote.
    prompt: Where to begin; nothing is the beginning of a document.
    num_tokens: How many tokens to add, at most.
    temperature: Divides the logits; 0 takes the likeliest token.
    top_p: Draws from the likeliest tokens of this probability, in (0, 1].
    seed: Of the draws.
    file: The experiment's file, when it defines classes of its own.
  """
  import jax

  from deepseek_jax import models
  from deepseek_jax import train as train_lib

  kind = None if file is None else type(load_experiment(file))
  _, model = train_lib.load_model(run, kind=kind)
  if not isinstance(model, models.LanguageModel):
    raise ValueError(
      f"run must be of a language model, got one of {type(model).__name__}."
    )
  tokenizer = train_lib.tokenizer_of(run)
  print(prompt, end="", flush=True)
  for part in train_lib.write(
    model,
    tokenizer,
    prompt,
    num_tokens,
    temperature=temperature,
    top_p=top_p,
    key=jax.random.key(seed),
  ):
    print(part, end="", flush=True)
  print()
  return OK


def report(run: tyro.conf.Positional[pathlib.Path]) -> int:
  """Write RUN/report.html: curves, mistakes, parameters, configuration.

  Args:
    run: A run directory that `train` wrote.
  """
  from deepseek_jax.train.report import write_report

  print(write_report(run))
  return OK


def launch(
  file: tyro.conf.Positional[pathlib.Path],
  num_processes: Annotated[int, tyro.conf.arg(aliases=["-n"])],
  devices_per_process: int | None = None,
  grace_seconds: float = 15.0,
  flags: tyro.conf.Suppress[Sequence[str]] = (),
) -> int:
  """Train FILE.py in several processes of this machine at once.

  `deepseek-jax launch -n 4 FILE.py --train.epochs 5`: what follows the file are
  flags of `train`. Ends with the exit code of the first process that failed.

  Args:
    file: A Python file that defines `experiment`.
    num_processes: How many processes.
    devices_per_process: Fake CPU devices, or GPUs, of each.
    grace_seconds: How long the others may go on after one has failed.
    flags: Flags of `train`.
  """
  from deepseek_jax.parallel.launch import launch as launch_job

  if not file.is_file():
    raise FileNotFoundError(f"no experiment file {str(file)!r}.")
  return launch_job(
    [sys.executable, "-m", "deepseek_jax.cli", "train", str(file), *flags],
    num_processes,
    devices_per_process=devices_per_process,
    grace_seconds=grace_seconds,
  )


def _launch(args: Sequence[str]) -> int:
  """Cuts the words of `launch` in its own and those of `train`."""
  own, flags = command_words.of_launch(args)
  return tyro.cli(
    functools.partial(launch, flags=flags),
    args=own,
    prog="deepseek-jax launch",
    description=inspect.cleandoc(launch.__doc__ or "").partition("\n\nArgs")[0],
  )


def preflight(
  file: tyro.conf.Positional[pathlib.Path],
  topology: str,
  scaling: bool = False,
  flags: tyro.conf.Suppress[Sequence[str]] = (),
) -> int:
  """Say whether the experiment in FILE.py fits a pod, and how fast it could be.

  `deepseek-jax preflight FILE.py --topology v5p:8x8x16 --mesh.fsdp 64`: what is
  no flag of this command is one of `train`. Compiles the step with the compiler
  of TPUs where that is installed (`pip install "deepseek-jax[tpu]"`), and for
  fake CPU devices elsewhere. Ends with 2 if it does not fit.

  Args:
    file: A Python file that defines `experiment`.
    topology: Chips and the sizes of their torus, such as v5p:8x8x16.
    scaling: Whether to add a table from 8 chips to all, the batch growing.
    flags: Flags of `train`.
  """
  import jax

  # What is asked for is not here, and what is here is not asked.
  jax.config.update("jax_platforms", "cpu")
  from deepseek_jax.parallel import topology as topology_lib
  from deepseek_jax.parallel.preflight_compile import allow_devices

  allow_devices(topology_lib.parse(topology).num_devices)
  experiment = configured(
    file, flags, prog="deepseek-jax preflight", epilog=_EXIT_CODES
  )
  from deepseek_jax.train.preflight import preflight_text

  text, fits = preflight_text(experiment, topology, scaling=scaling)
  print(text)
  return OK if fits else BAD_INPUT


def _preflight(file: pathlib.Path, words: Sequence[str]) -> int:
  """Cuts the words of `preflight` in its own and those of the experiment."""
  command_words.check_topology(words)
  parser = argparse.ArgumentParser(
    prog="deepseek-jax preflight FILE",
    description=inspect.getdoc(preflight),
    add_help=False,
    allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--topology", required="--help" not in words)
  parser.add_argument("--scaling", action="store_true")
  own, flags = parser.parse_known_args(words)
  if "--help" in words:
    parser.print_help()
  return preflight(file, own.topology or "v5e:2x2", own.scaling, flags)


def _fail(error: Exception, code: int) -> int:
  print(f"deepseek-jax: {error}", file=sys.stderr)
  return code


if __name__ == "__main__":
  raise SystemExit(main())
