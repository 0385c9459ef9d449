"""The laws, for whitening."""

import jax.numpy as jnp
import optax
from laws import Case, Laws

from deepseek_jax import optim


def before_rate(tx):
  return optax.chain(tx, optim.scale_by_rate(0.1))


def whitening(is_variant=False, tolerance=None, **arguments):
  return Case(
    optim.scale_by_whitening,
    arguments,
    static=("steps", "max_side", "mu_dtype"),
    complete=before_rate,
    tolerance=tolerance or AMPLIFIED,
    is_variant=is_variant,
  )


# Both kinds make small singular values about as large as the large ones, and
# rounding with them: a few parts in 10⁷ up to a thousandfold, of 0.2.
AMPLIFIED = {"rtol": 1e-4, "atol": 1e-4}
# A momentum that rounds to the other neighbour in bfloat16 is off by 0.4 %, and
# an entry near zero divided by its own root mean square by as much: of 0.2.
COARSE = {"rtol": 4e-3, "atol": 8e-4}
LABELS = (("stem/.*", "soap"), (".*/kernel", "newton_schulz"), (".*", "adam"))


NEWTON_SCHULZ = {
  "row": whitening(),
  "full": whitening(True, COARSE, variance="full"),
  "none": whitening(is_variant=True, variance=None),
  "bfloat16": whitening(True, COARSE, mu_dtype=jnp.bfloat16),
}


class TestNewtonSchulz(Laws):
  cases = NEWTON_SCHULZ


SOAP = {
  "soap": whitening(kind="soap"),
  "labels": whitening(is_variant=True, labels=LABELS),
  "stacked": whitening(is_variant=True, kind="soap", stacked=(("stem/.*", 2),)),
  "bfloat16": whitening(True, COARSE, kind="soap", mu_dtype=jnp.bfloat16),
}


class TestSoap(Laws):
  cases = SOAP
