"""Configuration of an experiment: frozen dataclasses that read like a spec.

Each knows how to make what it describes; the thing made checks its arguments.
Library classes take plain arguments and never see a configuration.
"""

import dataclasses
import difflib
import functools
import pathlib
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax import data as data_lib
from deepseek_jax import models, optim, parallel
from deepseek_jax.train import losses
from deepseek_jax.train.fit import fit
from deepseek_jax.train.loop import total_steps
from deepseek_jax.train.result import Result

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """What to read."""

  # "digits", or "tfds:NAME" for any TFDS data set.
  name: str = "digits"
  # Examples a step.
  batch_size: int = 64
  # Where data sets are prepared; TFDS's own default when None.
  data_dir: str | None = None

  def load(self) -> data_lib.Dataset:
    """Returns the data set, preparing it when it is not there yet."""
    return data_lib.load(self.name, data_dir=self.data_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
  """The CNN -> LSTM -> attention classifier; see `models.Classifier`."""

  # Output channels of each convolution stage.
  channels: tuple[int, ...] = (32, 64)
  # Side of the convolution kernels, in pixels.
  kernel_size: int = 3
  # Normalization after every convolution.
  norm: Literal["layer", "batch"] | None = None
  # Side of the pooling windows, in pixels; 1 for none.
  pool: int = 2
  # Whether a row or a pixel of the pooled image is a token.
  sequence: Literal["rows", "positions"] = "rows"
  # State size of the LSTM, in each direction.
  lstm_features: int = 64
  lstm_layers: int = 1
  bidirectional: bool = False
  # Attention heads.
  num_heads: int = 4
  # Size of a head; the LSTM's output shared among the heads when None.
  head_dim: int | None = None
  # How steps read each other: "dynamic" is for long sequences, where each step
  # reads its window and the far blocks that hashing finds.
  attention: Literal["full", "dynamic"] = "full"
  # Keys in a block; of "dynamic" alone, its own default when None.
  block_size: int | None = None
  # Steps of its window, a multiple of the block size; likewise.
  window: int | None = None
  # Far blocks that a step chooses; likewise.
  num_remote: int | None = None
  # How steps become one vector.
  pooling: Literal["last", "mean", "max", "attention"] = "last"
  # Fraction of outputs dropped in training, in [0, 1).
  dropout: float = 0.1
  # Activation of the convolutions.
  activation: str = "relu"
  # Type of the computation; parameters are float32 in either.
  dtype: Literal["float32", "bfloat16"] = "float32"

  def build(self, schema: data_lib.Schema, rngs: nnx.Rngs) -> nnx.Module:
    """Returns the model for a data set of images.

    Raises:
      ValueError: If the data set is not images with labels, a field is out of
        its range, or full attention does not have it.
    """
    shapes = [s for s in schema.input_shapes.values() if len(s) == 3]
    if len(shapes) != 1 or schema.num_classes is None:
      raise ValueError(
        "the classifier needs one input, an image, and a label, got "
        f"{schema.inputs=} and {schema.target=}."
      )
    arguments = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    arguments["dtype"] = jnp.dtype(self.dtype)
    options = {
      name: value
      for name in ("block_size", "window", "num_remote")
      if (value := arguments.pop(name)) is not None
    }
    if options and self.attention != "dynamic":
      raise ValueError(
        f"only attention='dynamic' takes {sorted(options)}, got {options} with "
        f"{self.attention=}."
      )
    arguments["attention_options"] = options
    return models.Classifier(
      shapes[0], schema.num_classes, **arguments, rngs=rngs
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """The recipe `optim.deepseek`, or AdamW; either's rates can be read."""

  name: Literal["deepseek", "adamw"] = "deepseek"
  # Learning rate after warm-up.
  learning_rate: float = 1e-2
  # Steps over which the rate rises linearly.
  warmup_steps: int = 0
  # What the rate does after warm-up: stays, as the average asks for, or falls
  # to 0 along a cosine.
  schedule: Literal["constant", "cosine"] = "constant"
  # Decoupled decay of matrices, per unit of learning rate.
  weight_decay: float = 0.1
  # Ordered (path pattern, multiplier) pairs; empty for one rate.
  layer_rules: tuple[tuple[str, float], ...] = ()
  # Exponent of the loss-adaptive scale; 0 turns it off.
  loss_power: float = 0.0
  # (path pattern, axes) of parameters that are stacks, such as scanned layers.
  stacked: tuple[tuple[str, int], ...] = ()
  # Of "deepseek" alone, its own default when None: width of the average that is
  # evaluated and saved, as a fraction of the run so far; 0 turns it off.
  average: float | None = None
  # The same: share of the loss that a step may promise; 0 turns it off.
  cap: float | None = None
  # The same: exponent of the variance-adaptive scale; 0 turns it off.
  snr_power: float | None = None
  # The same: how moments are stored; as the parameters when None.
  moment_dtype: Literal["bfloat16", "int8"] | None = None

  def build(self, total_steps: int) -> optax.GradientTransformation:
    """Returns the transform for a run of so many steps.

    Raises:
      ValueError: If a field is out of its range, or AdamW does not have it.
    """
    rate: float | optax.Schedule = self.learning_rate
    if self.schedule == "cosine":
      rate = optax.cosine_decay_schedule(self.learning_rate, total_steps)
    own = {
      name: value
      for name in ("average", "cap", "snr_power", "moment_dtype")
      if (value := getattr(self, name)) is not None
    }
    if self.name == "adamw":
      if own:
        raise ValueError(f"only 'deepseek' takes {sorted(own)}, got {own}.")
      return self._adamw(rate)
    return optim.deepseek(
      rate,
      warmup_steps=self.warmup_steps,
      weight_decay=self.weight_decay,
      layer_rules=self.layer_rules or None,
      stacked=self.stacked,
      loss_power=self.loss_power,
      **own,
    )

  def _adamw(
    self, rate: float | optax.Schedule
  ) -> optax.GradientTransformationExtraArgs:
    # `optax.adamw` takes the same steps, but its state does not hold the rate.
    if not self.weight_decay >= 0:
      raise ValueError(
        f"weight_decay must not be negative, got {self.weight_decay=}."
      )
    parts = [optim.zero_non_finite(), optax.scale_by_adam()]
    if self.weight_decay:
      mask = functools.partial(optim.matrices, stacked=self.stacked)
      parts.append(optax.add_decayed_weights(self.weight_decay, mask))
    if self.layer_rules:
      parts.append(optim.scale_by_layer(self.layer_rules))
    if self.loss_power:
      parts.append(optim.scale_by_loss_ratio(self.loss_power))
    rate = optim.warmup(rate, self.warmup_steps)
    return optax.chain(*parts, optim.scale_by_rate(rate))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
  """How long to train and what to watch; fields as in `train.fit`."""

  # Passes over the training split.
  epochs: int | float | None = 40
  # Optimizer steps; whichever of both comes first ends the run.
  steps: int | None = None
  # Micro-batches a step is cut into.
  accumulate: int = 1
  # Probability mass spread over all classes, in [0, 1).
  label_smoothing: float = 0.0
  # One weight a class.
  class_weights: tuple[float, ...] | None = None
  l1: float = 0.0
  l2: float = 0.0
  # Global norm to which gradients are clipped.
  clip_norm: float | None = None
  # Metric that decides which weights are best.
  monitor: str = "validation/loss"
  # Evaluations without improvement that end the run.
  patience: int | None = None
  # What counts as an improvement.
  min_delta: float = 0.0
  # Steps between evaluations; an epoch when None.
  evaluate_every: int | None = None
  # Steps between log lines.
  log_every: int = 50
  # Seconds between checkpoints, beside those of the best evaluations.
  checkpoint_seconds: int | float = 30.0
  # Non-finite steps in a row that end the run.
  max_skipped: int = 10
  # Seconds without a step that end a run of several processes.
  watchdog_seconds: int | float = 600.0
  # Whether to show a progress bar or lines.
  progress: bool = True
  # Whether to write TensorBoard events.
  tensorboard: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """An experiment: data, model, optimizer and training.

  Subclass it with a field of your own type to train another model: anything
  with `build(schema, rngs)` serves as `model`, anything with
  `build(total_steps)` as `optimizer`.
  """

  data: Data = Data()
  model: Classifier = Classifier()
  optimizer: Optimizer = Optimizer()
  train: Train = Train()
  # How devices share the work; all of them along "data" by default.
  mesh: parallel.MeshSpec = dataclasses.field(default_factory=parallel.MeshSpec)
  # How devices average gradients over slow links, such as "int8" or
  # "diloco:period=50,compression=int8"; XLA sums them when None.
  exchange: str | None = None
  # Seed of the initial weights, of dropout and of the order of examples.
  seed: int = 0
  # Run directory.
  workdir: str = "runs/experiment"

  def build_model(self, schema: data_lib.Schema) -> nnx.Module:
    """Returns the model with its initial weights."""
    return self.model.build(schema, nnx.Rngs(self.seed))

  def build_optimizer(self, total_steps: int) -> optax.GradientTransformation:
    """Returns the transform for a run of so many steps."""
    return self.optimizer.build(total_steps)

  def build_loss(self, schema: data_lib.Schema) -> losses.Loss:
    """Returns the loss for labels, for tokens, or for numbers."""
    smoothing = self.train.label_smoothing
    if schema.task == "language":
      return losses.TokenCrossEntropy(label_smoothing=smoothing)
    if schema.task == "regression":
      return losses.MeanSquaredError()
    return losses.CrossEntropy(
      label_smoothing=smoothing,
      class_weights=self.train.class_weights,
    )

  def total_steps(self, data: data_lib.Dataset) -> int:
    """Returns how many steps the whole run has."""
    per_epoch = data_lib.steps_per_epoch(len(data.train), self.data.batch_size)
    return total_steps(self.train.epochs, self.train.steps, per_epoch)[0]

  def model_flops(self, schema: data_lib.Schema) -> int | float | None:
    """Returns operations of a step that the model asks for, None if unknown."""
    del schema

  def run(self) -> Result:
    """Trains, or goes on with what is in `workdir`.

    Raises:
      ValueError: As `train.fit`.
    """
    data = self.data.load()
    options = {
      field.name: getattr(self.train, field.name)
      for field in dataclasses.fields(self.train)
    }
    for name in ("label_smoothing", "class_weights"):
      del options[name]  # Parts of the loss.
    return fit(
      functools.partial(self.build_model, data.schema),
      self.build_optimizer(self.total_steps(data)),
      data,
      workdir=self.workdir,
      mesh=self.mesh,
      exchange=self.exchange,
      batch_size=self.data.batch_size,
      seed=self.seed,
      loss=self.build_loss(data.schema),
      config=_identity(self),
      **options,
    )

  def summary(self, workdir: pathlib.Path) -> str:
    """Returns what else to print at the end of a run, lines of text."""
    del workdir
    return ""


# Fields that may differ between two starts of one run.
_FREE = {
  "workdir": None,
  "mesh": None,
  "samples": None,
  "data": ("data_dir",),
  "train": (
    "checkpoint_seconds",
    "watchdog_seconds",
    "progress",
    "tensorboard",
  ),
}


def _identity(experiment: Experiment) -> dict[str, Any]:
  """Returns the fields that decide a run's numbers, as plain JSON."""
  fields: dict[str, Any] = dataclasses.asdict(experiment)
  fields["kind"] = type(experiment).__name__
  for name, free in _FREE.items():
    if free is None:
      fields.pop(name, None)
    else:
      fields[name] = {k: v for k, v in fields[name].items() if k not in free}
  return fields


def from_json(kind: type[T], fields: Mapping[str, Any]) -> T:
  """Returns a configuration from plain JSON; nothing in it is executed.

  Args:
    kind: A dataclass of configurations; missing fields keep their defaults.
    fields: As `dataclasses.asdict` gives.

  Raises:
    ValueError: If a field is unknown; names the nearest.
  """
  types = typing.get_type_hints(kind)
  arguments = {}
  for name, value in fields.items():
    if name not in types:
      near = difflib.get_close_matches(name, types, n=1, cutoff=0.0)
      raise ValueError(
        f"{kind.__name__} has no field {name!r}, the nearest is {near[0]!r}."
      )
    if dataclasses.is_dataclass(types[name]):
      value = from_json(types[name], value)
    elif isinstance(value, list):
      value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
    arguments[name] = value
  return kind(**arguments)
