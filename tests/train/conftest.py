"""A small problem that trains in a second, on one device."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import deepseek_jax as dj


class Mlp(nnx.Module):
  """Dropout and batch statistics: both kinds of state beside parameters."""

  def __init__(self, features=6, classes=3, *, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(features, 16, rngs=rngs)
    self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.2, rngs=rngs)
    self.head = nnx.Linear(16, classes, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.hidden(x)))
    return self.head(self.dropout(x))


def columns(n, seed):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, 6)).astype(np.float32)
  y = np.argmax(x[:, :3] + 0.3 * rng.normal(size=(n, 3)), axis=1)
  return {"x": x, "y": y.astype(np.int64)}


@pytest.fixture(scope="session")
def problem():
  """Three classes, 150 training examples: 5 batches of 32, the last of 22."""
  return dj.data.from_arrays(
    columns(150, 0), columns(70, 1), columns(90, 2), inputs=("x",), target="y"
  )


@pytest.fixture(scope="session")
def one_device():
  return jax.make_mesh(
    (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
  )


@pytest.fixture
def make_model():
  return lambda seed=0: Mlp(rngs=nnx.Rngs(seed))


@pytest.fixture
def run(problem, one_device, make_model, tmp_path):
  """`fit` on the small problem; any argument can be replaced."""

  def call(name="run", **changes):
    arguments = {
      "model": make_model(),
      # The recipe has tests of its own, and takes longer to compile.
      "tx": optax.chain(
        optax.scale_by_adam(), dj.optim.scale_by_rate(dj.optim.warmup(2e-2, 3))
      ),
      "data": problem,
      "workdir": tmp_path / name,
      "epochs": 4,
      "batch_size": 32,
      "mesh": one_device,
      "progress": False,
      "tensorboard": False,
    } | changes
    model, tx, data = (arguments.pop(k) for k in ("model", "tx", "data"))
    return dj.train.fit(model, tx, data, **arguments)

  return call
