"""A finished or interrupted run, back as a model."""

import dataclasses
import json
import os
import pathlib
from typing import Literal

import jax
from flax import nnx

from deepseek_jax import data as data_lib
from deepseek_jax.train import config as config_lib
from deepseek_jax.train import language, run_directory
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.evaluation import Evaluator, batch_rows
from deepseek_jax.train.placement import Placement
from deepseek_jax.train.step import StepSpec

_OWN = {
  kind.__name__: kind
  for kind in (config_lib.Experiment, language.LanguageExperiment)
}


def load_model(
  workdir: str | os.PathLike,
  *,
  kind: type[config_lib.Experiment] | None = None,
) -> tuple[config_lib.Experiment, nnx.Module]:
  """Returns the experiment of a run and its model with the best weights.

  Reads data only: the configuration is plain JSON, the weights are arrays.

  Args:
    workdir: A run directory that an experiment wrote.
    kind: The experiment's class, when it is not the library's own.

  Returns:
    The experiment, and its model in evaluation mode.

  Raises:
    ValueError: If this is no run of an experiment of that kind, or has no
      checkpoint yet.
  """
  path = pathlib.Path(workdir)
  asked = run_directory.read_json(path / "run.json")
  if not isinstance(asked, dict) or not isinstance(asked.get("config"), dict):
    raise ValueError(
      f"{path} was not written by an experiment: run.json has no config. Build "
      "the model in Python and call fit with the same arguments instead."
    )
  fields = dict(asked["config"])
  made_by = fields.pop("kind", None)
  kind = _OWN.get(made_by, config_lib.Experiment) if kind is None else kind
  if made_by != kind.__name__:
    raise ValueError(
      f"{path} was written by an experiment of class {made_by}, got "
      f"{kind.__name__}; name the file that defines it (`--file FILE.py`)."
    )
  experiment = config_lib.from_json(kind, fields)
  schema = data_lib.Schema.from_json(json.dumps(asked["schema"]))
  model = experiment.build_model(schema)
  model.eval()
  _, params, rest = state_lib.split(model)
  checkpoints = Checkpoints(path / "checkpoints", read_only=True)
  try:
    step = _best_step(path, checkpoints)
    params, rest = checkpoints.restore_model(step, params, rest)
  finally:
    checkpoints.close()
  nnx.update(model, params, rest)
  return dataclasses.replace(experiment, workdir=str(workdir)), model


def tokenizer_of(workdir: str | os.PathLike) -> data_lib.Tokenizer:
  """Returns the tokenizer of a run of a language model.

  Args:
    workdir: A run directory.

  Raises:
    ValueError: If the run is not of text.
  """
  asked = run_directory.read_json(pathlib.Path(workdir) / "run.json")
  tokenizer = data_lib.Schema.from_json(json.dumps(asked["schema"])).tokenizer
  if tokenizer is None:
    raise ValueError(f"{workdir} must be a run on text, its data has none.")
  return tokenizer


def _best_step(path: pathlib.Path, checkpoints: Checkpoints) -> int:
  """Returns the step that a run's end, or its latest checkpoint, calls best."""
  if (path / "result.json").exists():
    best = run_directory.read_json(path / "result.json").get("best_step")
    if best is not None:
      return best
  return checkpoints.best()


def evaluate(
  workdir: str | os.PathLike,
  *,
  split: Literal["train", "validation", "test"] = "test",
  kind: type[config_lib.Experiment] | None = None,
  data_dir: str | None = None,
) -> dict[str, float]:
  """Returns the metrics of a run's best weights on a split.

  Args:
    workdir: A run directory that an experiment wrote.
    split: Which split.
    kind: The experiment's class, when it is not the library's own.
    data_dir: Where the data set is prepared; its own default when None.

  Raises:
    ValueError: As `load_model`.
  """
  experiment, model = load_model(workdir, kind=kind)
  data = experiment.data
  if data_dir is not None:
    data = dataclasses.replace(data, data_dir=data_dir)
  data = data.load()
  placement = Placement()
  structure, *weights = state_lib.split(model)
  params, rest = jax.device_put(weights, placement.replicated)
  chosen = getattr(data, split)
  evaluator = Evaluator(
    structure,
    StepSpec.of(data.schema, experiment.build_loss(data.schema)),
    batch_size=batch_rows(placement, model, chosen),
    placement=placement,
  )
  return evaluator.metrics(params, rest, chosen)
