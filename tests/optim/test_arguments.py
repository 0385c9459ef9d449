"""No factory takes what is of the wrong kind: each names the argument."""

import jax.numpy as jnp
import optax
import pytest

from deepseek_jax import optim

WRONG = [
  (optim.anytime_average, {"inner": optax.sgd(0.1), "fraction": None}),
  (optim.anytime_average, {"inner": optax.sgd(0.1), "dtype": "x"}),
  (optim.cap_by_polyak, {"fraction": optax.adam(0.1)}),
  (optim.cap_by_polyak, {"lower": "0"}),
  (optim.compact_moments, {"inner": optax.adam(0.1), "dtype": jnp.int8}),
  (optim.compact_moments, {"inner": optax.adam(0.1), "block": 2.5}),
  (optim.compact_moments, {"inner": optax.adam(0.1), "min_size": True}),
  (optim.decay_weights, {"rate": None}),
  (optim.decay_weights, {"rate": 0.1, "l1": "a"}),
  (optim.layerwise_lr_decay, {"rate": 0.9, "depth": None}),
  (optim.loss_level_sgd, {"learning_rate": [0.1]}),
  (optim.loss_level_sgd, {"weight_decay": optax.sgd(0.1)}),
  (optim.scale_by_loss_ratio, {"power": "a"}),
  (optim.scale_by_loss_ratio, {"reference": "first"}),
  (optim.scale_by_microbatch_variance, {"power": None}),
  (optim.scale_by_rate, {"learning_rate": "x"}),
  (optim.scale_by_relative_snr, {"decay": None}),
  (optim.scale_by_relative_snr, {"mu_dtype": "int8"}),
  (optim.scale_by_whitening, {"every": "5"}),
  (optim.scale_by_whitening, {"steps": 5.0}),
  (optim.scale_by_whitening, {"mu_dtype": "x"}),
  (optim.variance_scaled, {"mode": "layer"}),
  (optim.warmup, {"learning_rate": 0.1, "steps": None}),
  (optim.warmup_stable_decay, {"learning_rate": 1.0, "total_steps": 10.5}),
  (
    optim.warmup_step,
    {"learning_rate": 1.0, "boundaries": [4], "warmup_steps": 2.5},
  ),
  *(
    (optim.deepseek, {name: bad})
    for name, bad in {
      "average": None,
      "average_dtype": "x",
      "b1": "a",
      "b2": None,
      "cap": True,
      "every": 0,
      "kind": "muon",
      "learning_rate": None,
      "loss_power": -1,
      "moment_dtype": "x",
      "snr_power": "a",
      "warmup_steps": 0.5,
      "weight_decay": "0.1",
    }.items()
  ),
]


@pytest.mark.parametrize(
  ("make", "arguments"),
  WRONG,
  ids=[f"{make.__name__}-{[*arguments][-1]}" for make, arguments in WRONG],
)
def test_what_is_of_the_wrong_kind_is_named(make, arguments):
  # The annotations refuse most of these first, where they are checked.
  unchecked = getattr(make, "__wrapped__", make)
  name = [*arguments][-1]
  with pytest.raises(ValueError, match=f"^{name} must be .*, got {name}="):
    unchecked(**arguments)
