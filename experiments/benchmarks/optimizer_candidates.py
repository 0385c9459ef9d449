"""The optimizers that are compared, and the settings each is tuned over.

A candidate makes an Optax transform from a setting, a dict of numbers. Settings
are traced: one compilation serves a whole grid, so a `make` may compute with
its numbers but not branch on them.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import workloads

Setting = Mapping[str, float]
RATES = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 6e-2)  # AdamW's.
PEER_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
OUR_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
DECAYS = (0.0, 0.1)


def raw(opt_state: Any, params: Any) -> Any:
  """Validation with the parameters that the gradient is taken at."""
  del opt_state
  return params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """One way to train.

  Attributes:
    make: (setting, total_steps) to a transform.
    grid: what it is tuned over.
    default: the setting that takes no tuning.
    evaluate_at: (opt_state, params) to the parameters validated.
    tuned: whether tables show its best setting for each target, or always the
      default.
  """

  make: Callable[[Setting, int], optax.GradientTransformation]
  grid: tuple[Setting, ...]
  default: Setting
  evaluate_at: Callable[[Any, Any], Any] = raw
  tuned: bool = True


def by_rate(
  make: Callable[..., optax.GradientTransformation],
  rates: Sequence[float] = PEER_RATES,
  default: float = 1e-3,
  decays: Sequence[float] = (),
  **options: Any,
) -> Candidate:
  """A candidate whose rate is tuned and, if `decays` are given, its decay.

  Args:
    make: (rate) or (rate, weight_decay=decay) to a transform.
    rates: of the grid.
    default: rate.
    decays: of the grid; the first is the default.
    **options: other fields.
  """

  def build(setting, total_steps):
    del total_steps
    if "decay" not in setting:
      return make(setting["rate"])
    return make(setting["rate"], weight_decay=setting["decay"])

  grid: list[Setting] = [{"rate": rate} for rate in rates]
  first: Setting = {"rate": default}
  if decays:
    grid = [{**s, "decay": decay} for s in grid for decay in decays]
    first = {**first, "decay": decays[0]}
  return Candidate(make=build, grid=tuple(grid), default=first, **options)


def ours(default: float = 1e-2, **options: Any) -> Candidate:
  """`optim.deepseek` with keyword arguments, scored at one rate."""

  def make(rate):
    from deepseek_jax import optim

    return optim.deepseek(rate, **options)

  return by_rate(make, OUR_RATES, default, evaluate_at=averaged, tuned=False)


def averaged(opt_state: Any, params: Any) -> Any:
  """The average that the state holds, or the parameters."""
  from deepseek_jax.optim.averaging import averaged_params

  return averaged_params(opt_state, params)


def _matrices(params):
  return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)


def cosine(rate: Any, steps: Any) -> optax.Schedule:
  """Cosine to zero at `steps`; constant where `steps` is 0."""

  def schedule(count):
    share = jnp.minimum(count / jnp.maximum(steps, 1.0), 1.0)
    decayed = 0.5 * (1 + jnp.cos(jnp.pi * share))
    return rate * jnp.where(steps > 0, decayed, 1.0)

  return schedule


def _adamw(setting, total_steps):
  return optax.adamw(
    cosine(setting["rate"], setting["horizon"] * total_steps),
    b2=setting["b2"],
    weight_decay=setting["decay"],
    mask=_matrices,
  )


def _nadamw(rate, weight_decay):
  return optax.nadamw(rate, weight_decay=weight_decay, mask=_matrices)


def _muon(rate, weight_decay):
  """Muon as its authors use it: hidden matrices only, Adam for the rest."""
  return optax.contrib.muon(
    rate,
    weight_decay=weight_decay,
    muon_weight_dimension_numbers=_hidden_matrices,
    consistent_rms=0.2,  # With Adam's rate for both.
  )


def _hidden_matrices(params):
  outer = {"embed", "positions", "head", "decision"}

  def dimensions(path, leaf):
    if jnp.ndim(leaf) < 2 or outer & {str(key.key) for key in path}:
      return None
    # Of a convolution, everything but the output channels is the input.
    last = jnp.ndim(leaf) - 1
    return optax.contrib.MuonDimensionNumbers(tuple(range(last)), last)

  return jax.tree_util.tree_map_with_path(dimensions, params)


def _plateau(rate, weight_decay):
  # Halves when of 25 steps, averaged by fives, none beat the best by 1 %.
  return optax.chain(
    optax.adamw(rate, weight_decay=weight_decay, mask=_matrices),
    optax.contrib.reduce_on_plateau(
      factor=0.5, patience=5, rtol=1e-2, accumulation_size=5
    ),
  )


def _soap(rate, weight_decay):
  from deepseek_jax.optim.whitening import scale_by_whitening

  return optax.chain(
    scale_by_whitening(kind="soap"),
    optax.add_decayed_weights(weight_decay, _matrices),
    optax.scale_by_learning_rate(rate),
  )


def _loss_level(rate):
  from deepseek_jax.optim.classic import loss_level_sgd

  return loss_level_sgd(rate)


def _variance(rate):
  from deepseek_jax.optim.classic import variance_scaled

  return variance_scaled(rate, mode="global")


CANDIDATES = {
  "adamw": Candidate(
    make=_adamw,
    grid=tuple(
      {"rate": rate, "horizon": horizon, "b2": b2, "decay": decay}
      for rate in RATES
      for horizon in (0.0, 0.5, 1.0)
      for b2 in (0.95, 0.999)
      for decay in DECAYS
    ),
    default={"rate": 1e-3, "horizon": 1.0, "b2": 0.999, "decay": 0.0},
  ),
  "nadamw": by_rate(_nadamw, decays=DECAYS),
  "schedule_free_adamw": by_rate(
    optax.contrib.schedule_free_adamw,
    default=2.5e-3,
    decays=DECAYS,
    evaluate_at=optax.contrib.schedule_free_eval_params,
  ),
  "muon": by_rate(_muon, default=1e-2, decays=DECAYS),
  "prodigy": by_rate(
    optax.contrib.prodigy, (0.1, 0.3, 1.0, 3.0, 10.0), 1.0, decays=DECAYS
  ),
  "momo_adam": by_rate(optax.contrib.momo_adam, default=1e-2, decays=DECAYS),
  "plateau": by_rate(_plateau, decays=DECAYS),
  "soap": by_rate(_soap, default=3e-3, decays=DECAYS),
  "loss_level_sgd": by_rate(
    _loss_level, (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1), default=1e-2
  ),
  "variance_scaled": by_rate(
    _variance, (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), default=1e-2
  ),
  "deepseek": ours(),
}

# Name to the arguments of `ours` that take one part away, or test another.
ABLATIONS: dict[str, dict[str, Any]] = {
  "without whitening": {"labels": ((".*", "adam"),)},
  "without average": {"average": 0.0},
  "without cap": {"cap": 0.0},
  "without decay": {"weight_decay": 0.0},
  "newton_schulz": {"kind": "newton_schulz"},
  "with snr": {"snr_power": 0.5},
  "with loss ratio": {"loss_power": 0.5},
  "int8 moments": {"moment_dtype": "int8"},
  "30 x the rate": {"default": 0.3},
  "30 x the rate, no cap": {"default": 0.3, "cap": 0.0},
}
CANDIDATES |= {name: ours(**options) for name, options in ABLATIONS.items()}


def find(name: str, file: pathlib.Path | None = None) -> Candidate:
  """Returns a candidate of this file, or of one that defines CANDIDATES.

  Raises:
    ValueError: neither has it.
  """
  found = known(file)
  if name not in found:
    raise ValueError(
      f"candidate must be one of {', '.join(sorted(found))}, got {name=}."
    )
  return found[name]


def known(file: pathlib.Path | None = None) -> dict[str, Candidate]:
  """All candidates by name, those of a further file included."""
  return CANDIDATES | (workloads.imported(file).CANDIDATES if file else {})
