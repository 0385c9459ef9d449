"""Runs whose devices exchange gradients as they are told."""

import dataclasses
import math
import signal

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import deepseek_jax as dj
from deepseek_jax import parallel, train
from deepseek_jax.parallel import MeshSpec
from deepseek_jax.train.exchange import METHODS, Exchange

slow = pytest.mark.slow


class Net(nnx.Module):
  """Two layers, of which the first is large enough to be compressed."""

  def __init__(self, dropout=0.0):
    rngs = nnx.Rngs(0, dropout=1)
    self.first = nnx.Linear(8, 32, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.last = nnx.Linear(32, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(jax.nn.tanh(self.first(x))))


def dataset():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(160, 8)).astype(np.float32)
  y = (x @ rng.normal(size=(8, 3))).argmax(1)
  parts = [
    {"x": x[part], "y": y[part]} for part in (slice(96), slice(96, None))
  ]
  return dj.data.from_arrays(
    parts[0], parts[1], parts[1], inputs=("x",), target="y", num_classes=3
  )


def run(workdir, exchange, mesh=None, devices=8, build=Net, **options):
  mesh = parallel.make_mesh(mesh or MeshSpec(), jax.devices()[:devices])
  arguments = {
    "steps": 12,
    "evaluate_every": 6,
    "log_every": 3,
    "batch_size": 32,
    "tensorboard": False,
    "progress": False,
    # Too small to be cut by the library's own rules.
    "rules": [("first/kernel", jax.P(None, "fsdp"))],
  }
  return train.fit(
    build, optax.adam(1e-2), dataset(), workdir=workdir, mesh=mesh,
    exchange=exchange, **arguments | options,
  )  # fmt: skip


def run_half(monkeypatch, workdir, exchange, mesh):
  """Stops a run after 6 of 12 steps."""
  loop = train.loop.Loop
  look = loop._look

  def look_and_stop(self, step):
    look(self, step)
    if step == 6:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(loop, "_look", look_and_stop)
    cut = run(workdir, exchange, mesh)
  assert not cut.complete
  assert cut.steps == 6


def losses(result):
  return np.array([row["train/loss"] for row in result.history])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  return losses(run(tmp_path_factory.mktemp("plain"), None))


MIXED = MeshSpec(replica=2, data=2, fsdp=2)


@pytest.mark.parametrize(
  ("exchange", "mesh", "rtol"),
  [
    ("float32", None, 1e-5),
    pytest.param("float32", MIXED, 1e-5, marks=slow),
    pytest.param("float32:axes=replica", MIXED, 1e-5, marks=slow),
    pytest.param("int8:min_size=64", MIXED, 0.01, marks=slow),
    pytest.param("int8:min_size=64,axes=replica", MIXED, 0.01, marks=slow),
    pytest.param("bf16:min_size=64", None, 0.01, marks=slow),
    pytest.param("int4:min_size=64", None, 0.05, marks=slow),
    pytest.param("power_sgd:min_size=128,rank=8", None, 0.01, marks=slow),
    pytest.param("top_k:min_size=64,fraction=1", None, 1e-4, marks=slow),
    pytest.param("one_bit:min_size=64,warmup=12", None, 1e-5, marks=slow),
  ],
)
def test_losses_are_those_of_the_sum_by_xla(
  tmp_path, plain, exchange, mesh, rtol
):
  result = run(tmp_path, exchange, mesh)
  np.testing.assert_allclose(losses(result), plain, rtol=rtol)
  assert result.history[-1]["exchange/sent_bytes"] > 0


@slow
def test_meetings_are_seldom_and_bytes_few(tmp_path, plain):
  every = run(tmp_path / "every", "float32", MeshSpec(data=4), devices=4)
  seldom = run(
    tmp_path / "seldom", "diloco:period=4", MeshSpec(data=4), devices=4
  )
  assert losses(seldom)[-1] < losses(seldom)[0]
  sent = [x.history[-1]["exchange/sent_bytes"] for x in (every, seldom)]
  assert sent[1] == sent[0] / 4


@slow
@pytest.mark.parametrize(
  "exchange",
  [
    "diloco:period=3,axes=replica,compression=int8,fragments=2,overlap=true",
    "asynchronous:axes=replica,speeds=1+0.5,period=3",
    "int8:delay=1,min_size=64",
  ],
)
def test_later_exchanges_learn_beside_parts_of_parameters(tmp_path, exchange):
  result = run(tmp_path, exchange, MIXED, steps=40)
  assert losses(result)[-1] < 0.8 * losses(result)[0]


