"""The optimizers that are compared, and the settings each is tuned over.

A candidate makes an Optax transform from a setting, a dict of numbers. Settings
are traced: one compilation serves a whole grid, so a `make` may compute with
its numbers but not branch on them.
"""

import dataclasses
import importlib.util
import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Setting = Mapping[str, float]
RATES = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 6e-2)  # AdamW's.
PEER_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
OUR_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


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
    ours: whether it is of this library, for tables and figures.
  """

  make: Callable[[Setting, int], optax.GradientTransformation]
  grid: tuple[Setting, ...]
  default: Setting
  evaluate_at: Callable[[Any, Any], Any] = raw
  ours: bool = False


def by_rate(
  make: Callable[..., optax.GradientTransformation],
  rates: tuple[float, ...] = PEER_RATES,
  default: float = 1e-3,
  **options: Any,
) -> Candidate:
  """A candidate with nothing but a learning rate to tune."""
  return Candidate(
    make=lambda setting, total_steps: make(setting["rate"]),
    grid=tuple({"rate": rate} for rate in rates),
    default={"rate": default},
    **options,
  )


def ours(**options: Any) -> Candidate:
  """`optim.deepseek` with keyword arguments, at its default rate."""

  def make(rate):
    from deepseek_jax import optim

    return optim.deepseek(rate, **options)

  return by_rate(make, OUR_RATES, 1e-2, evaluate_at=averaged, ours=True)


def averaged(opt_state: Any, params: Any) -> Any:
  """The average that the state holds, or the parameters."""
  from deepseek_jax import optim

  return optim.averaged_params(opt_state, params)


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


def _muon(rate):
  """Muon as its authors use it: hidden matrices only, Adam for the rest."""
  outer = ("embed", "positions", "head", "decision")

  def dimensions(params):
    def label(path, leaf):
      words = {str(getattr(key, "key", key)) for key in path}
      if jnp.ndim(leaf) < 2 or words & set(outer):
        return None
      # Of a convolution, everything but the output channels is the input.
      return optax.contrib.MuonDimensionNumbers(
        tuple(range(jnp.ndim(leaf) - 1)), jnp.ndim(leaf) - 1
      )

    return jax.tree_util.tree_map_with_path(label, params)

  return optax.contrib.muon(
    rate, muon_weight_dimension_numbers=dimensions, consistent_rms=0.2
  )


def _plateau(rate):
  # Waits 20 steps of which none beat the best loss by 1 %, then halves.
  return optax.chain(
    optax.adamw(rate, mask=_matrices),
    optax.contrib.reduce_on_plateau(
      factor=0.5, patience=4, rtol=1e-2, accumulation_size=5
    ),
  )


def _soap(rate):
  from deepseek_jax import optim

  return optax.chain(
    optim.scale_by_whitening(kind="soap"), optax.scale_by_learning_rate(rate)
  )


def _loss_level(rate):
  from deepseek_jax import optim

  return optim.loss_level_sgd(rate)


def _variance(rate):
  from deepseek_jax import optim

  return optim.variance_scaled(rate, mode="global")


ADAMW_GRID = tuple(
  {"rate": rate, "horizon": horizon, "b2": b2, "decay": decay}
  for rate, horizon, b2, decay in itertools.product(
    RATES, (0.0, 0.5, 1.0), (0.95, 0.999), (0.0, 0.1)
  )
)

CANDIDATES = {
  "adamw": Candidate(
    make=_adamw,
    grid=ADAMW_GRID,
    default={"rate": 1e-3, "horizon": 1.0, "b2": 0.999, "decay": 0.0},
  ),
  "nadamw": by_rate(lambda rate: optax.nadamw(rate, mask=_matrices)),
  "schedule_free_adamw": by_rate(
    optax.contrib.schedule_free_adamw,
    default=2.5e-3,
    evaluate_at=optax.contrib.schedule_free_eval_params,
  ),
  "muon": by_rate(_muon, default=1e-2),
  "prodigy": by_rate(
    optax.contrib.prodigy, (0.1, 0.3, 0.5, 1.0, 2.0, 3.0), default=1.0
  ),
  "momo_adam": by_rate(optax.contrib.momo_adam, default=1e-2),
  "plateau": by_rate(_plateau, default=1e-3),
  "soap": by_rate(_soap, default=3e-3),
  "loss_level_sgd": by_rate(
    _loss_level, (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1), default=1e-2
  ),
  "variance_scaled": by_rate(_variance, default=1e-2),
  "deepseek": ours(),
}

# Name to the keyword arguments of `optim.deepseek` that take one part away.
ABLATIONS: dict[str, dict[str, Any]] = {}
CANDIDATES |= {name: ours(**options) for name, options in ABLATIONS.items()}


def find(name: str, file: pathlib.Path | None = None) -> Candidate:
  """Returns a candidate of this file, or of one that defines CANDIDATES.

  Raises:
    ValueError: neither has it.
  """
  known = CANDIDATES | (_in_file(pathlib.Path(file)) if file else {})
  if name not in known:
    raise ValueError(
      f"candidate must be one of {', '.join(sorted(known))}, got {name=}."
    )
  return known[name]


def _in_file(path: pathlib.Path) -> dict[str, Candidate]:
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.CANDIDATES
