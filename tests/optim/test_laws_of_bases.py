"""The laws, for the optimizers of Optax between our guard, scales and average.

The limits are those of an optimizer itself: with ours around it or not.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

import optax
import pytest
from laws import RULES, Case, Laws
from optax import contrib

from deepseek_jax import optim


@dataclasses.dataclass(frozen=True)
class Base:
  """A learning rate for the quadratic, and what an optimizer cannot do."""

  rate: float = 0.05
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  on_rosenbrock: float = 0.2
  limits: Mapping[str, str] = dataclasses.field(default_factory=dict)


def chained(factory, base):
  """An optimizer of Optax as a user would chain it with ours."""

  def make(learning_rate):
    tx = optax.chain(
      optim.zero_non_finite(),
      factory(learning_rate, **base.arguments),
      optim.scale_by_loss_ratio(0.5, decay=0.5),
      optim.scale_by_layer(RULES),
    )
    return optim.anytime_average(tx)

  return Case(
    make,
    {"learning_rate": base.rate},
    on_rosenbrock=base.on_rosenbrock,
    limits=base.limits,
    is_variant=True,
  )


TAKES_IN_ANY_LOSS = "it takes in the loss as it comes"
ANY_LOSS = {"no_bad_loss_enters_the_state": TAKES_IN_ANY_LOSS}
ABSTRACT = {
  "initialises_from_shapes_outside_of_a_trace": "its `init` reads arrays"
}
ALIASES = {
  "state_shares_no_buffer_with_the_parameters": "it keeps the parameters"
  " that it starts from, uncopied"
}
EXPLICIT = {
  "sharded_parameters_change_nothing[Explicit]": "its products do not say how"
  " they are sharded"
}
SLOW = 4e-3  # Plain descent diverges beyond.
OPTAX = {
  "adabelief": Base(),
  "adadelta": Base(1.0),
  "adafactor": Base(),
  "adagrad": Base(0.5, on_rosenbrock=1),
  "adam": Base(),
  "adamax": Base(),
  "adamaxw": Base(),
  "adamw": Base(),
  "adan": Base(),
  "amsgrad": Base(on_rosenbrock=5),
  "fromage": Base(),
  "lamb": Base(),
  "lars": Base(1.0),
  "lbfgs": Base(0.1, {"linesearch": None}, limits=ALIASES | EXPLICIT),
  "lion": Base(),
  "nadam": Base(),
  "nadamw": Base(),
  "noisy_sgd": Base(0.2, {"key": 0}, on_rosenbrock=SLOW),
  "novograd": Base(),
  "optimistic_adam_v2": Base(),
  "optimistic_gradient_descent": Base(0.1, on_rosenbrock=2 * SLOW),
  "polyak_sgd": Base(
    1.0,
    limits={
      "no_bad_loss_enters_the_state[nan]": TAKES_IN_ANY_LOSS,
      "no_bad_loss_enters_the_state[minus_inf]": TAKES_IN_ANY_LOSS,
    },
  ),
  "radam": Base(on_rosenbrock=0.05),
  "rmsprop": Base(),
  "rprop": Base(),
  "sgd": Base(0.2, {"momentum": 0.5}, on_rosenbrock=SLOW),
  "sign_sgd": Base(),
  "signum": Base(),
  "sm3": Base(0.5, on_rosenbrock=1),
  "yogi": Base(on_rosenbrock=1),
}
CONTRIB = {
  "acprop": Base(),
  "ademamix": Base(),
  "adopt": Base(on_rosenbrock=5),
  "cocob": Base(1.0, limits=ALIASES),
  "dadapt_adamw": Base(
    1.0,
    on_rosenbrock=2,
    limits=ABSTRACT
    | EXPLICIT
    | {"descends_rosenbrock": "its estimate of the rate only ever rises"},
  ),
  "dog": Base(1.0, on_rosenbrock=5, limits=ABSTRACT | ALIASES),
  "dowg": Base(1.0, on_rosenbrock=1, limits=ABSTRACT | ALIASES),
  "galore": Base(
    0.05, {"rank": 2}, on_rosenbrock=2, limits=ABSTRACT | EXPLICIT
  ),
  "madgrad": Base(limits=ALIASES),
  "momo": Base(1.0, limits=ABSTRACT | EXPLICIT | ANY_LOSS),
  "momo_adam": Base(limits=ABSTRACT | EXPLICIT | ANY_LOSS),
  "muon": Base(limits=EXPLICIT),
  "prodigy": Base(1.0, limits=ABSTRACT | ALIASES | EXPLICIT),
  "schedule_free_adamw": Base(limits=ABSTRACT),
  "schedule_free_sgd": Base(0.2, on_rosenbrock=1e-2, limits=ABSTRACT),
  "simplified_ademamix": Base(),
}
# What is not here, and why.
OTHERS = {
  "dpsgd": "takes the gradient of every example, not their mean",
  "lookahead": "keeps parameters of a type of its own",
  "optimistic_adam": "deprecated; optimistic_adam_v2 is here",
  "sam": "its update takes no loss, nor any other extra argument",
  "schedule_free": "a wrapper; schedule_free_adamw and _sgd are here",
  "sophia": "asks for the loss as a function, to estimate its Hessian",
}
WRAPPED = {
  "mechanize": lambda rate: contrib.mechanize(optax.adam(rate)),
  "reduce_on_plateau": lambda rate: optax.chain(
    optax.sgd(rate), contrib.reduce_on_plateau()
  ),
}
WRAPPERS = {
  "mechanize": Base(1.0, on_rosenbrock=1, limits=ABSTRACT | ALIASES | EXPLICIT),
  "reduce_on_plateau": Base(
    0.2, on_rosenbrock=SLOW, limits=ABSTRACT | ANY_LOSS
  ),
}
OPTAX_CASES = {n: chained(getattr(optax, n), base) for n, base in OPTAX.items()}
CONTRIB_CASES = {
  n: chained(getattr(contrib, n), base) for n, base in CONTRIB.items()
} | {n: chained(WRAPPED[n], base) for n, base in WRAPPERS.items()}


class TestOptax(Laws):
  cases = OPTAX_CASES


class TestContrib(Laws):
  cases = CONTRIB_CASES


def takes_a_rate(thing):
  return isinstance(thing, types.FunctionType | functools.partial) and (
    {"learning_rate", "max_learning_rate"}
    & inspect.signature(thing).parameters.keys()
  )


@pytest.mark.parametrize(
  ("room", "table"), [(optax, OPTAX), (contrib, CONTRIB)]
)
def test_every_optimizer_of_optax_is_in_the_table(room, table):
  found = {
    name
    for name, thing in vars(room).items()
    if takes_a_rate(thing) and not name.startswith(("scale_by", "_"))
  }
  assert found <= table.keys() | OTHERS.keys()
