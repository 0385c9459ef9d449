"""The laws, for what scales updates and for rates."""

import optax
from laws import RULES, Case, Laws

from deepseek_jax import optim


def after_sgd(tx):
  return optax.chain(optax.sgd(0.2), tx)


RATES = {
  "constant": 0.1,
  "warmup": optim.warmup(0.1, steps=3),
  "warmup_step": optim.warmup_step(0.1, 3, boundaries=[16_000]),
  "warmup_stable_decay": optim.warmup_stable_decay(0.1, 24_000, warmup_steps=3),
}
guarded_adam = optax.chain(optim.zero_non_finite(), optax.adam(0.05))
# At a rate of 0.2, times this, Rosenbrock's function does not yet diverge.
SLOW = 3e-3


def rate(name):
  arguments = {"learning_rate": RATES[name]}
  return Case(
    optim.scale_by_rate,
    arguments,
    on_rosenbrock=2 * SLOW,
    is_variant=name != "constant",
  )


def scaling(make, **arguments):
  return Case(make, arguments, complete=after_sgd, on_rosenbrock=SLOW)


SCALES = {
  **{f"rate_{name}": rate(name) for name in RATES},
  "guard": scaling(optim.zero_non_finite),
  "layer": scaling(optim.scale_by_layer, rules=RULES),
  "layerwise": scaling(optim.layerwise_lr_decay, rate=0.5, depth=2),
  "loss_initial": scaling(optim.scale_by_loss_ratio, power=0.5, decay=0.5),
  "loss_best": scaling(
    optim.scale_by_loss_ratio, power=-1.0, decay=0.5, reference="best"
  ),
  "decay": scaling(optim.decay_weights, rate=0.2, l2=1e-4, l1=1e-4),
  "freeze_nothing": scaling(optim.freeze_except, patterns=(".*",)),
  "freeze_stem": Case(
    optim.freeze_except,
    {"patterns": ("head/.*", "trunk/.*")},
    complete=after_sgd,
    on_rosenbrock=SLOW,
    frozen="stem",
  ),
  "freeze_stem_of_adam": Case(
    optim.freeze_except,
    {"patterns": ("head/.*", "trunk/.*"), "inner": guarded_adam},
    frozen="stem",
  ),
}


class TestScales(Laws):
  cases = SCALES


CLASSIC = {
  "loss_level_sgd": Case(
    optim.loss_level_sgd,
    {"learning_rate": 0.01, "weight_decay": 1e-4},
    on_rosenbrock=2e-2,
  ),
  **{
    f"variance_scaled_{mode}": Case(
      optim.variance_scaled, {"learning_rate": 0.05, "mode": mode}
    )
    for mode in ("global", "tensor", "element")
  },
}


class TestClassic(Laws):
  cases = CLASSIC
