"""What the tokens of a decoder go through by themselves."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from deepseek_jax import nn
from deepseek_jax.models.checks import check_names

_OF_THE_MODEL = (
  "features", "hidden", "num_experts", "activation", "dtype", "rngs",
)  # fmt: skip


def feed_forward(
  features: int,
  hidden: int,
  *,
  activation: str | nn.Activation,
  activation_options: Mapping[str, Any] | None,
  experts: int,
  experts_options: Mapping[str, Any] | None,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> nn.GatedFeedForward | nn.MixtureOfExperts:
  """Returns what tokens of a decoder go through: one, or one of many.

  Args:
    features: size of a token.
    hidden: units, or units of each expert.
    activation: as in `nn.GatedFeedForward`.
    activation_options: as there; only without experts.
    experts: how many to choose among; 0 for one without a choice.
    experts_options: other arguments of `nn.MixtureOfExperts`.
    dtype: of the computation.
    rngs: stream "params".

  Raises:
    ValueError: options do not go with what they are options of.
  """
  _check(experts, experts_options, activation_options)
  if experts:
    return nn.MixtureOfExperts(
      features,
      hidden,
      experts,
      activation=activation,
      dtype=dtype,
      rngs=rngs,
      **(experts_options or {}),
    )
  return nn.GatedFeedForward(
    features,
    hidden,
    activation=activation,
    activation_options=activation_options,
    dtype=dtype,
    rngs=rngs,
  )


def _check(
  experts: int,
  options: Mapping[str, Any] | None,
  activation_options: Mapping[str, Any] | None,
) -> None:
  """Raises `ValueError` for options of experts that there are not, or theirs.

  Experts have no room for the state of an activation.
  """
  if not isinstance(experts, int) or experts < 0:
    raise ValueError(
      f"experts must be an integer of at least 0, got {experts=!r}."
    )
  if options and not experts:
    raise ValueError(
      "experts_options are those of experts above 0, got "
      f"experts_options={dict(options)} with {experts=}."
    )
  if activation_options and experts:
    raise ValueError(
      "activation_options must be empty with experts, which have no room for "
      f"the state of an activation, got {activation_options=}."
    )
  for name in options or {}:
    if name in _OF_THE_MODEL:
      raise ValueError(
        f"experts_options must not have {name}, which the model gives, got "
        f"{name}={(options or {})[name]!r}."
      )
  check_names("experts_options", options, nn.MixtureOfExperts, _OF_THE_MODEL)
