import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import deepseek_jax as dj
from deepseek_jax import cli
from deepseek_jax.train import config

DIGITS = pathlib.Path(__file__).parents[2] / "experiments" / "digits.py"
# Fields of the classifier that full attention does not have.
DYNAMIC_ONLY = ("block_size", "num_remote", "window")


def test_an_experiment_survives_json():
  experiment = dj.train.Experiment(
    model=dj.train.Classifier(channels=(8, 16), dropout=0.2),
    optimizer=dj.train.Optimizer(layer_rules=((".*/bias", 2.0), (".*", 1.0))),
    train=dj.train.Train(class_weights=(1.0, 2.0), patience=3),
  )
  fields = json.loads(json.dumps(dataclasses.asdict(experiment)))
  assert config.from_json(dj.train.Experiment, fields) == experiment


def test_an_unknown_field_names_the_nearest():
  with pytest.raises(ValueError, match=r"Train has no field 'epoch'.*'epochs'"):
    config.from_json(dj.train.Experiment, {"train": {"epoch": 3}})


def test_every_field_of_the_classifier_reaches_the_model():
  other = dj.train.Classifier(
    channels=(4, 6),
    kernel_size=5,
    norm="batch",
    pool=1,
    sequence="positions",
    lstm_features=12,
    lstm_layers=2,
    bidirectional=True,
    num_heads=2,
    head_dim=3,
    attention="dynamic",
    block_size=32,
    window=128,
    num_remote=2,
    pooling="attention",
    dropout=0.3,
    activation="gelu",
    dtype="bfloat16",
  )
  default = dj.train.Classifier()
  schema = dj.data.load("digits").schema

  def structure(sizes):
    model = nnx.eval_shape(lambda: sizes.build(schema, nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return str(graphdef), str(state)

  dynamic = dataclasses.replace(default, attention="dynamic")
  full, sparse = structure(default), structure(dynamic)
  for field in dataclasses.fields(default):
    value = getattr(other, field.name)
    assert value != getattr(default, field.name), field.name
    base, want = default, full
    if field.name in DYNAMIC_ONLY:
      base, want = dynamic, sparse
    changed = dataclasses.replace(base, **{field.name: value})
    assert structure(changed) != want, field.name


@pytest.mark.parametrize("remote", [0, 2])
@pytest.mark.slow
def test_dynamic_attention_trains_by_flags_that_the_run_remembers(
  remote, tmp_path, data_dir, capsys
):
  workdir = tmp_path / "run"
  fields = {
    "model.attention": "dynamic",
    # 64 pixels are 64 steps: 16 blocks, of which a step reads at most 5.
    "model.block-size": 4,
    "model.window": 8,
    "model.num-remote": remote,
    "model.channels": 4,
    "model.pool": 1,
    "model.lstm-features": 8,
    "model.num-heads": 2,
    "optimizer.name": "adamw",
    "train.epochs": None,
    "train.steps": 3,
    "workdir": workdir,
  }
  flags = [word for k, v in fields.items() for word in (f"--{k}", str(v))]
  flags += ["--train.no-progress", "--train.no-tensorboard"]
  assert cli.main(["train", str(DIGITS), *flags]) == cli.OK
  assert "test/accuracy" in capsys.readouterr().out
  asked = json.loads((workdir / "run.json").read_text())["config"]
  experiment = config.from_json(dj.train.Experiment, {"model": asked["model"]})
  assert experiment.model.attention == "dynamic"
  schema = dj.data.load("digits").schema
  attention = experiment.build_model(schema).features.attention.attention
  assert isinstance(attention, dj.nn.DynamicAttention)
  sizes = attention.block_size, attention.window, attention.num_remote
  assert sizes == (4, 8, remote)


@pytest.mark.parametrize("field", DYNAMIC_ONLY)
def test_full_attention_refuses_what_only_dynamic_has(field):
  schema = dj.data.load("digits").schema
  classifier = dj.train.Classifier(**{field: 64})
  with pytest.raises(
    ValueError, match=f"only attention='dynamic' takes.*{field}.*'full'"
  ):
    classifier.build(schema, nnx.Rngs(0))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"block_size": 0}, "block_size must be .* at least 1, got block_size=0"),
    ({"block_size": 4, "window": 10}, "window must be a multiple of block_si"),
    ({"num_remote": -1}, "num_remote must be .* of at least 0"),
  ],
)
def test_dynamic_attention_refuses_sizes_that_do_not_fit(fields, message):
  schema = dj.data.load("digits").schema
  classifier = dj.train.Classifier(**{"attention": "dynamic"} | fields)
  with pytest.raises(ValueError, match=message):
    classifier.build(schema, nnx.Rngs(0))


def test_a_flag_of_dynamic_attention_alone_is_one_clear_line(tmp_path, capsys):
  workdir = tmp_path / "run"
  words = ["--model.window", "128", "--workdir", str(workdir)]
  assert cli.main(["train", str(DIGITS), *words]) == cli.BAD_INPUT
  errors = capsys.readouterr().err
  assert "only attention='dynamic' takes ['window']" in errors
  assert errors.count("\n") == 1
  assert not workdir.exists()


