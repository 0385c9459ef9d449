"""Rules that say how every array of a model lies over a mesh.

A rule is a pair (regular expression, placement). As everywhere in this library
the whole path must match, and the first rule that matches decides. A placement
is one of

* `PartitionSpec`: must hold. It names the dimensions from the first on, and an
  array that it does not fit is an error, as is a rule that decides nothing.
* `Preferred(spec)`: holds where it fits, for tables that many models share.
* `Largest(axes)`: cuts large arrays along their largest dimension, whatever
  they are.

In a stack of layers, `layers/layers/<i>/...`, placements speak of one layer:
specs are aligned to the last dimensions, and what is left over in front is the
axis of the layers, which is cut over "stage".
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.core import tree as tree_lib
from deepseek_jax.core.typing import Path, PyTree
from deepseek_jax.parallel import fitting
from deepseek_jax.parallel.fitting import Dims
from deepseek_jax.parallel.mesh import AXES

_STACK = re.compile(r"(.*/)?layers/layers/\d+/.*")


@dataclasses.dataclass(frozen=True)
class Preferred:
  """A spec for models of any size.

  An axis that does not divide its dimension leaves it whole in arrays below
  `FSDP_MIN_SIZE` elements. In larger ones "fsdp", which is only about where
  things are kept, cuts another dimension, and the other axes are errors: a
  model that is to be cut in so many parts should have sizes that divide.

  Attributes:
    spec: Axes of the dimensions.
  """

  spec: PartitionSpec


@dataclasses.dataclass(frozen=True)
class Largest:
  """Cuts arrays of at least `FSDP_MIN_SIZE` elements, whatever they are.

  Every axis cuts the dimension with the longest parts that it divides; an array
  without any stays whole.

  Attributes:
    axes: Axes to cut over.
  """

  axes: tuple[str, ...] = ("fsdp",)


Placement = PartitionSpec | Preferred | Largest
Rules = Sequence[tuple[str, Any]]
"""Ordered (regular expression, placement) pairs."""


def merge(user_rules: Rules, table: Rules) -> Rules:
  """Returns one table in which the user's rules come first, and so decide.

  >>> from deepseek_jax.parallel import DEFAULT
  >>> [pattern for pattern, _ in merge([("head/.*", PartitionSpec())], DEFAULT)]
  ['head/.*', '.*']

  Args:
    user_rules: Rules for this model.
    table: Rules for all that they leave.
  """
  return (*user_rules, *table)


def specs(tree: PyTree, rules: Rules, mesh: Mesh | AbstractMesh) -> PyTree:
  """Returns for every leaf how it lies over the mesh.

  Axes of a single device are left out of the result, so that on one device
  every array is simply whole.

  >>> import jax.numpy as jnp
  >>> mesh = AbstractMesh((4, 2), ("fsdp", "tensor"))
  >>> rules = [("head/kernel", PartitionSpec("fsdp", "tensor")),
  ...          (".*/bias", PartitionSpec())]
  >>> tree = {"head": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}}
  >>> tuple(specs(tree, rules, mesh)["head"]["kernel"])
  ('fsdp', 'tensor')

  Args:
    tree: Arrays, or `jax.ShapeDtypeStruct`s.
    rules: Ordered (regular expression, placement) pairs that cover every leaf.
    mesh: Sizes of the axes. Those of `AXES` that it has not count as 1.

  Raises:
    ValueError: Naming every leaf that is not covered, every rule that decides
      nothing though its placement must hold, axes that are unknown or used
      twice, and by path specs with too many dimensions and dimensions that do
      not divide.
  """
  return joint_specs((tree,), rules, mesh)[0]


def joint_specs(
  trees: Sequence[PyTree], rules: Rules, mesh: Mesh | AbstractMesh
) -> list[PyTree]:
  """Returns `specs` of trees that are parts of one, such as a model's state.

  A rule may decide leaves of any of them.

  >>> kernel, count = jax.numpy.ones((8, 4)), jax.numpy.zeros(())
  >>> rules = [("kernel", PartitionSpec("fsdp")), ("count", PartitionSpec())]
  >>> mesh = AbstractMesh((4,), ("fsdp",))
  >>> found = joint_specs([{"kernel": kernel}, {"count": count}], rules, mesh)
  >>> tuple(found[0]["kernel"]), tuple(found[1]["count"])
  (('fsdp',), ())

  Args:
    trees: Parts with paths of their own.
    rules: As in `specs`.
    mesh: As in `specs`.

  Raises:
    ValueError: As `specs`.
  """
  sizes = dict.fromkeys(AXES, 1) | dict(mesh.shape)
  problems = _rule_problems(rules, sizes)
  if not problems:
    problems = _coverage_problems(trees, rules)
  if problems:
    raise ValueError("\n".join(problems))

  def place(path, leaf, placement):
    dims, wrong = _placed(path, jax.numpy.shape(leaf), placement, sizes)
    problems.extend(f"{path!r}: {text}" for text in wrong)
    return fitting.as_spec(dims, sizes)

  placed = []
  for tree in trees:
    chosen = tree_lib.match_rules(rules, tree, allow_unused=True)
    placed.append(tree_lib.map_with_paths(place, tree, chosen))
  if problems:
    raise ValueError(
      f"rules must fit the arrays, got {len(problems)} that they do not.\n  "
      + "\n  ".join(problems)
    )
  return placed


def shardings(tree: PyTree, rules: Rules, mesh: Mesh) -> PyTree:
  """Returns for every leaf its sharding, as `jax.device_put` takes it.

  >>> from deepseek_jax.parallel import DEFAULT, make_mesh
  >>> found = shardings({"bias": jax.numpy.ones(3)}, DEFAULT, make_mesh())
  >>> found["bias"].is_fully_replicated
  True

  Args:
    tree: As in `specs`.
    rules: As in `specs`.
    mesh: As in `specs`.

  Raises:
    ValueError: As `specs`.
  """
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), specs(tree, rules, mesh)
  )


def state_specs(
  state: PyTree,
  params: PyTree,
  params_specs: PyTree,
  mesh: Mesh | AbstractMesh,
) -> PyTree:
  """Returns how an optimizer's state lies over the mesh.

  A leaf whose path ends in that of a parameter and that has its shape, such as
  a moment, lies as the parameter does. All else (counters, bases, codes, the
  random streams of a model) is as `Largest`: cut over "fsdp" if it is large, so
  that the memory of every optimizer shrinks with that axis, and in a stack of
  layers over "stage".

  >>> import optax
  >>> params = {"kernel": jax.numpy.ones((8, 4))}
  >>> state = optax.trace(0.9).init(params)
  >>> mesh = AbstractMesh((4,), ("fsdp",))
  >>> params_specs = {"kernel": PartitionSpec("fsdp")}
  >>> tuple(state_specs(state, params, params_specs, mesh).trace["kernel"])
  ('fsdp',)

  Args:
    state: Arrays, or `jax.ShapeDtypeStruct`s.
    params: The parameters that it belongs to, or their shapes.
    params_specs: What `specs` gave for the parameters.
    mesh: As in `specs`.
  """
  sizes = dict.fromkeys(AXES, 1) | dict(mesh.shape)
  shapes = map(jax.numpy.shape, jax.tree.leaves(params))
  paths = tree_lib.leaf_paths(params)
  placed = zip(shapes, jax.tree.leaves(params_specs), strict=True)
  known = dict(zip(paths, placed, strict=True))

  def place(path, leaf):
    shape = jax.numpy.shape(leaf)
    owner, spec = _owner(path, known)
    if owner == shape:
      return spec
    return fitting.as_spec(_largest(path, shape, ("fsdp",), sizes), sizes)

  return tree_lib.map_with_paths(place, state)


def _owner(
  path: Path, known: dict[Path, tuple[tuple[int, ...], PartitionSpec]]
) -> tuple[tuple[int, ...], PartitionSpec]:
  """Returns shape and spec of the parameter with the longest path in `path`."""
  parts = path.split("/")
  for i in range(len(parts) + 1):
    # The last is the empty path, of a parameter that is no tree.
    suffix = "/".join(parts[i:])
    if suffix in known:
      return known[suffix]
  return (-1,), PartitionSpec()


def _rule_problems(rules: Rules, sizes: dict[str, int]) -> list[str]:
  """Says which rules would be wrong for any array."""
  problems = []
  for pattern, placement in rules:
    found = _axis_problems(placement, sizes)
    problems += [f"rule {pattern!r}: {text}" for text in found]
  return problems


def _axis_problems(placement: Any, sizes: dict[str, int]) -> list[str]:
  if not isinstance(placement, Placement):
    return [
      "a placement must be a PartitionSpec, Preferred or Largest, got "
      f"{placement!r}."
    ]
  if isinstance(placement, Largest):
    names = list(placement.axes)
  else:
    spec = placement if isinstance(placement, PartitionSpec) else placement.spec
    names = [name for dim in fitting.as_dims(spec) for name in dim]
  unknown = sorted({str(name) for name in names if name not in sizes})
  twice = sorted({str(name) for name in names if names.count(name) > 1})
  return [_unknown_axis(name, list(sizes)) for name in unknown] + [
    f"a mesh axis may cut one dimension only, got {name!r} twice in "
    f"{placement}."
    for name in twice
  ]


def _unknown_axis(name: str, known: list[str]) -> str:
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
  return (
    f"an axis must be one of {', '.join(known)}, got {name!r}; did you mean "
    f"{near[0]!r}?"
  )


def _coverage_problems(trees: Sequence[PyTree], rules: Rules) -> list[str]:
  """Says which leaves no rule reaches, and which rules that must reach none."""
  flat = {path: 0.0 for tree in trees for path in tree_lib.leaf_paths(tree)}
  strict = [rule for rule in rules if isinstance(rule[1], PartitionSpec)]
  return [
    *_said(lambda: tree_lib.match_rules(rules, flat, allow_unused=True)),
    *_said(lambda: tree_lib.match_rules(strict, flat, default=None)),
  ]


def _said(check: Callable[[], Any]) -> list[str]:
  try:
    check()
  except ValueError as error:
    return [str(error)]
  return []


def _whole(ndim: int) -> Dims:
  return [()] * ndim


def _largest(
  path: Path,
  shape: tuple[int, ...],
  axes: Sequence[str],
  sizes: dict[str, int],
) -> Dims:
  """Returns the axes of every dimension of an array that nothing names."""
  dims = _whole(len(shape))
  if _STACK.fullmatch(path) and shape and shape[0] % sizes["stage"] == 0:
    dims[0] = ("stage",)
  return fitting.largest(dims, shape, axes, sizes)


def _placed(
  path: Path,
  shape: tuple[int, ...],
  placement: Placement,
  sizes: dict[str, int],
) -> tuple[Dims, list[str]]:
  """Returns the axes of every dimension, and what is wrong with them."""
  if isinstance(placement, Largest):
    return _largest(path, shape, placement.axes, sizes), []
  strict = isinstance(placement, PartitionSpec)
  spec = placement if isinstance(placement, PartitionSpec) else placement.spec
  dims = fitting.as_dims(spec)
  over = len(shape) - len(dims)
  if over < 0:
    return _whole(len(shape)), [
      f"{spec} names {len(dims)} dimensions, the array has {len(shape)} "
      f"(shape {shape})."
    ]
  if over and _STACK.fullmatch(path):
    free = all("stage" not in dim for dim in dims)
    front = ("stage",) if free else ()
    dims = [front, *_whole(over - 1), *dims]
  else:
    dims = [*dims, *_whole(over)]
  fit = fitting.exact if strict else fitting.preferred
  return fit(dims, shape, sizes)
