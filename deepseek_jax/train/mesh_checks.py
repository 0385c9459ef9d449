"""Meshes that a model cannot use, told in the words of who asked for them."""

from collections.abc import Iterator, Mapping

from flax import nnx

from deepseek_jax import nn, parallel


def check_mesh(
  sizes: Mapping[str, int], model: nnx.Module, rules: parallel.Rules = ()
) -> None:
  """Refuses axes that cut nothing of a model, or cannot cut what is there.

  Rules of placement would name every array that does not fit, or leave the
  axis idle: its devices would all do the same.

  >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  >>> check_mesh({"expert": 2}, model)  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  ...
  ValueError: mesh.expert must be 1 ... Linear has none, got expert=2.

  Args:
    sizes: Of the mesh's axes; those left out are 1.
    model: Its arrays may be shapes.
    rules: The user's own; an axis that they name cuts what they say.

  Raises:
    ValueError: If the mesh has stages or an axis "expert", and the model no
      layers or experts for it, or a number that it does not divide.
  """
  named = set(_named(rules))
  modules = list(nnx.iter_modules(model))
  stages, parts = sizes.get("stage", 1), sizes.get("expert", 1)
  if stages > 1 and "stage" not in named:
    stacks = [m for _, m in modules if isinstance(m, nn.LayerStack)]
    # A pipeline of the user's own: rules cut what is called so, see there.
    own = any("layers/layers" in "/".join(map(str, p)) for p, _ in modules)
    if not (stacks or own):
      raise _idle("stage", stages, "nn.LayerStack", model)
    for stack in stacks:
      _check_layers(stack, stages)
  if parts > 1 and "expert" not in named:
    mixtures = [m for _, m in modules if isinstance(m, nn.MixtureOfExperts)]
    if not mixtures:
      raise _idle("expert", parts, "nn.MixtureOfExperts", model)
    for mixture in mixtures:
      _check_experts(mixture, parts)


def _idle(axis: str, size: int, part: str, model: nnx.Module) -> ValueError:
  return ValueError(
    f"mesh.{axis} must be 1 for a model without {part}, which the axis cuts: "
    f"{type(model).__name__} has none, got {axis}={size}."
  )


def _check_layers(stack: nn.LayerStack, stages: int) -> None:
  if not stack.scan:
    return  # It says itself that it wants to be scanned.
  period = len(stack.layers)
  parts = stages * stack.repeats * period
  if stack.num_layers % parts:
    raise ValueError(
      "num_layers must be a multiple of mesh.stage * repeats * period of the "
      f"pattern = {stages} * {stack.repeats} * {period} = {parts}, got "
      f"num_layers={stack.num_layers}."
    )


def _check_experts(mixture: nn.MixtureOfExperts, parts: int) -> None:
  if mixture.num_experts % parts:
    raise ValueError(
      f"experts must be a multiple of mesh.expert={parts}, whose devices share "
      f"them evenly, got experts={mixture.num_experts}."
    )


def _named(rules: parallel.Rules) -> Iterator[str]:
  """Yields the axes that rules name."""
  for _, placement in rules:
    if isinstance(placement, parallel.Largest):
      yield from placement.axes
      continue
    for names in getattr(placement, "spec", placement) or ():
      yield from (names,) if isinstance(names, str) else names or ()