@pytest.mark.parametrize("name", ["deepseek", "adamw"])
@pytest.mark.parametrize(
  ("schedule", "last"), [("cosine", 0.0), ("constant", 1e-2)]
)
def test_the_optimizer_follows_its_schedule(name, schedule, last):
  optimizer = dj.train.Optimizer(
    name=name, learning_rate=1e-2, warmup_steps=4, schedule=schedule
  )
  tx = optimizer.build(total_steps=20)
  params = {"w": jnp.ones((2, 2))}
  state = tx.init(params)
  update = jax.jit(tx.update)
  rates = []
  for _ in range(21):
    _, state = update(params, state, params)
    rates.append(float(dj.optim.learning_rates(state, params)["w"]))
  assert rates[:4] == sorted(rates[:4])
  assert max(rates) <= 1e-2 * (1 + 1e-6)
  assert abs(rates[-1] - last) < 1e-6


def updates_of(tx, params):
  """Updates of a clear and a noisy gradient, and what is then evaluated."""
  state = tx.init(params)
  for sign in (1.0, -0.3, 0.5):
    grads = params | {"kernel": sign * params["kernel"]}
    updates, state = tx.update(grads, state, params, value=jnp.float32(sign))
    params = optax.apply_updates(params, updates)
  return updates, dj.optim.averaged_params(state, params)


@pytest.fixture
def params():
  kernel = jnp.linspace(-1.0, 2.0, 16 * 256).reshape(16, 256)
  return {"bias": jnp.arange(1.0, 4.0), "kernel": kernel}


def test_the_default_is_the_recipe(params):
  got = updates_of(dj.train.Optimizer().build(total_steps=10), params)
  chex.assert_trees_all_equal(got, updates_of(dj.optim.deepseek(), params))


def test_adamw_is_that_of_optax_with_the_decay_of_matrices_alone(params):
  optimizer = dj.train.Optimizer(
    name="adamw", learning_rate=1e-2, weight_decay=0.3
  )
  got = updates_of(optimizer.build(total_steps=10), params)
  adamw = optax.adamw(1e-2, weight_decay=0.3, mask=dj.optim.matrices)
  chex.assert_trees_all_close(got, updates_of(adamw, params), rtol=1e-5)


OTHER = {
  "learning_rate": 2e-3,
  "warmup_steps": 7,
  "schedule": "cosine",
  "weight_decay": 0.5,
  "layer_rules": ((".*", 0.5),),
  "loss_power": 1.0,
  "stacked": ((".*", 1),),
  "average": 1.0,
  "cap": 1e-3,
  "snr_power": 1.0,
  "moment_dtype": "int8",
}
RECIPE_ONLY = ("average", "cap", "moment_dtype", "snr_power")


def fields_of(name):
  default = dj.train.Optimizer(name=name)
  if name == "adamw":
    return default, [field for field in OTHER if field not in RECIPE_ONLY]
  return default, list(OTHER)


@pytest.mark.parametrize("name", ["deepseek", "adamw"])
def test_every_field_of_the_optimizer_has_an_effect(name, params):
  default, fields = fields_of(name)

  def outcome(optimizer):
    outputs = updates_of(optimizer.build(total_steps=3), params)
    return [leaf.tolist() for leaf in jax.tree.leaves(outputs)]

  want = outcome(default)
  for field in fields:
    changed = dataclasses.replace(default, **{field: OTHER[field]})
    assert outcome(changed) != want, field


def test_the_table_of_fields_is_complete():
  fields = {field.name for field in dataclasses.fields(dj.train.Optimizer)}
  assert fields == {"name", *OTHER}


@pytest.mark.parametrize("field", RECIPE_ONLY)
def test_adamw_refuses_what_only_the_recipe_has(field):
  optimizer = dj.train.Optimizer(name="adamw", **{field: OTHER[field]})
  with pytest.raises(ValueError, match=f"only 'deepseek' takes.*{field}"):
    optimizer.build(total_steps=10)


@pytest.mark.parametrize("name", ["deepseek", "adamw"])
@pytest.mark.parametrize("field", ["learning_rate", "weight_decay"])
def test_a_negative_number_is_refused(name, field):
  optimizer = dj.train.Optimizer(name=name, **{field: -0.1})
  with pytest.raises(ValueError, match=f"{field} must"):
    optimizer.build(total_steps=10)


def test_a_model_of_your_own_needs_only_build():
  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Linear:
    scale: float = 1.0

    def build(self, schema, rngs):
      size = 64
      return nnx.Sequential(
        lambda x: x.reshape(len(x), size),
        nnx.Linear(size, schema.num_classes, rngs=rngs),
      )

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Mine(dj.train.Experiment):
    model: Linear = Linear()

  model = Mine().build_model(dj.data.load("digits").schema)
  assert model(jnp.zeros((2, 8, 8, 1))).shape == (2, 10)


def test_the_classifier_refuses_data_without_images(problem):
  with pytest.raises(
    ValueError, match="needs one input, an image, and a label"
  ):
    dj.train.Classifier().build(problem.schema, nnx.Rngs(0))


def test_the_loss_of_an_experiment_is_that_of_its_settings(problem):
  settings = dj.train.Train(label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0))
  loss = dj.train.Experiment(train=settings).build_loss(problem.schema)
  assert loss == dj.train.CrossEntropy(
    label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0)
  )
