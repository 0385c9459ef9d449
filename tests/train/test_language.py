"""A language model trains, is measured, comes back, and writes."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deepseek_jax as dj
from deepseek_jax import cli
from deepseek_jax.train import language, losses, metrics

EXPERIMENT = """
from deepseek_jax import train
experiment = train.LanguageExperiment(
  data=train.Text(length=32, batch_size=8, validation=0.01),
  model=train.LanguageModel(features=16, num_layers=2, num_heads=2),
  train=train.Train(epochs=None, steps=3, evaluate_every=2, tensorboard=False),
  samples=train.Samples(prompts=("", "def "), num_tokens=5),
  workdir={workdir!r},
)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
  """A run of a few steps through the command line."""
  folder = tmp_path_factory.mktemp("language")
  file = folder / "tiny.py"
  file.write_text(EXPERIMENT.format(workdir=str(folder / "run")))
  assert cli.main(["train", str(file), "--train.no-progress"]) == cli.OK
  return folder / "run"


def logits_and_targets():
  logits = jax.random.normal(jax.random.key(0), (2, 4, 5))
  return logits, jnp.array([[1, 0, 4, 2], [3, -1, -1, -1]])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_over_tokens_to_predict(smoothing):
  logits, targets = logits_and_targets()
  loss = losses.TokenCrossEntropy(label_smoothing=smoothing)
  weights = loss.weights(targets)
  assert weights.tolist() == [4, 1]
  logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
  each = [
    -(1 - smoothing) * logp[b, t, targets[b, t]] - smoothing * logp[b, t].mean()
    for b, t in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
  ]
  found = jnp.sum(weights * loss(logits, targets)) / jnp.sum(weights)
  np.testing.assert_allclose(found, np.mean(each), rtol=1e-5)


def test_a_row_without_targets_weighs_nothing_and_is_finite():
  logits, targets = logits_and_targets()
  loss = losses.TokenCrossEntropy()
  nothing = jnp.full_like(targets, -1)
  value, grad = jax.value_and_grad(lambda x: loss(x, nothing).sum())(logits)
  assert value == 0
  assert not grad.any()
  assert not loss.weights(nothing).any()


def test_label_smoothing_of_tokens_is_checked():
  with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
    losses.TokenCrossEntropy(label_smoothing=1.0)


def test_bits_per_byte_count_the_bytes_of_targets_that_are_there():
  logits, targets = logits_and_targets()
  loss, size = losses.TokenCrossEntropy(), np.array([0, 1, 2, 3, 4], np.int32)
  found = metrics.compute(
    metrics.measure(
      loss(logits, targets),
      logits,
      targets,
      weights=loss.weights(targets) * jnp.array([1.0, 0.0]),
      mask=jnp.array([1.0, 0.0]),
      task="language",
      token_bytes=size,
    )
  )
  # The second row is padding; the first predicts 1 + 0 + 4 + 2 bytes.
  nats = 4 * float(loss(logits, targets)[0])
  wanted = nats / math.log(2) / 7
  np.testing.assert_allclose(found["bits_per_byte"], wanted, rtol=1e-5)
  right = np.asarray(logits[0].argmax(-1) == targets[0]).mean()
  np.testing.assert_allclose(found["accuracy"], right)


@pytest.mark.slow
def test_a_run_leaves_bits_per_byte_and_samples(run, capsys):
  result = json.loads((run / "result.json").read_text())
  bits = result["metrics"]["test/bits_per_byte"]
  # Every token is a byte but the separators, which are few.
  nats = result["metrics"]["test/loss"]
  assert nats / math.log(2) < bits < 1.01 * nats / math.log(2)
  text = json.loads((run / "text.json").read_text())
  assert set(text["compressors"]) == {"gzip -9", "bzip2 -9", "xz -9"}
  assert [sample["prompt"] for sample in text["samples"]] == ["", "def "]
  assert not (run / "predictions.npz").exists()
  assert cli.main(["report", str(run)]) == cli.OK
  assert "gzip -9" in (run / "report.html").read_text()


@pytest.mark.slow
def test_evaluate_gives_the_same_again(run, capsys):
  assert cli.main(["evaluate", str(run)]) == cli.OK
  found = json.loads(capsys.readouterr().out)
  wanted = json.loads((run / "result.json").read_text())["metrics"]
  # Batches of another size add up in another order.
  np.testing.assert_allclose(
    found["test/bits_per_byte"], wanted["test/bits_per_byte"], rtol=1e-5
  )


@pytest.mark.slow
def test_generate_prints_the_prompt_and_what_follows(run, capsys):
  words = ["generate", str(run), "--prompt", "import ", "--num-tokens", "7"]
  assert cli.main([*words, "--temperature", "0"]) == cli.OK
  first = capsys.readouterr().out
  assert first.startswith("import ")
  assert cli.main([*words, "--temperature", "0"]) == cli.OK
  assert capsys.readouterr().out == first


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--prompt", "a\0b"], "NUL"),
    (["--temperature", "-1"], "temperature must be"),
    (["--top-p", "0"], r"top_p must be in \(0, 1\]"),
    (["--num-tokens", "0"], "num_tokens must be"),
  ],
)
@pytest.mark.slow
def test_what_cannot_be_written_is_named(run, words, message, capsys):
  assert cli.main(["generate", str(run), *words]) == cli.BAD_INPUT

  assert re.search(message, capsys.readouterr().err)


