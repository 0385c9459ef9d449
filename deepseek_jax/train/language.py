"""Experiments with language models: text in, bits per byte and samples out."""

import bz2
import dataclasses
import gzip
import json
import lzma
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax import data as data_lib
from deepseek_jax import models
from deepseek_jax.train import state as state_lib
from deepseek_jax.train.config import Experiment
from deepseek_jax.train.placement import on_one_device
from deepseek_jax.train.processes import of_first
from deepseek_jax.train.result import Result

TEXT_FILE = "text.json"

# Fields that are options of a part, and what they are called there.
_OF_DYNAMIC = {name: name for name in ("block_size", "window", "num_remote")}
_OF_EXPERTS = {
  "top_k": "top_k",
  "shared_experts": "num_shared",
  "balance": "balance",
  "capacity_factor": "capacity_factor",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """What text to read, and how it is cut."""

  # "python_text", or "tfds:NAME" for a TFDS data set of text.
  name: str = "python_text"
  # Rows a step.
  batch_size: int = 16
  # Tokens of a row.
  length: int = 512
  # "bytes", or "bpe:SIZE" for byte pairs learned from the training split.
  tokenizer: str = "bytes"
  # Share of the validation split that evaluations read, in (0, 1].
  validation: float = 1.0
  # Where data sets are prepared; TFDS's own default when None.
  data_dir: str | None = None

  def load(self) -> data_lib.Dataset:
    """Returns the data set, preparing it when it is not there yet.

    Raises:
      ValueError: If a field is out of its range.
    """
    if not 0 < self.validation <= 1:
      raise ValueError(f"validation must be in (0, 1], got {self.validation=}.")
    data = data_lib.load(
      self.name,
      data_dir=self.data_dir,
      length=self.length,
      tokenizer=self.tokenizer,
    )
    rows = max(1, round(len(data.validation) * self.validation))
    return dataclasses.replace(data, validation=data.validation.thinned(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModel:
  """The causal language model; see `models.LanguageModel`."""

  # Size of a token's vector.
  features: int = 128
  num_layers: int = 4
  # Heads of queries; those of keys and values divide them.
  num_heads: int = 4
  num_kv_heads: int | None = None
  # Size of a head; the features shared among the heads when None.
  head_dim: int | None = None
  # Units of the feed-forward or of each expert; 8/3 of the features when None.
  hidden: int | None = None
  # Activation of the feed-forward, as "silu" or "target_sparse_relu".
  activation: str = "silu"
  # Zeros that "target_sparse_relu" holds, in (0, 1); of it alone.
  sparsity: float | None = None
  # Feed-forwards that the tokens of a layer choose among; 0 for a single one.
  experts: int = 0
  # Experts of a token; of experts alone, their own default when None.
  top_k: int | None = None
  # Experts that every token goes through besides; likewise.
  shared_experts: int | None = None
  # What keeps them equally busy; likewise.
  balance: Literal["bias", "auxiliary", "none"] | None = None
  # Room at an expert on a mesh, in equal shares; nothing is dropped when None.
  capacity_factor: float | None = None
  # One kind, or one for each layer of a pattern that repeats.
  attention: tuple[Literal["full", "dynamic"], ...] = ("full",)
  # Keys in a block; of "dynamic" alone, its own default when None.
  block_size: int | None = None
  # Tokens of its window, a multiple of the block size; likewise.
  window: int | None = None
  # Far blocks that a token chooses; likewise.
  num_remote: int | None = None
  # Whether the head is the embedding.
  tied: bool = True
  # Fraction of outputs dropped in training, in [0, 1).
  dropout: float = 0.0
  # Whether to compile one body for all layers.
  scan: bool = False
  # Whether to recompute layers on the way back, to save memory.
  remat: bool = False
  # Of a scan: parts that the rows of a batch are taken in, a multiple of the
  # mesh's stages; four a stage where rows allow when None.
  microbatches: int | None = None
  # Of a scan: groups of layers that each stage of a pipeline holds.
  repeats: int = 1
  # Type of the computation; parameters are float32 in either.
  dtype: Literal["float32", "bfloat16"] = "float32"

  def build(self, schema: data_lib.Schema, rngs: nnx.Rngs) -> nnx.Module:
    """Returns the model for a data set of text.

    Raises:
      ValueError: If the data set is not text, or a field is out of its range.
    """
    tokenizer = _tokenizer(schema)
    arguments = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    arguments["dtype"] = jnp.dtype(self.dtype)
    if (sparsity := arguments.pop("sparsity")) is not None:
      arguments["activation_options"] = {"sparsity": sparsity}
    given = lambda names: {
      option: value
      for name, option in names.items()
      if (value := arguments.pop(name)) is not None
    }
    arguments["attention_options"] = given(_OF_DYNAMIC)
    arguments["experts_options"] = given(_OF_EXPERTS)
    return models.LanguageModel(
      tokenizer.vocab_size,
      **arguments,
      separator=tokenizer.separator,
      rngs=rngs,
    )

  @property
  def stacked(self) -> tuple[tuple[str, int], ...]:
    """Rules for the axes of parameters that count layers and experts."""
    layers = int(self.scan)
    experts = ((r"layers/.*/experts/\w+", layers + 1),) if self.experts else ()
    return experts + ((("layers/.*", 1),) if layers else ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
  """What the trained model writes into the report."""

  # Beginnings; an empty one is the beginning of a document.
  prompts: tuple[str, ...] = ("", "def ")
  # Tokens of each.
  num_tokens: int = 300
  # Divides the logits; 0 takes the likeliest token.
  temperature: float = 0.8
  # Draws from the likeliest tokens of this probability together, in (0, 1].
  top_p: float = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageExperiment(Experiment):
  """An experiment with a language model.

  Beside what every run leaves, `text.json` has what the model writes, its size,
  and what compressors make of the same test text.
  """

  data: Text = Text()  # pyrefly: ignore[bad-override]
  model: LanguageModel = LanguageModel()  # pyrefly: ignore[bad-override]
  samples: Samples = Samples()

  def build_optimizer(self, total_steps: int) -> optax.GradientTransformation:
    """Returns the transform; it knows which axes count layers or experts."""
    optimizer = self.optimizer
    if not optimizer.stacked:
      optimizer = dataclasses.replace(optimizer, stacked=self.model.stacked)
    return optimizer.build(total_steps)

  def model_flops(self, schema: data_lib.Schema) -> int | float:
    """Returns operations of a step that the model asks for.

    Six for every parameter that a token meets in a product, and as many for
    every number of a key or a value that it may read.
    """
    model: Any = nnx.eval_shape(lambda: self.build_model(schema))
    return (
      models.token_flops(model, self.data.length)
      * self.data.batch_size
      * self.data.length
    )

  def run(self) -> Result:
    """Trains as `Experiment.run`, then writes and compares text."""
    result = super().run()
    path = result.workdir / TEXT_FILE
    if result.complete and of_first(lambda: not path.exists()):
      structure, *arrays = state_lib.split(result.model)
      model = nnx.merge(structure, *on_one_device(arrays))
      of_first(lambda: self._write(path, model))
    return result

  def _write(self, path: pathlib.Path, model: nnx.Module) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(describe(self, model), indent=2))
    partial.rename(path)

  def summary(self, workdir: pathlib.Path) -> str:
    """Returns what to print at the end of a run."""
    path = workdir / TEXT_FILE
    if not path.exists():
      return ""
    found = json.loads(path.read_text())
    lines = [
      f"{name + ', bits per byte':22} {bits:.4f}"
      for name, bits in found["compressors"].items()
    ]
    size = found["parameters"]
    lines.append(f"{'parameters':22} {size:,} ({4 * size / 1e6:.1f} MB)")
    for sample in found["samples"]:
      lines += ["", "--- sample ---", sample["prompt"] + sample["text"]]
    return "\n".join(lines)


def describe(
  experiment: LanguageExperiment, model: nnx.Module
) -> dict[str, Any]:
  """Returns what goes into `text.json`."""
  data = experiment.data.load()
  tokenizer = _tokenizer(data.schema)
  targets = data.test[:][data.schema.target]
  pieces = tokenizer.pieces
  text = b"".join([pieces[i] for i in targets[targets >= 0].tolist()])
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  return {
    "compressors": compressed_bits(text),
    "test_bytes": len(text),
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "samples": [
      {"prompt": prompt, "text": text}
      for prompt, text in _samples(experiment, model, tokenizer)
    ],
  }


def compressed_bits(text: bytes) -> dict[str, float]:
  """Returns the bits that compressors at their best need for each byte.

  >>> bits = compressed_bits(b"to be or not to be" * 100)
  >>> sorted(bits), bits["gzip -9"] < 1
  (['bzip2 -9', 'gzip -9', 'xz -9'], True)
  """
  sizes = {
    "gzip -9": len(gzip.compress(text, 9)),
    "bzip2 -9": len(bz2.compress(text, 9)),
    "xz -9": len(lzma.compress(text, preset=9)),
  }
  return {name: 8 * size / len(text) for name, size in sizes.items()}


def write(
  model: models.LanguageModel,
  tokenizer: data_lib.Tokenizer,
  prompt: str,
  num_tokens: int,
  **options: Any,
) -> Iterator[str]:
  """Yields, piece by piece, the text that a model writes after a prompt.

  Args:
    model: what writes.
    tokenizer: of the text it was trained on.
    prompt: where to begin; nothing is the beginning of a document.
    num_tokens: how many to add, at most.
    **options: of `models.generate`.

  Raises:
    ValueError: If the prompt cannot be encoded, or as `models.generate`.
  """
  ids = [tokenizer.separator]
  if prompt:
    ids += tokenizer.encode(prompt).tolist()
  found: list[int] = []
  said = ""
  for part in models.stream(model, ids, num_tokens, **options):
    found += part[0].tolist()
    # A sign may end in the next part: what is certain so far is said.
    text = tokenizer.decode(found).rstrip("\N{REPLACEMENT CHARACTER}")
    yield text[len(said) :]
    said = text


def _tokenizer(schema: data_lib.Schema) -> data_lib.Tokenizer:
  if schema.task != "language" or (tokenizer := schema.tokenizer) is None:
    raise ValueError(
      "the language model needs text, got a data set with "
      f"{schema.inputs=} and {schema.target=}."
    )
  return tokenizer


def _samples(experiment, model, tokenizer) -> Iterator[tuple[str, str]]:
  chosen = experiment.samples
  for number, prompt in enumerate(chosen.prompts):
    key = jax.random.fold_in(jax.random.key(experiment.seed), number)
    parts = write(
      model, tokenizer, prompt, chosen.num_tokens, key=key,
      temperature=chosen.temperature, top_p=chosen.top_p,
    )  # fmt: skip
    yield prompt, "".join(parts)
