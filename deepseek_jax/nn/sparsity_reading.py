"""Reading how sparse a model is."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from deepseek_jax.nn.sparse_relu import SparseReLU


class Sparsity(NamedTuple):
  """What is read of one sparse activation.

  Both are NaN before the first call that counts.

  Attributes:
    zeros: share of zeros.
    dead: share of channels that (almost) never fire; NaN where the layer does
      not tell channels apart.
  """

  zeros: float
  dead: float


def sparsity(
  model: nnx.Module, below: int | float = 1e-3
) -> dict[str, Sparsity]:
  """Returns zeros and dead channels of every sparse activation of a model.

  As of training: running means of about the last hundred calls, of those
  activations that count (`SparseReLU` and what derives from it).
  `measure_sparsity` tells what they are on given inputs.

  >>> layer = SparseReLU(2)
  >>> y = layer(jax.numpy.array([[-1.0, 1.0], [-1.0, -1.0]]))
  >>> sparsity(nnx.List([layer]))
  {'0': Sparsity(zeros=0.75, dead=0.5)}

  Args:
    model: any module.
    below: firing rate up to which a channel is dead, in [0, 1).

  Returns:
    The path of each layer, such as "layers/0/feed_forward/activation", to what
    was read; layers that are stacked for a scan each by themselves, as
    "layers/0/feed_forward/activation[3]".

  Raises:
    ValueError: `below` is out of its range.
  """
  found: dict[str, Sparsity] = {}
  for path, layer in nnx.iter_graph(model):
    if not isinstance(layer, SparseReLU):
      continue
    name = "/".join(map(str, path))
    zeros = np.asarray(layer.sparsity())
    dead = np.asarray(layer.dead(below), np.float32)
    if layer.features is None:
      dead = np.full(zeros.shape, np.nan)
    else:
      dead = np.where(np.isnan(zeros), np.nan, dead.mean(-1))
    for place in np.ndindex(zeros.shape):
      mark = "".join(f"[{i}]" for i in place)
      found[name + mark] = Sparsity(float(zeros[place]), float(dead[place]))
  return found


def measure_sparsity(
  model: nnx.Module,
  batches: Iterable[Any],
  apply: Callable[[Any, Any], Any] | None = None,
) -> dict[str, Sparsity]:
  """Returns zeros and dead channels on given inputs, in evaluation mode.

  A channel is dead that fires for none of them. The model stays as it is.

  >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), SparseReLU(8))
  >>> ones = jax.numpy.ones((2, 4))
  >>> found = measure_sparsity(model, [ones, -ones])
  >>> print(found["layers/1"])
  Sparsity(zeros=0.5, dead=0.0)

  Args:
    model: any module.
    batches: inputs of the model, each of the same shape and equally weighty.
    apply: calls the model with a batch; `model(batch)` if None.

  Returns:
    As `sparsity`.
  """
  apply = apply or (lambda model, batch: model(batch))
  copy = nnx.clone(model)
  copy.eval()
  for _, layer in nnx.iter_graph(copy):
    if isinstance(layer, SparseReLU):
      layer.start_counting()
      layer.axis_name = None  # Here is one device.
  structure, params, rest = nnx.split(copy, nnx.Param, ...)
  params, rest = nnx.as_pure(params), nnx.as_pure(rest)

  @jax.jit
  def count(params, rest, batch):
    model = nnx.merge(structure, params, rest)
    apply(model, batch)
    return nnx.as_pure(nnx.split(model, nnx.Param, ...)[2])

  for batch in batches:
    rest = count(params, rest, batch)
  return sparsity(nnx.merge(structure, params, rest), below=0.0)
