"""Python files that define an experiment, and flags for its fields."""

import importlib.util
import pathlib
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
  from deepseek_jax.train.config import Experiment


def configured(
  file: pathlib.Path, flags: Sequence[str], *, prog: str, epilog: str
) -> "Experiment":
  """Returns the experiment of a file with the fields that flags set.

  Args:
    file: A Python file.
    flags: As `--train.epochs 5`.
    prog: What help says was called.
    epilog: What help ends its description with.

  Raises:
    SystemExit: If a flag is wrong, or asks for help.
  """
  experiment = load_experiment(file)
  return tyro.cli(
    type(experiment),
    default=experiment,
    args=flags,
    prog=f"{prog} {file}",
    description=f"{type(experiment).__doc__}\n\n{epilog}",
  )


def load_experiment(file: pathlib.Path) -> "Experiment":
  """Executes a file the user named and returns its `experiment`.

  Args:
    file: A Python file.

  Raises:
    FileNotFoundError: If there is none.
    ValueError: If it defines no experiment.
    SystemExit: If it raises; its traceback is printed.
  """
  if not file.is_file():
    raise FileNotFoundError(f"no experiment file {str(file)!r}.")
  spec = importlib.util.spec_from_file_location("_experiment", file)
  if spec is None or spec.loader is None:
    raise ValueError(f"file must be a Python file, got {str(file)!r}.")
  module = importlib.util.module_from_spec(spec)
  sys.modules[module.__name__] = module  # Its classes' type hints need it.
  sys.path.insert(0, str(file.parent.absolute()))  # As `python FILE` has it.
  try:
    spec.loader.exec_module(module)
  except Exception:
    traceback.print_exc()  # The mistake is in the file: its lines are wanted.
    raise SystemExit(2) from None
  from deepseek_jax.train.config import Experiment

  experiment = getattr(module, "experiment", None)
  if not isinstance(experiment, Experiment):
    raise ValueError(
      f"{file} must define `experiment`, an instance of "
      f"deepseek_jax.train.config.Experiment, got {type(experiment).__name__}."
    )
  return experiment
