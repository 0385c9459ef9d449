"""Learning rates of their own for parts of a model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

from deepseek_jax.core import (
  is_number,
  leaf_paths,
  mask_tree,
  match_rules,
  multiplier_tree,
  require_in,
  require_whole,
)
from deepseek_jax.core.typing import Path, PyTree, Rules
from deepseek_jax.optim.readback import scope_of

# "embed/embedding", "encoder/patch_embed/kernel" and "stem/0/kernel", but not
# "unembed/kernel" nor anything inside a numbered layer.
_BOTTOM = (r"(\D*[/_])?(embed|stem).*",)


class ScaleByLayerState(NamedTuple):
  """A record of multipliers for `learning_rates`; no memory."""

  rate_scales: Float32[Array, " leaves"]  # shape=(leaves,), dtype=float32
  scope: PyTree  # the covered leaves; no arrays


def scale_by_layer(
  rules: Rules[float],
) -> optax.GradientTransformationExtraArgs:
  """Multiplies the update of every parameter by the multiplier of its layer.

  u ← m(path)·u, with m from an ordered table of rules. Put it after the
  optimizer's normalisation: before Adam it would do nothing, as Adam divides
  any constant factor out again. After `optax.add_decayed_weights` it scales
  the decay as well. A multiplier of 0 gives an update of exactly 0, whatever
  the gradient is; the optimizer keeps its state for the frozen leaves all the
  same.

  Use it to fine-tune (a small multiplier for the pre-trained trunk), or for
  the rates by level that the published description asks for without saying
  how. It is no tuning knob to start with: no gain was measured on models
  trained from scratch.

  Args:
    rules: Ordered (regular expression, multiplier) pairs. A pattern must match
      the whole path of a parameter ("stages/0/kernel"); the first match
      decides. Multipliers are finite and not negative.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its state's `rate_scales` hold
    the multipliers in the order of `jax.tree.leaves`; `learning_rates` reads
    them by path.

  Raises:
    ValueError: At once if a multiplier or a pattern is no such thing; at
      `init` if a parameter is uncovered, or if a rule matches nothing or only
      what earlier rules take. The message names the paths.

  >>> tx = scale_by_layer([("head/.*", 1.0), (".*", 0.1)])
  >>> params = {"head": {"bias": jnp.ones(1)}, "trunk": {"bias": jnp.ones(1)}}
  >>> updates, _ = tx.update(params, tx.init(params))
  >>> print(updates["head"]["bias"], updates["trunk"]["bias"])
  [1.] [0.1]
  """
  rules = tuple(rules)
  multiplier_tree(rules, ())  # A tree without leaves: checks the table alone.

  return _scale_by(functools.partial(multiplier_tree, rules))


def layerwise_lr_decay(
  rate: jax.typing.ArrayLike,
  depth: jax.typing.ArrayLike,
  *,
  level: Rules[int] | Callable[[Path], int | None] | None = None,
  bottom: Sequence[str] = _BOTTOM,
) -> optax.GradientTransformationExtraArgs:
  """Lets lower layers learn more slowly, by a factor for every level.

  u ← rate^(depth - level)·u. By default the level of a parameter comes from
  its path:

  * 0 where a pattern of `bottom` matches: embeddings and stems;
  * i + 1 where a component of the path is the integer i, the first such one
    ("layers/3/attention/kernel" is on level 4);
  * `depth`, the top, for everything else: head, final norm.

  With L numbered layers, a `depth` of L + 1 gives the head a level of its own,
  and a `depth` of L lets it share that of the last layer. Numbers inside of
  names ("Dense_0", "layer1/0/conv2") can mean anything: there, say the levels
  with a table or a function.

  Use it to fine-tune a pre-trained model, whose lower layers are general
  already: 0.8 to 0.9 for transformers (the second reference), 1/2.6 for LSTMs
  (the first). From scratch there is no reason to. Put it where `scale_by_layer`
  goes: after the optimizer's normalisation.

  Args:
    rate: Multiplier from one level to the next lower one, in (0, 1]; 1 does
      nothing.
    depth: Level of the top, a whole number, at least 1.
    level: Ordered (regular expression, level) pairs that cover every
      parameter, or a function from path to level. Under
      `optax.inject_hyperparams` name a function in `static_args`, or it is
      taken for a schedule.
    bottom: Regular expressions for the whole paths of level 0, when `level`
      does not say; they may match nothing.

  Returns:
    An `optax.GradientTransformationExtraArgs` with the state of
    `scale_by_layer`.

  Raises:
    ValueError: At once if an argument is out of its range; at `init` if a
      parameter's level is below 0, above `depth` or cannot be told. The
      message names the paths.

  >>> tx = layerwise_lr_decay(0.5, depth=3)
  >>> params = {"embed": jnp.ones(1), "head": jnp.ones(1),
  ...           "layers": [jnp.ones(1), jnp.ones(1)]}
  >>> updates, _ = tx.update(params, tx.init(params))
  >>> print(updates["embed"], *updates["layers"], updates["head"])
  [0.125] [0.25] [0.5] [1.]

  References:
    Howard and Ruder, "Universal Language Model Fine-tuning for Text
    Classification", 2018, https://arxiv.org/abs/1801.06146
    Clark et al., "ELECTRA: Pre-training Text Encoders as Discriminators Rather
    Than Generators", 2020, https://arxiv.org/abs/2003.10555
  """
  _check_decay(rate, depth, level, bottom)

  def multipliers_of(tree):
    paths = leaf_paths(tree)
    levels = _levels(level, bottom, depth, tree, paths)
    _check_levels(levels, paths, depth)
    multipliers = [_power(rate, depth - value) for value in levels]
    return jax.tree.unflatten(jax.tree.structure(tree), multipliers)

  return _scale_by(multipliers_of)


def _scale_by(
  multipliers_of: Callable[[PyTree], PyTree],
) -> optax.GradientTransformationExtraArgs:
  """Multiplies by what a function of the paths says."""

  def init_fn(params):
    return _state(multipliers_of(params))

  def update_fn(updates, state, params=None, **extra_args):
    del state, params, extra_args
    # From the rules rather than from the state, so that a restored checkpoint
    # cannot bring back the multipliers of an older table.
    multipliers = multipliers_of(updates)
    updates = jax.tree.map(_scale_leaf, updates, multipliers)
    return updates, _state(multipliers)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _state(multipliers: PyTree) -> ScaleByLayerState:
  scales = jnp.asarray(jax.tree.leaves(multipliers), jnp.float32)
  return ScaleByLayerState(rate_scales=scales, scope=scope_of(multipliers))


def _scale_leaf(update: Array, multiplier: Any) -> Array:
  if is_number(multiplier):
    # A frozen layer must not move even when its gradient is NaN.
    if multiplier == 0:
      return jnp.zeros_like(update)
    if multiplier == 1:
      return update
  return (multiplier * update).astype(update.dtype)


def _power(rate: Any, exponent: Any) -> Any:
  """A Python float where both are known, a scalar on the device otherwise."""
  if is_number(rate) and is_number(exponent):
    return float(rate**exponent)
  return jnp.asarray(rate, jnp.float32) ** exponent


def _levels(level, bottom, depth, tree, paths: list[Path]) -> list[Any]:
  """Returns the level of every leaf, None where a function cannot say."""
  if callable(level):
    return [level(path) for path in paths]
  if level is not None:
    return jax.tree.leaves(match_rules(level, tree))
  lowest = match_rules(
    [(pattern, True) for pattern in bottom],
    tree,
    default=False,
    allow_unused=True,
  )
  return [
    0 if is_lowest else _numbered_level(path, depth)
    for path, is_lowest in zip(paths, jax.tree.leaves(lowest), strict=True)
  ]


def _numbered_level(path: Path, top: Any) -> Any:
  """Reads the level off the first component with a digit in it."""
  for part in path.split("/"):
    if part.isdecimal():
      return int(part) + 1
    if any(letter.isdecimal() for letter in part):
      return None
  return top


def _check_levels(levels: list[Any], paths: list[Path], depth: Any) -> None:
  pairs = list(zip(paths, levels, strict=True))
  unknown = [path for path, value in pairs if value is None]
  if unknown:
    raise ValueError(
      "level must say the level of every parameter, as a table or a function "
      f"does where names hold numbers of their own, got none for {unknown}."
    )
  known = depth if is_number(depth) else float("inf")
  wrong = {
    path: value
    for path, value in pairs
    if value is not depth
    and not (isinstance(value, int) and 0 <= value <= known)
  }
  if wrong:
    raise ValueError(
      f"a level must be a whole number from 0 to depth, got {depth=} and "
      f"{wrong}."
    )


def _check_decay(rate, depth, level, bottom) -> None:
  """Checks what is known now; injected hyperparameters are arrays."""
  require_in("(0, 1]", rate=rate)
  require_whole(1, depth=depth)
  if level is not None and tuple(bottom) != _BOTTOM:
    raise ValueError(
      "bottom must be left alone where level says it all, got "
      f"{bottom=} and {level=}."
    )
  mask_tree(bottom, ())  # A tree without leaves: checks the patterns alone.
  if level is not None and not callable(level):
    match_rules(level, ())
