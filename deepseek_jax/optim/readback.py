"""Reads from an optimizer's state the learning rate of every parameter.

A state takes part by its field names, so a transform of your own can join:

* `learning_rate`, a scalar: the rate itself (`scale_by_rate`);
* `rate_scale`, a scalar, or `rate_scales`, one number for each covered leaf in
  the order of `jax.tree.leaves`: factors on top of it;
* `scope`, made by `scope_of(params)` in `init`: which leaves they act on.

Whatever else such a state holds, as the state of a wrapped transform, is read
too; so are those of `optax.inject_hyperparams` and
`optax.contrib.reduce_on_plateau`.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.core import leaf_paths
from deepseek_jax.core.typing import Params, Path, PyTree

_REMEDY = (
  "Build the optimizer so that its state holds the rate, as in "
  "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), or end the chain "
  "with deepseek_jax.optim.scale_by_rate(1e-3); strict=False leaves out what "
  "cannot be read."
)


def learning_rates(
  opt_state: optax.OptState, params: Params, *, strict: bool = True
) -> dict[Path, jax.Array]:
  """Returns the effective learning rate of every parameter.

  This is the product of the rate and of every factor that the states record:
  schedule and warm-up, loss ratio, layer rules. It is the one that the latest
  update used; before the first update, the one that it will use.

  The factors of stateless transforms leave no trace: `optax.scale(0.5)` in the
  chain is not counted. What normalises the gradient, as Adam does, is no part
  of the rate.

  Args:
    opt_state: The state of any Optax transform, on the host or traced.
    params: The parameters that the state was made for; only their structure,
      paths and shapes are looked at.
    strict: Whether a parameter without a readable rate is an error. Otherwise
      it is left out, so that a logger can ask of any optimizer.

  Returns:
    From path to rate, float32 scalars on the device.

  Raises:
    ValueError: If `strict` and the rate of a parameter cannot be read, as with
      `optax.adam(1e-3)`, whose state does not hold it; the message says which
      and why.

  >>> from deepseek_jax import optim
  >>> tx = optim.deepseek(1e-2, layer_rules=[("head", 1.0), (".*", 0.1)])
  >>> params = {"head": jnp.zeros(2), "trunk": jnp.zeros(2)}
  >>> rates = learning_rates(tx.init(params), params)
  >>> print({path: f"{rate:.3f}" for path, rate in rates.items()})
  {'head': '0.010', 'trunk': '0.001'}
  """
  paths = leaf_paths(params)
  reading = _read(opt_state, frozenset(paths), params)
  readable = reading.rated - reading.opaque.keys()
  if strict and (missing := [path for path in paths if path not in readable]):
    reasons = sorted({reading.opaque.get(path, "no rate") for path in missing})
    raise ValueError(
      f"opt_state must hold a learning rate for every parameter, got none for "
      f"{missing} ({'; '.join(reasons)}). {_REMEDY}"
    )
  return {path: reading.factors[path] for path in paths if path in readable}


def scope_of(params: Params) -> PyTree:
  """Marks the leaves that a transform covers, at no cost in arrays.

  Under `optax.masked` and `optax.partition`, `init` sees only the covered
  leaves, and this remembers them: an empty tuple stands for each.

  Args:
    params: What `init` was given.

  Returns:
    The tree with `()` in place of every leaf.

  >>> scope_of({"kernel": 1.0, "bias": optax.MaskedNode()})
  {'bias': MaskedNode(), 'kernel': ()}
  """
  return jax.tree.map(lambda _: (), params)


class _Reading(NamedTuple):
  """What a part of the state says about the rates."""

  factors: dict[Path, jax.Array]  # the product so far; 1 where absent
  rated: frozenset[Path]  # where a learning rate is among the factors
  opaque: dict[Path, str]  # why the product cannot be trusted


def _nothing() -> _Reading:
  return _Reading({}, frozenset(), {})


def _join(a: _Reading, b: _Reading) -> _Reading:
  factors = a.factors | {
    path: a.factors[path] * factor if path in a.factors else factor
    for path, factor in b.factors.items()
  }
  return _Reading(factors, a.rated | b.rated, a.opaque | b.opaque)


def _read(
  state: Any, scope: frozenset[Path] | None, params: Params
) -> _Reading:
  """Reads one state; `scope` is None inside a mask that left no trace."""
  if isinstance(state, optax.MaskedState):
    scope = _covered(state.inner_state, params)
    return _read(state.inner_state, scope, params)
  if hasattr(state, "scope"):
    return _read_own(state, params)
  if isinstance(state, optax.contrib.ReduceLROnPlateauState):
    return _scalar(state.scale, scope, params, rated=False)
  if isinstance(state, optax.ScaleByScheduleState):
    reason = "the state of optax.scale_by_schedule holds a count only"
    return _Reading({}, frozenset(), dict.fromkeys(leaf_paths(params), reason))
  reading = _read_all(_children(state), scope, params)
  rate = getattr(state, "hyperparams", {}).get("learning_rate")
  if rate is None:
    return reading
  # What was injected is an argument of the inner transform. Where the inner
  # state records a rate, that is the one made of it (by warm-up, say).
  everywhere = frozenset(leaf_paths(params)) if scope is None else scope
  if everywhere <= reading.rated:
    return reading
  rest = None if scope is None else scope - reading.rated
  return _join(reading, _scalar(rate, rest, params, rated=True))


def _read_all(
  states: Iterable[Any], scope: frozenset[Path] | None, params: Params
) -> _Reading:
  """Reads the parts of a state and joins them."""
  readings = (_read(state, scope, params) for state in states)
  return functools.reduce(_join, readings, _nothing())


def _read_own(state: Any, params: Params) -> _Reading:
  """Reads a state that follows the convention of this module."""
  paths = leaf_paths(state.scope, is_leaf=_is_mark)
  reading = _nothing()
  for name in ("learning_rate", "rate_scale"):
    if hasattr(state, name):
      factor = jnp.asarray(getattr(state, name), jnp.float32)
      rated = frozenset(paths if name == "learning_rate" else ())
      new = _Reading(dict.fromkeys(paths, factor), rated, {})
      reading = _join(reading, new)
  if hasattr(state, "rate_scales"):
    scales = jnp.asarray(state.rate_scales, jnp.float32)
    factors = {path: scales[..., i] for i, path in enumerate(paths)}
    reading = _join(reading, _Reading(factors, frozenset(), {}))
  # A transform around another holds its state; the scope is a record of ours.
  rest = [part for part in _children(state) if part is not state.scope]
  return _join(reading, _read_all(rest, frozenset(paths), params))


def _scalar(
  value: Any, scope: frozenset[Path] | None, params: Params, rated: bool
) -> _Reading:
  """One factor for all of a scope, or doubt about all when it is unknown."""
  if scope is None:
    reason = "a mask whose inner state does not show which leaves it covers"
    return _Reading({}, frozenset(), dict.fromkeys(leaf_paths(params), reason))
  factor = jnp.asarray(value, jnp.float32)
  return _Reading(
    dict.fromkeys(scope, factor), scope if rated else frozenset(), {}
  )


def _children(state: Any) -> Iterable[Any]:
  """Returns the states inside a state; arrays and other leaves have none."""
  if isinstance(state, dict):
    return state.values()
  return state if isinstance(state, tuple | list) else ()


def _covered(state: Any, params: Params) -> frozenset[Path] | None:
  """Finds the leaves that a masked transform acts on, by a tree in its state.

  That is a `scope`, or a tree like the parameters (a momentum) with
  `MaskedNode` in place of the others.
  """
  structure = jax.tree.structure(params)
  shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
  for node in _walk(state):
    if hasattr(node, "scope"):
      return frozenset(leaf_paths(node.scope, is_leaf=_is_mark))
    leaves, treedef = jax.tree.flatten(node, is_leaf=_is_masked)
    if treedef == structure and all(
      _is_masked(leaf) or jnp.shape(leaf) == shape
      for leaf, shape in zip(leaves, shapes, strict=True)
    ):
      pairs = zip(leaf_paths(params), leaves, strict=True)
      return frozenset(path for path, leaf in pairs if not _is_masked(leaf))
  return None


def _walk(state: Any) -> Iterator[Any]:
  yield state
  for child in _children(state):
    yield from _walk(child)


def _is_mark(node: Any) -> bool:
  return type(node) is tuple and not node


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)
