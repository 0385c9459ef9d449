"""The classifier of this library, by the trainer's own step and stream.

The loop is that of `deepseek_jax.train.loop`: dispatch, and read the metrics
once an epoch. Evaluation and checkpoints, which the peers do not do here
either, are left out.
"""

import inspect

import jax
import jax.numpy as jnp
import optax
import worker
from flax import nnx

import deepseek_jax as dj
from deepseek_jax.train import losses, metrics
from deepseek_jax.train.placement import Placement
from deepseek_jax.train.session import Session
from deepseek_jax.train.step import StepSpec


def main() -> None:
  sizes, images, _ = worker.read()
  data = dj.data.load(sizes["data_set"])
  names = inspect.signature(dj.models.Classifier.__init__).parameters.keys()
  model = dj.models.Classifier(
    **{name: sizes[name] for name in names & sizes.keys()},
    rngs=nnx.Rngs(sizes["seed"]),
  )
  session = Session(
    model,
    optax.adamw(sizes["learning_rate"], weight_decay=sizes["weight_decay"]),
    data,
    StepSpec(
      loss=losses.CrossEntropy(),
      inputs=data.schema.inputs,
      target=data.schema.target,
      task="classification",
    ),
    Placement(None),
    sizes["batch_size"],
  )
  stream = session.stream(sizes["seed"], None)
  steps = dj.data.steps_per_epoch(len(images), sizes["batch_size"])
  state = session.state

  def epoch() -> float:
    nonlocal state
    for _ in range(steps):
      state = session.train_step(state, next(stream))
    seen = jax.device_get(metrics.compute(state.metrics))
    empty = jax.tree.map(jnp.zeros_like, state.metrics)
    state = state._replace(metrics=empty)
    return float(metrics.named("train", seen)["train/loss"])

  worker.serve(
    epoch,
    parameters=sum(x.size for x in jax.tree.leaves(state.params)),
    versions={"deepseek_jax": dj.__version__, "jax": jax.__version__},
  )


if __name__ == "__main__":
  main()
