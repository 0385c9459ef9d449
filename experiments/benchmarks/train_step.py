"""What our training loop costs beside a hand-written JAX one.

Two questions, both on this machine's CPU: what the loop's Python adds to a step
that computes almost nothing (a tiny MLP), and what the whole step costs on the
default classifier. The hand-written side is a jitted function over a dict of
arrays, donated, fed from a permutation of NumPy arrays: no masks, no metrics
but the loss, no skipping of non-finite steps, no checkpoints.

  uv run experiments/benchmarks/train_step.py
"""

import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_classifier
from flax import nnx

import deepseek_jax as dj
from deepseek_jax.train.placement import Placement
from deepseek_jax.train.session import Session
from deepseek_jax.train.signals import StopSignal
from deepseek_jax.train.step import StepSpec

STEPS = 200
BATCH = 64


class Mlp(nnx.Module):
  """8 -> 16 -> 3: small enough that a step is mostly overhead."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(8, 16, rngs=rngs)
    self.head = nnx.Linear(16, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.hidden(x)))


def plain_mlp(params, x, key):
  """The same, by hand."""
  hidden = jax.nn.relu(plain_classifier.linear(params["hidden"], x))
  return plain_classifier.linear(params["head"], hidden)


def plain_loop(
  forward: Callable, params: dict, tx: optax.GradientTransformation,
  x: np.ndarray, y: np.ndarray,
) -> Callable[[], None]:
  """Returns a function that runs STEPS steps the hand-written way."""

  def step(params, opt_state, key, x, y):
    def mean_loss(params):
      found = forward(params, x, key)
      return optax.softmax_cross_entropy_with_integer_labels(found, y).mean()

    loss, grads = jax.value_and_grad(mean_loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    key = jax.random.fold_in(key, 1)
    return optax.apply_updates(params, updates), opt_state, key, loss

  jitted = jax.jit(step, donate_argnums=(0, 1, 2))
  params = jax.tree.map(jnp.copy, params)
  held = [params, tx.init(params), jax.random.key(0)]

  def rows() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    while True:
      order = rng.permutation(len(x))
      for start in range(0, len(x) - BATCH + 1, BATCH):
        yield order[start : start + BATCH]

  index = rows()

  def run() -> None:
    params, opt_state, key = held
    for chosen in itertools.islice(index, STEPS):
      params, opt_state, key, loss = jitted(
        params, opt_state, key, x[chosen], y[chosen]
      )
    jax.block_until_ready(loss)
    held[:] = params, opt_state, key

  return run


def our_loop(
  model: nnx.Module, tx: optax.GradientTransformation, data: dj.data.Dataset
) -> tuple[Callable[[], None], dict]:
  """Returns a function that runs STEPS steps by our loop, and the weights."""
  session = Session(
    model, tx, data, StepSpec.of(data.schema), Placement(), BATCH
  )
  weights = jax.tree.map(jnp.copy, session.state.params)
  loop = _loop(session)

  def run() -> None:
    with StopSignal() as stop:
      loop._steps(0, stop)
    jax.block_until_ready(loop.state.step)

  return run, weights


def _loop(session: Session):
  """Returns the library's loop, with nothing to look at for STEPS steps."""
  from deepseek_jax.train.early_stopping import EarlyStopping
  from deepseek_jax.train.loop import Loop, Schedule
  from deepseek_jax.train.monitor import Monitor

  root = pathlib.Path(tempfile.mkdtemp())
  schedule = Schedule(
    total=STEPS,
    limit="steps",
    steps_per_epoch=STEPS,
    evaluate_every=STEPS,
    log_every=STEPS,
    checkpoint_seconds=1e9,
    max_skipped=10,
  )
  quiet = Monitor(root, total=STEPS, done=0, progress=False, tensorboard=False)
  return Loop(
    schedule,
    state=session.state,
    train_step=session.train_step,
    stream=session.stream(0, None),
    evaluate=None,
    learning_rates=None,
    stopping=EarlyStopping(),
    run=None,
    checkpoints=None,
    monitor=quiet,
  )


def small_data() -> dj.data.Dataset:
  """Returns 1,280 examples of 8 numbers and 3 classes."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1280, 8)).astype(np.float32)
  split = {"x": x, "y": rng.integers(0, 3, len(x))}
  return dj.data.from_arrays(split, split, split, inputs=("x",), target="y")


def main() -> None:
  """Times both pairs and writes the result."""
  bench = harness.Benchmark("train_step", harness.flags(__doc__))
  data = small_data()
  ours, weights = our_loop(Mlp(rngs=nnx.Rngs(0)), optax.adamw(1e-3), data)
  stored = data.train[:]
  plain = plain_loop(
    plain_mlp, weights, optax.adamw(1e-3), stored["x"],
    stored["y"].astype(np.int32),
  )
  bench.compare(
    f"tiny MLP, {STEPS} steps", {"hand-written JAX": plain, "ours": ours}
  )

  digits = dj.data.load("digits")
  model = dj.models.Classifier((8, 8, 1), 10, rngs=nnx.Rngs(0))
  heads, rate = model.features.attention.attention.num_heads, 0.1
  ours, weights = our_loop(model, optax.adamw(1e-3), digits)
  stored = digits.train[:]
  plain = plain_loop(
    lambda p, x, key: plain_classifier.logits(
      p, x, heads=heads, rate=rate, key=key
    ),
    weights,
    optax.adamw(1e-3),
    stored["image"].astype(np.float32) / 16,
    stored["label"].astype(np.int32),
  )
  bench.compare(
    f"digits classifier, {STEPS} steps",
    {"hand-written JAX": plain, "ours": ours},
  )
  bench.finish(seeds=[0])


if __name__ == "__main__":
  main()
