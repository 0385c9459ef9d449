"""The mesh axes an exchange runs over, as `jax.shard_map` names them."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from deepseek_jax.core.typing import PyTree

AxisName = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
  """The devices that average their gradients.

  Attributes:
    sharded: The axis over which parameters are cut, or None.
    others: The other axes.
  """

  sharded: str | None
  others: tuple[str, ...]

  @classmethod
  def of(cls, axis_name: AxisName, specs: PyTree | None = None) -> "Axes":
    """Returns the axes that the arguments of a transform name.

    Args:
      axis_name: One axis or several.
      specs: Of the parameters; which of the axes cuts them.

    Raises:
      ValueError: If no axis is named, one twice, or several cut parameters.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if not names or len(set(names)) < len(names):
      raise ValueError(
        f"axis_name must name one mesh axis or several, got {axis_name=}."
      )
    used = {name for spec in _leaves(specs) for name in named(spec)}
    cutting = [name for name in names if name in used]
    if len(cutting) > 1:
      raise ValueError(
        f"specs must cut parameters over one axis of {axis_name=} at most, got "
        f"{cutting}."
      )
    sharded = cutting[0] if cutting else None
    return cls(sharded, tuple(n for n in names if n != sharded))

  def dim(self, spec: PartitionSpec | None) -> int | None:
    """Returns the dimension that a parameter is cut along over `sharded`."""
    for dim, entry in enumerate(spec or ()):
      if self.sharded is not None and self.sharded in _entry(entry):
        return dim
    return None

  @property
  def names(self) -> tuple[str, ...]:
    """All of them, the sharded one first: so are chunks ordered."""
    return ((self.sharded,) if self.sharded else ()) + self.others

  @property
  def parts(self) -> int:
    """Into how many parts parameters are cut."""
    return size((self.sharded,)) if self.sharded else 1

  @property
  def devices(self) -> int:
    """How many devices take part."""
    return size(self.names)

  @property
  def index(self) -> Array:
    """Which of them this one is."""
    _ = self.devices
    return jax.lax.axis_index(self.names)

  @property
  def copies(self) -> int:
    """How many devices hold the same part."""
    return size(self.others)


def size(names: Sequence[str]) -> int:
  """Returns how many devices lie along axes of the surrounding `shard_map`.

  Raises:
    ValueError: If there is no such axis here.
  """
  return math.prod(map(_one_size, names))


def _one_size(name: str) -> int:
  try:
    return jax.lax.axis_size(name)
  except (NameError, KeyError) as error:
    known = _bound()
    where = f"whose axes are {known}" if known else "and there is none here"
    raise ValueError(
      "axis_name must name axes of the surrounding jax.shard_map, "
      f"{where}; got {name!r}."
    ) from error


def _bound() -> tuple[str, ...]:
  """Returns the axes that are bound here."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(getattr(mesh, "manual_axes", ()))


def named(spec: PartitionSpec) -> set[str]:
  """Returns the axes that a spec names."""
  return {name for entry in spec for name in _entry(entry)}


def _entry(entry: str | Sequence[str] | None) -> tuple[str, ...]:
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _leaves(specs: PyTree) -> list[PartitionSpec]:
  is_spec = lambda x: isinstance(x, PartitionSpec)
  return jax.tree.leaves(specs, is_leaf=is_spec)
