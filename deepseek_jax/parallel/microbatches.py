"""How the rows of a batch become micro-batches, and rows again.

Micro-batch m of M has rows m, m + M, m + 2·M, ...: on any mesh the same, and of
rows that are cut over devices every device has its share of each. In a pipeline
of S stages, stage s is home to micro-batches s·M/S to (s + 1)·M/S - 1: there
they begin and end.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

from deepseek_jax.parallel.ambient import axis_size, batch_axes

_PARTS = contextvars.ContextVar("parts", default=1)


@contextlib.contextmanager
def cut_batch(parts: int) -> Iterator[None]:
  """Says that what is traced within sees one of so many parts of a batch.

  Args:
    parts: whose gradients are summed to that of the batch.
  """
  token = _PARTS.set(_PARTS.get() * parts)
  try:
    yield
  finally:
    _PARTS.reset(token)


def batch_parts() -> int:
  """Returns in how many parts the code that is being traced sees a batch.

  What adds to a gradient by itself, without a way to the loss, divides by it.

  >>> with cut_batch(4):
  ...   batch_parts()
  4
  """
  return _PARTS.get()


def choose_microbatches(rows: int, stages: int) -> int:
  """Returns four micro-batches a stage, or fewer if the rows are few.

  >>> choose_microbatches(64, 2), choose_microbatches(12, 2)
  (8, 6)

  Args:
    rows: of the batch; each micro-batch has as many for every device that they
      are cut over.
    stages: of the pipeline.

  Raises:
    ValueError: there is none a stage.
  """
  if stages == 1:
    return 1
  for microbatches in (4 * stages, 3 * stages, 2 * stages, stages):
    if rows % (microbatches * axis_size(*batch_axes())) == 0:
      return microbatches
  raise ValueError(_indivisible(rows, stages, "stages"))


def check_rows(rows: int, microbatches: int) -> None:
  """Raises `ValueError` if rows do not make so many equal micro-batches."""
  if rows % (microbatches * axis_size(*batch_axes())):
    raise ValueError(_indivisible(rows, microbatches, "microbatches"))


def _indivisible(rows: int, parts: int, name: str) -> str:
  devices = axis_size(*batch_axes())
  told = " * ".join(
    [f"{name}={parts}"] + [f"{devices} devices"] * (devices > 1)
  )
  return (
    f"the rows of a batch must be a multiple of {told}, for every micro-batch "
    f"to have as many on each device, got {rows} rows."
  )


def cut_rows(
  x: Shaped[Array, "B ..."], stages: int, microbatches: int
) -> Shaped[Array, "stages waves rows ..."]:
  """Returns the rows by stage, micro-batches of that stage, and rows of those.

  >>> cut_rows(jax.numpy.arange(8), 2, 4)[..., 0]
  Array([[0, 1],
         [2, 3]], dtype=int32)
  """
  x = lay_rows(x, (*batch_axes(), "stage"))
  x = x.reshape(-1, stages, microbatches // stages, *x.shape[1:])
  return lay_rows(jax.numpy.moveaxis(x, 0, 2), "stage", None, batch_axes())


def join_rows(
  x: Shaped[Array, "stages waves rows ..."],
) -> Shaped[Array, "B ..."]:
  """Returns what `cut_rows` cut, with the rows cut over stages too."""
  x = jax.numpy.moveaxis(x, 2, 0)
  return lay_rows(x.reshape(-1, *x.shape[3:]), (*batch_axes(), "stage"))


def lay_rows(x: Array, *dims: str | tuple[str, ...] | None) -> Array:
  """Returns `x` with its first dimensions cut in this way.

  As `constrain`, but how the dimensions behind lie is left to the compiler.
  """
  dims = tuple(
    tuple(
      name
      for name in ((d,) if isinstance(d, str) else d or ())
      if axis_size(name) > 1
    )
    or None
    for d in dims
  )
  if not any(dims):
    return x
  free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - len(dims))
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*dims, *free))
