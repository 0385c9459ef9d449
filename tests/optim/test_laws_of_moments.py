"""The laws, for what wraps optimizers or keeps moments of its own."""

import jax
import jax.numpy as jnp
import optax
from laws import Case, Laws

from deepseek_jax import optim


def before_rate(tx):
  return optax.chain(tx, optim.scale_by_rate(0.2))


def guarded_adam(rate=0.05):
  return optax.chain(optim.zero_non_finite(), optax.adam(rate))


def of_three_microbatches(power, inner=None):
  """Takes one gradient and hands on three: it, more of it, and against it."""
  tx = optim.scale_by_microbatch_variance(inner, power=power)

  def update_fn(updates, state, params=None, **extra_args):
    stack = lambda grad: jnp.stack([grad, 1.5 * grad, -0.2 * grad])
    updates = jax.tree.map(stack, updates)
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update_fn)


ADAM_MOMENTS = optax.chain(optim.zero_non_finite(), optax.scale_by_adam())


NOISE = {
  "snr": Case(
    optim.scale_by_relative_snr, complete=before_rate, on_rosenbrock=3e-3
  ),
  "snr_bfloat16": Case(
    optim.scale_by_relative_snr,
    {"mu_dtype": jnp.bfloat16},
    static=("mu_dtype",),
    is_variant=True,
    complete=before_rate,
    on_rosenbrock=3e-3,
  ),
  "snr_of_adam": Case(
    optim.scale_by_relative_snr, {"inner": ADAM_MOMENTS}, complete=before_rate
  ),
  "microbatches": Case(
    of_three_microbatches,
    {"power": 0.5},
    complete=before_rate,
    on_rosenbrock=3e-3,
  ),
  "microbatches_of_adam": Case(
    of_three_microbatches,
    {"power": 0.5, "inner": guarded_adam()},
    is_variant=True,
  ),
}


class TestNoise(Laws):
  cases = NOISE


def average(is_variant=False, **arguments):
  return Case(
    optim.anytime_average,
    {"inner": guarded_adam()} | arguments,
    static=("dtype",),
    is_variant=is_variant,
  )


def compact(dtype, inner=ADAM_MOMENTS):
  return Case(
    optim.compact_moments,
    {"inner": inner, "dtype": dtype, "min_size": 1},
    static=("dtype", "block", "min_size"),
    complete=before_rate,
    is_variant=dtype != "int8",
  )


WRAPPERS = {
  "polyak_adam": Case(optim.cap_by_polyak, {"inner": guarded_adam()}),
  "polyak_sgd": Case(
    optim.cap_by_polyak,
    {"inner": optax.chain(optim.zero_non_finite(), optax.sgd(0.2))},
    on_rosenbrock=3e-3,
    is_variant=True,
  ),
  "average": average(),
  "average_bfloat16": average(is_variant=True, dtype=jnp.bfloat16),
  "compact_bfloat16": compact("bfloat16"),
  "compact_int8": compact("int8"),
}


class TestWrappers(Laws):
  cases = WRAPPERS
