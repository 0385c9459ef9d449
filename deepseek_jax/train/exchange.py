"""How devices exchange gradients in a run, as a command line names it."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import optax
from jax.sharding import Mesh

from deepseek_jax import comm

# Between slices, and between the devices of one: what gradients are averaged
# over. Parts of parameters ("fsdp") and experts are exchanged by XLA.
AXES = ("replica", "data")

Factory = Callable[..., optax.GradientTransformation]

_AVERAGES: dict[str, Factory] = {
  "float32": comm.float_all_reduce,
  "bf16": comm.bf16_all_reduce,
  "int8": lambda axes, **options: comm.int_all_reduce(axes, bits=8, **options),
  "int4": lambda axes, **options: comm.int_all_reduce(axes, bits=4, **options),
  "one_bit": comm.one_bit,
  "top_k": comm.top_k,
  "power_sgd": comm.power_sgd,
}
_MEETINGS: dict[str, Factory] = {
  "diloco": comm.diloco,
  "asynchronous": comm.asynchronous,
}
_REAL = {"int8": comm.int_all_reduce, "int4": comm.int_all_reduce}
METHODS = (*_AVERAGES, *_MEETINGS)
"""Names that an exchange may have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
  """How devices exchange gradients.

  >>> Exchange.parse("diloco:period=50,compression=int8").options["period"]
  50

  Attributes:
    method: One of `METHODS`.
    axes: Of the mesh, among "replica" and "data", those of slow links; the
      gradient over the others is summed as ever. Empty: both.
    delay: Steps by which gradients come later, see `comm.delayed`.
    options: Arguments of the method, as those of `comm.int_all_reduce`;
      `compression` is the name of another method.
  """

  method: str
  axes: tuple[str, ...] = ()
  delay: int = 0
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    """Checks the names."""
    if self.method not in METHODS:
      raise ValueError(
        f"exchange must be one of {', '.join(METHODS)}, got "
        f"{self.method!r}.{_near(self.method, METHODS)}"
      )
    for name in self.axes:
      if name not in AXES:
        raise ValueError(
          f"the axes of an exchange must be among {AXES}, got {name!r}."
        )
    if self.delay < 0 or (self.delay and self.method in _MEETINGS):
      raise ValueError(
        "delay must be at least 0, and 0 for diloco (which has `overlap`) and "
        f"asynchronous, got delay={self.delay} for {self.method!r}."
      )
    known = _options(self.method)
    for name in self.options:
      if name not in known:
        raise ValueError(
          f"options of {self.method!r} are {', '.join(known)}, axes and delay; "
          f"got {name!r}.{_near(name, known)}"
        )

  @classmethod
  def parse(cls, text: str) -> "Exchange":
    """Returns what a text means, such as "power_sgd:rank=2,axes=replica".

    Several values of one option are joined by "+": "axes=replica+data",
    "speeds=1+1+0.5+0.5".

    Raises:
      ValueError: If a name is unknown, or an option has no value.
    """
    method, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for word in filter(None, rest.split(",")):
      name, equals, value = word.partition("=")
      if not equals:
        raise ValueError(
          f"an option of an exchange must be NAME=VALUE, got {word!r} in "
          f"{text!r}."
        )
      options[name] = _values(name, value)
    axes = options.pop("axes", ())
    return cls(
      method=method,
      axes=axes if isinstance(axes, tuple) else (axes,),
      delay=options.pop("delay", 0),
      options=options,
    )

  def names(self, mesh: Mesh) -> tuple[str, ...]:
    """Returns the axes of a mesh that gradients are exchanged over."""
    axes = self.axes or AXES
    return tuple(name for name in AXES if name in axes and name in mesh.shape)

  def build(
    self,
    tx: optax.GradientTransformation,
    names: tuple[str, ...],
    within: Callable[
      [optax.GradientTransformation], optax.GradientTransformation
    ],
  ) -> optax.GradientTransformation:
    """Returns the transform that exchanges, and then does what `tx` does.

    Args:
      tx: The optimizer.
      names: Axes of the surrounding `shard_map`.
      within: Makes a transform that averages work on parts of parameters.
    """
    options = dict(self.options)
    if self.method in _AVERAGES:
      average = _AVERAGES[self.method](names, **options)
      if self.delay:
        average = comm.delayed(average, self.delay)
      return optax.chain(within(average), tx)
    if (given := options.pop("compression", None)) is not None:
      compression = _AVERAGES[given](names)
      options["compression"] = within(compression)
    return _MEETINGS[self.method](tx, names, **options)

  @property
  def period(self) -> int:
    """Steps between exchanges."""
    if self.method not in _MEETINGS:
      return 1
    default = inspect.signature(_MEETINGS[self.method]).parameters["period"]
    return self.options.get("period", default.default)


def as_exchange(exchange: Exchange | str | None) -> Exchange | None:
  """Returns what a user gave, read if it is a text."""
  return Exchange.parse(exchange) if isinstance(exchange, str) else exchange


def _options(method: str) -> list[str]:
  """Returns the options that a text may set."""
  factory = _REAL.get(method) or (_AVERAGES | _MEETINGS)[method]
  hidden = {"axis_name", "specs", "inner", "outer", "bits", "exempt"}
  return [x for x in inspect.signature(factory).parameters if x not in hidden]


def _values(name: str, text: str) -> Any:
  found = tuple(_value(name, part) for part in text.split("+"))
  many = name in ("axes", "speeds", "local_steps")
  return found if many or len(found) > 1 else found[0]


def _value(name: str, text: str) -> Any:
  if text.lower() in ("true", "false"):
    return text.lower() == "true"
  for kind in (int, float):
    try:
      value = kind(text)
    except ValueError:
      continue
    if math.isfinite(value):
      return value
  if name == "compression" and text not in _AVERAGES:
    raise ValueError(
      f"compression must be one of {', '.join(_AVERAGES)}, got {text!r}."
    )
  return text


def _near(word: str, known: Any) -> str:
  near = difflib.get_close_matches(word, list(known), n=1)
  return f" Did you mean {near[0]!r}?" if near else ""
