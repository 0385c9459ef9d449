import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import deepseek_jax as dj
from deepseek_jax.train import config


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

  want = structure(default)
  for field in dataclasses.fields(default):
    value = getattr(other, field.name)
    assert value != getattr(default, field.name), field.name
    changed = dataclasses.replace(default, **{field.name: value})
    assert structure(changed) != want, field.name


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
