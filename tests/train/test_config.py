import dataclasses
import json

import jax.numpy as jnp
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


@pytest.mark.parametrize(
  ("schedule", "last"), [("cosine", 0.0), ("constant", 1e-2)]
)
def test_the_optimizer_follows_its_schedule(schedule, last):
  optimizer = dj.train.Optimizer(
    learning_rate=1e-2, warmup_steps=4, schedule=schedule
  )
  tx = optimizer.build(total_steps=20)
  params = {"w": jnp.ones((2, 2))}
  state = tx.init(params)
  rates = []
  for _ in range(21):
    _, state = tx.update(params, state, params)
    rates.append(float(dj.optim.learning_rates(state, params)["w"]))
  assert rates[:4] == sorted(rates[:4])
  assert max(rates) <= 1e-2 * (1 + 1e-6)
  assert abs(rates[-1] - last) < 1e-6


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