def test_pieces_of_a_sign_are_held_back_until_it_is_whole(monkeypatch):
  tokenizer = dj.data.ByteTokenizer()
  ids = np.asarray(tokenizer.encode("aé€z"))
  parts = [ids[None, i : i + 1] for i in range(len(ids))]
  monkeypatch.setattr(language.models, "stream", lambda *_, **__: iter(parts))
  model = dj.models.LanguageModel(
    256, features=8, num_layers=1, rngs=nnx.Rngs(0)
  )
  found = list(language.write(model, tokenizer, "", 9))
  assert "".join(found) == "aé€z"
  assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)


@pytest.mark.slow
def test_every_field_of_the_model_reaches_it():
  other = dj.train.LanguageModel(
    features=32, num_layers=6, num_heads=8, num_kv_heads=2, head_dim=16,
    hidden=40, activation="gelu", sparsity=0.8, attention=("dynamic", "full"),
    block_size=32, window=128, num_remote=2, tied=False, dropout=0.1, scan=True,
    remat=True, dtype="bfloat16", experts=4, top_k=1, shared_experts=1,
    balance="auxiliary", capacity_factor=1.5, microbatches=2, repeats=2,
  )  # fmt: skip
  one = dj.data.from_texts(["ab"], ["ab"], ["ab"], length=2).schema

  def structure(sizes):
    model = nnx.eval_shape(lambda: sizes.build(one, nnx.Rngs(0)))
    return [str(part) for part in nnx.split(model)]

  default = dj.train.LanguageModel()
  bases = dict.fromkeys(
    ("block_size", "window", "num_remote"),
    dataclasses.replace(default, attention=("dynamic",)),
  )
  of_experts = ("top_k", "shared_experts", "balance", "capacity_factor")
  of_scan = ("microbatches", "repeats")
  bases |= dict.fromkeys(of_scan, dataclasses.replace(default, scan=True))
  bases |= dict.fromkeys(of_experts, dataclasses.replace(default, experts=4))
  bases["sparsity"] = dataclasses.replace(
    default, activation="target_sparse_relu"
  )
  for field in dataclasses.fields(default):
    value = getattr(other, field.name)
    assert value != getattr(default, field.name), field.name
    base = bases.get(field.name, default)
    changed = dataclasses.replace(base, **{field.name: value})
    assert structure(changed) != structure(base), field.name


def test_a_scanned_model_trains_with_its_layers_whitened_one_by_one(data_dir):
  experiment = dj.train.LanguageExperiment(
    model=dj.train.LanguageModel(features=8, num_layers=2, scan=True)
  )
  schema = dj.data.from_texts(["ab"], ["ab"], ["ab"], length=2).schema
  model = experiment.build_model(schema)
  params = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))
  tx = experiment.build_optimizer(10)
  step = lambda p: tx.update(p, tx.init(p), p, value=jnp.float32(1))
  updates, state = jax.eval_shape(step, params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
  assert (2, 8, 8) in shapes  # A basis for each of the layers.
  plain = dataclasses.replace(
    experiment, model=dataclasses.replace(experiment.model, scan=False)
  )
  assert plain.build_optimizer(10) is not None
  assert plain.optimizer.stacked == ()


@pytest.mark.parametrize("scan", [False, True])
def test_experts_are_whitened_one_by_one(scan):
  experiment = dj.train.LanguageExperiment(
    model=dj.train.LanguageModel(
      features=8, hidden=6, num_layers=2, scan=scan, experts=4
    )
  )
  schema = dj.data.from_texts(["ab"], ["ab"], ["ab"], length=2).schema

  def step():
    model = experiment.build_model(schema)
    params = nnx.to_pure_dict(nnx.as_pure(nnx.state(model, nnx.Param)))
    tx = experiment.build_optimizer(10)
    return tx.update(params, tx.init(params), params, value=jnp.float32(1))

  _, state = jax.eval_shape(step)
  # Bases of eight features and of six units, for each expert of each layer.
  shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
  count = 8 if scan else 4
  assert {(count, 8, 8), (count, 6, 6)} <= shapes


@pytest.mark.slow
def test_a_damaged_text_json_is_named(run, tmp_path):
  (tmp_path / "run.json").write_text((run / "run.json").read_text())
  (tmp_path / "text.json").write_text('{"compressors": {}, "samples": [1]}')
  with pytest.raises(ValueError, match=r"text\.json must hold"):
    dj.train.write_report(tmp_path)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_of_validation_out_of_range_is_refused(share):
  with pytest.raises(ValueError, match=r"validation must be in \(0, 1\]"):
    dj.train.Text(validation=share).load()


def test_a_language_model_refuses_images():
  schema = dj.data.load("digits").schema
  with pytest.raises(ValueError, match="the language model needs text"):
    dj.train.LanguageModel().build(schema, nnx.Rngs(0))


@pytest.mark.slow  # Learns pairs of bytes.
@pytest.mark.slow
def test_another_vocabulary_in_the_same_run_is_refused(run, data_dir):
  asked = json.loads((run / "run.json").read_text())["config"]
  asked.pop("kind")
  experiment = dj.train.config.from_json(dj.train.LanguageExperiment, asked)
  data = dataclasses.replace(experiment.data, tokenizer="bpe:300")
  other = dataclasses.replace(experiment, data=data, workdir=str(run))
  with pytest.raises(ValueError, match="workdir"):
    other.run()