@pytest.mark.parametrize(
  ("exchange", "devices"),
  [
    ("power_sgd:min_size=64,rank=2", 4),
    ("int8:min_size=64", 2),
    ("one_bit:min_size=64,warmup=2", 2),
    ("diloco:period=2", 2),
  ],
)
@slow
def test_a_run_goes_on_on_other_numbers_of_devices(
  tmp_path, exchange, devices, monkeypatch
):
  whole = run(tmp_path / "whole", exchange, MeshSpec(data=8))
  run_half(monkeypatch, tmp_path / "cut", exchange, MeshSpec(data=8))
  few = run(tmp_path / "cut", exchange, MeshSpec(data=devices), devices=devices)
  assert few.complete
  np.testing.assert_allclose(losses(few), losses(whole), rtol=0.05)


@slow
def test_a_run_beside_parts_of_parameters_goes_on_to_the_same_bits(
  tmp_path, monkeypatch
):
  # Every part of a matrix has factors of its own.
  exchange = "power_sgd:axes=replica,min_size=64,rank=2"
  whole = run(tmp_path / "whole", exchange, MIXED)
  run_half(monkeypatch, tmp_path / "cut", exchange, MIXED)
  np.testing.assert_array_equal(
    losses(run(tmp_path / "cut", exchange, MIXED)), losses(whole)
  )


def test_a_gradient_that_is_not_finite_on_one_device_stops_no_other(tmp_path):

  class Odd(Net):
    def __call__(self, x):
      # Of few rows, and so on few devices.
      return super().__call__(x) * jax.numpy.where(x[:, :1] > 1.8, np.nan, 1.0)

  x = dataset().train[:]["x"]
  assert 0 < (x[:, 0] > 1.8).sum() < 4
  result = run(
    tmp_path, "int8:min_size=64", build=Odd, monitor="validation/loss"
  )
  assert result.history[-1]["train/skipped"] > 0
  assert np.isfinite(losses(result)).all()
  leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(result.model, nnx.Param)))
  assert all(np.isfinite(leaf).all() for leaf in leaves)


@slow
def test_devices_drop_out_differently(tmp_path):
  # Else all devices would drop the same units of their rows.
  build = lambda: Net(dropout=0.5)
  first = run(tmp_path / "one", "float32", build=build)
  again = run(tmp_path / "two", "float32", build=build)
  np.testing.assert_array_equal(losses(first), losses(again))
  alone = run(tmp_path / "three", "float32", MeshSpec(), devices=1, build=build)
  assert not np.array_equal(losses(first), losses(alone))


def test_a_text_names_method_axes_and_options():
  found = Exchange.parse("asynchronous:axes=replica,speeds=1+0.5,even=false")
  assert found.axes == ("replica",)
  assert found.options == {"speeds": (1, 0.5), "even": False}
  assert Exchange.parse("int8:delay=2").delay == 2
  assert Exchange.parse("diloco").period == 10
  assert Exchange.parse("diloco:period=7").period == 7
  for name in METHODS:
    assert Exchange.parse(name).method == name


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("int9", "exchange must be one of .*'int9'. Did you mean 'int"),
    (
      "int8:blok=3",
      "options of 'int8' are block, .*'blok'. Did you mean 'block'",
    ),
    ("int8:block", "must be NAME=VALUE, got 'block'"),
    ("int8:axes=fsdp", "among .*got 'fsdp'"),
    ("diloco:delay=1", "delay must be .*delay=1 for 'diloco'"),
    ("diloco:compression=zip", "compression must be one of .*'zip'"),
    ("int8:bits=4", "got 'bits'"),
  ],
)
def test_wrong_words_are_named(text, message):
  with pytest.raises(ValueError, match=message):
    Exchange.parse(text)


def test_wrong_values_are_refused_before_anything_is_written(tmp_path):
  with pytest.raises(ValueError, match="block must be a multiple of 2"):
    run(tmp_path / "run", "int8:block=7,min_size=64")
  assert not (tmp_path / "run").exists()


@slow
def test_a_dry_run_shows_what_the_exchange_saves():
  plans = [
    train.Plan.of(
      train.Experiment(
        model=train.Classifier(channels=(8,), lstm_features=64, num_heads=2),
        data=train.Data(batch_size=32),
        exchange=exchange,
      )
    )
    for exchange in (None, "int8:min_size=64")
  ]
  assert plans[0].exchange is None
  sent = []
  for plan in plans:
    found = dataclasses.asdict(plan.dry_run(jax.devices()))
    sent.append(sum(math.fsum(x.values()) for x in found["sent"].values()))
  assert sent[1] < 0.6 * sent[0]
