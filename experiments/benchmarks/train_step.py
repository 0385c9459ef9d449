"""What our training loop costs beside a hand-written JAX one.

Two questions, both on this machine's CPU: what the loop's Python adds to a step
that computes almost nothing (a tiny MLP), and what the whole step costs on the
default classifier. The hand-written side is a jitted function over a dict of
arrays, donated, fed from a permutation of NumPy arrays: no masks, no metrics
but the loss, no skipping of non-finite steps, no checkpoints.

  uv run experiments/benchmarks/train_step.py
"""

import functools
import itertools
import pathlib
import runpy
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
from deepseek_jax.train.loop import take_steps
from deepseek_jax.train.monitor import Monitor
from deepseek_jax.train.placement import Placement
from deepseek_jax.train.session import Session
from deepseek_jax.train.signals import StopSignal
from deepseek_jax.train.state import split
from deepseek_jax.train.step import StepSpec

STEPS = 200
BATCH = 64


class Mlp(nnx.Module):
  """8 -> 16 -> 3: small enough that a step is mostly overhead."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(8, 16, rngs=rngs)
    self.head = nnx.Linear(16, 3, rngs=rngs)

  def __call__(self, x):
    """Returns the logits."""
    return self.head(nnx.relu(self.hidden(x)))


def plain_mlp(params, x, key):
  """The same, by hand."""
  hidden = jax.nn.relu(plain_classifier.linear(params["hidden"], x))
  return plain_classifier.linear(params["head"], hidden)


def plain_loop(
  forward: Callable,
  params: dict,
  tx: optax.GradientTransformation,
  x: np.ndarray,
  y: np.ndarray,
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
    loss = None
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
  stream = session.stream(0, None)
  root = tempfile.mkdtemp()
  quiet = Monitor(
    pathlib.Path(root), total=STEPS, done=0, progress=False, tensorboard=False
  )
  held = [session.state]

  def run() -> None:
    with StopSignal() as stop:
      held[0], _ = take_steps(
        held[0],
        session.train_step,
        stream,
        first=0,
        last=STEPS,
        stop=stop,
        advance=quiet.advance,
      )
    jax.block_until_ready(held[0].step)

  return run, weights


def small_data() -> dj.data.Dataset:
  """Returns 1,280 examples of 8 numbers and 3 classes."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(1280, 8)).astype(np.float32)
  split = {"x": x, "y": rng.integers(0, 3, len(x))}
  return dj.data.from_arrays(split, split, split, inputs=("x",), target="y")


def experiment() -> dj.train.Experiment:
  """Returns the default experiment."""
  path = pathlib.Path(__file__).parents[1] / "digits.py"
  return runpy.run_path(str(path))["experiment"]


def check_equal(model: nnx.Module, forward: Callable) -> None:
  """Raises when the two sides are not the same model."""
  images = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
  model.eval()
  ours = model(images)
  plain = forward(split(model)[1], images)
  np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def main() -> None:
  """Times both pairs and writes the result."""
  bench = harness.Benchmark("train_step", harness.flags(__doc__))
  data = small_data()
  ours, weights = our_loop(Mlp(rngs=nnx.Rngs(0)), optax.adamw(1e-3), data)
  stored = data.train[:]
  plain = plain_loop(
    plain_mlp,
    weights,
    optax.adamw(1e-3),
    stored["x"],
    stored["y"].astype(np.int32),
  )
  bench.compare(
    f"tiny MLP, {STEPS} steps", {"hand-written JAX": plain, "ours": ours}
  )

  digits = dj.data.load("digits")
  sizes = experiment().model
  model = sizes.build(digits.schema, nnx.Rngs(0))
  forward = functools.partial(
    plain_classifier.logits, heads=sizes.num_heads, rate=sizes.dropout
  )
  check_equal(model, forward)
  ours, weights = our_loop(model, optax.adamw(1e-3), digits)
  stored = digits.train[:]
  plain = plain_loop(
    lambda params, x, key: forward(params, x, key=key),
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
