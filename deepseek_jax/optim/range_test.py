"""Finding a learning rate by trying all of them in one short run."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float64

from deepseek_jax.core import (
  ema_value,
  init_ema,
  require_in,
  require_static,
  update_ema,
)
from deepseek_jax.core.typing import Params

_ROWS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class RangeTest:
  """What `learning_rate_range_test` saw, ready to plot; all of it is finite.

  `str` gives a short table.

  Attributes:
    rates: The learning rates tried, on a geometric grid.
    losses: The loss that followed the update with each of them.
    smoothed: The exponential average of the losses.
    suggestion: The rate at which the smoothed loss fell most steeply over the
      logarithm of the rate, on its way to the lowest; NaN where it never fell.
    largest_stable: The last rate after which the loss was as low as the
      smoothed loss ever was; where it rose without a break from an earlier
      rate on until it diverged, that one.
    diverged: Whether the loss diverged, which ended the test.
  """

  rates: Float64[np.ndarray, " steps"]
  losses: Float64[np.ndarray, " steps"]
  smoothed: Float64[np.ndarray, " steps"]
  suggestion: float
  largest_stable: float
  diverged: bool

  def __str__(self) -> str:
    """Returns ten of the rates with their losses, and the conclusions."""
    count = len(self.rates)
    rows = sorted({i * (count - 1) // (_ROWS - 1) for i in range(_ROWS)})
    lines = [f"{'rate':>9} {'loss':>10} {'smoothed':>10}"]
    lines += [
      f"{self.rates[i]:9.2e} {self.losses[i]:10.4g} {self.smoothed[i]:10.4g}"
      for i in rows
    ]
    end = "diverged" if self.diverged else "did not diverge"
    lines.append(f"suggestion {self.suggestion:.2e}")
    lines.append(f"largest stable {self.largest_stable:.2e} (loss {end})")
    return "\n".join(lines)


def learning_rate_range_test(
  make_tx: Callable[[optax.Schedule], optax.GradientTransformation],
  loss: Callable[[Params, Any], jax.Array],
  params: Params,
  batches: Iterable[Any],
  *,
  low: int | float = 1e-6,
  high: int | float = 10.0,
  steps: int = 100,
  decay: int | float = 0.8,
  divergence: int | float = 4.0,
) -> RangeTest:
  """Trains while the rate grows from low to high, and watches the loss.

  η(t) = low·(high / low)^(t / (steps - 1)). Below useful rates the loss stands
  still, then it falls, then it diverges: the test stops there. It tells the
  decade in which to look, at the cost of `steps` updates. It is no tuning: it
  sees the start of training only, and a rate that is best at the start can be
  too high for the rest. On one small classifier of digits the suggestion was
  within a factor of 2 of the best constant rate for SGD, momentum and Adam.

  Warm-up or another schedule inside `make_tx` distorts the test. So does a loss
  that reaches its minimum exactly, as without noise in the batches it may: the
  gradient is 0 there, and no rate diverges any more. Nor does any under the cap
  of `deepseek`: test `lambda rate: deepseek(rate, cap=0)`.

  Args:
    make_tx: Builds the optimizer from a learning-rate schedule, as
      `optax.adamw` does.
    loss: Takes parameters and a batch, returns a scalar; best one that is
      positive. It becomes the `value` of the optimizer as well.
    params: Where to start. They are copied and stay as they are.
    batches: Pytrees of arrays, all of the same shapes. They start again where
      they end early, which a list does and a generator does not.
    low: The first rate, positive.
    high: The last rate, above `low`.
    steps: Number of rates, at least 10.
    decay: Weight of the past in the smoothed loss, in [0, 1).
    divergence: The test ends when the smoothed loss is above this multiple of
      its lowest, or the loss is not finite; above 1.

  Returns:
    A `RangeTest`.

  Raises:
    ValueError: If an argument is out of its range, the batches run out, or the
      loss is not finite before or right after the first update.

  >>> noise = list(np.random.default_rng(0).normal(size=(101, 8)))
  >>> loss = lambda params, batch: jnp.mean((params - batch) ** 2)
  >>> test = learning_rate_range_test(optax.sgd, loss, jnp.ones(()), noise)
  >>> 0.5 < test.largest_stable < 2.0  # In theory 1.
  True

  References:
    Smith, "Cyclical Learning Rates for Training Neural Networks", 2017,
    https://arxiv.org/abs/1506.01186
  """
  require_in("(0, inf)", low=low)
  require_in(f"({low}, inf)", high=high)
  require_static(10, steps=steps)
  require_in("[0, 1)", decay=decay)
  require_in("(1, inf]", divergence=divergence)
  schedule = optax.exponential_decay(low, steps - 1, high / low)
  step, carry = _stepper(make_tx(schedule), loss, params, decay)
  # The last step only measures what the update before it did.
  batches = itertools.islice(_endless(batches), steps + 1)
  seen, diverged = _watch(step, carry, batches, divergence)
  if len(seen) < 2:
    raise ValueError(
      "loss must be finite before and after an update at the lowest rate, got "
      f"{len(seen)} finite losses at {low=}."
    )
  rates = np.geomspace(low, high, steps)
  return _read(rates, np.asarray(seen), diverged, decay)


def _stepper(tx, loss, params, decay):
  """Returns a jitted step over a carry of its own, and the first carry."""
  tx = optax.with_extra_args_support(tx)
  value_and_grad = jax.value_and_grad(loss)

  def step(carry, batch):
    params, opt_state, ema = carry
    value, grads = value_and_grad(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, value=value)
    ema = update_ema(ema, value, decay)
    params = optax.apply_updates(params, updates)
    return (params, opt_state, ema), (value, ema_value(ema))

  params = jax.tree.map(jnp.array, params)  # The copy is what is donated.
  return jax.jit(step, donate_argnums=0), (params, tx.init(params), init_ema())


def _watch(
  step, carry, batches: Iterator[Any], divergence: float
) -> tuple[list[tuple[float, float]], bool]:
  """Returns the finite losses with their averages, and whether they diverged.

  Reading the loss waits for the device at every step, in a run too short for
  that to matter.
  """
  seen, lowest = [], math.inf
  for batch in batches:
    carry, pair = step(carry, batch)
    value, mean = (float(x) for x in jax.device_get(pair))
    if not math.isfinite(value):
      return seen, True
    seen.append((value, mean))
    lowest = min(lowest, mean)
    if mean - lowest > (divergence - 1) * abs(lowest):
      return seen, True
  return seen, False


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
  while True:
    batch = None
    for batch in batches:
      yield batch
    if batch is None:
      raise ValueError(
        "batches must last for steps + 1 batches, or be iterable again as a "
        f"list is, got an end of {type(batches)=}."
      )


def _read(rates, seen, diverged: bool, decay: float) -> RangeTest:
  """Draws the conclusions; `seen` begins before the first update."""
  # A loss belongs to the update that came before it.
  losses, smoothed = seen[1:].T
  rates = rates[: len(losses)]
  lowest = int(np.argmin(smoothed))
  # The average of the first few losses is noise.
  first = min(round(1 / (1 - decay)), lowest)
  slopes = np.diff(seen[:, 1])
  steepest = first + int(np.argmin(slopes[first : lowest + 1]))
  # The average is late to turn, so that the loss itself is held against it.
  low = np.flatnonzero(losses <= smoothed[lowest])
  last = int(low[-1]) if low.size else 0
  if diverged:
    last = min(last, _rise(losses))
  return RangeTest(
    rates=rates,
    losses=losses,
    smoothed=smoothed,
    suggestion=float(rates[steepest]) if slopes[steepest] < 0 else math.nan,
    largest_stable=float(rates[last]),
    diverged=diverged,
  )


def _rise(curve: np.ndarray) -> int:
  """Returns where the last unbroken rise to the end began."""
  falls = np.flatnonzero(np.diff(curve) <= 0)
  return int(falls[-1]) + 1 if falls.size else 0
