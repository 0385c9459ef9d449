"""What the Hopper kernels have in common: rows, slabs, and how they wait.

The kernels know rows and slabs. A row is one query of one head; those of a
chunk, 64 of them, are the tile of a matrix product that one warpgroup makes. A
slab is 64 keys, so that a block is one slab or several. Both windows and tiles
are chunks that visit consecutive slabs, and slabs that consecutive chunks
visit: a `Range` says which, and the kernels need not know why.

N is the number of rows of a head, padded to chunks.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

CHUNK = 64  # Rows, and keys of a slab: the M of a warpgroup's product.
FLOOR = -1e30  # Below every logit; finite, as -inf - -inf is NaN.

MATRIX = plgpu.Layout.WGMMA
OF_ROWS = plgpu.Layout.WGMMA.reduce(1)  # One number a row,
OF_KEYS = plgpu.Layout.WGMMA.reduce(0)  # or one a key.


class Rows(NamedTuple):
  """Queries, and what is known of each."""

  q: Float[Array, "P N H"]
  segments: Int[Array, "P N"] | None
  span: Float[Array, "P N"] | None
  offset: Float[Array, "P N"] | None


class Keys(NamedTuple):
  """Keys and values of heads."""

  k: Float[Array, "P T H"]
  v: Float[Array, "P T H"]
  segments: Int[Array, "P T"] | None


class Range(NamedTuple):
  """Neighbours to visit: from `first` up to, not including, `stop`."""

  first: Int[Array, "P visitors"]
  stop: Int[Array, "P visitors"]


class Above(NamedTuple):
  """What the backward pass knows of the result of rows."""

  d_out: Float[Array, "P N H"]
  lse: Float[Array, "P N"]  # inf where a row saw nothing.
  delta: Float[Array, "P N"]


def as_rows(x: Shaped[Array, "P T G *H"]) -> Shaped[Array, "P N *H"]:
  """Makes one axis of tokens and the heads that share keys."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def launch(
  kernel: Callable[..., None],
  out_type: Any,
  scratch: Any,
  grid: tuple[int, int],
) -> Callable[..., Any]:
  """Runs one warpgroup for every head and number of a chunk or slab."""
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types=scratch,
    grid=grid,
    grid_names=("head", "number"),
    compiler_params=plgpu.CompilerParams(approx_math=True),  # ex2, lg2.
  )


def matrices(dtype: jax.typing.DTypeLike, *shape: int) -> Any:
  """Shared memory for matrices, in the tiles that `wgmma` reads."""
  tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return plgpu.SMEM(shape, dtype, transforms=tiles)


def like_vectors(tree: Any, stages: tuple[int, ...] = ()) -> Any:
  """Shared memory for one number a row (or key) of every array."""
  one = lambda x: plgpu.SMEM((*stages, CHUNK), x.dtype)
  return jax.tree.map(one, tree)


def fetch(source: Any, target: Any, head, number, barrier) -> None:
  """Starts to copy a chunk or slab of every array of a tree."""

  def one(gmem, smem):
    part = gmem.at[head, pl.ds(number * CHUNK, CHUNK)]
    plgpu.copy_gmem_to_smem(part, smem, barrier)

  jax.tree.map(one, source, target)


def store(source: Any, target: Any, head, number) -> None:
  """Copies a chunk or slab of every array of a tree back, and waits."""
  plgpu.commit_smem()

  def one(smem, gmem):
    part = gmem.at[head, pl.ds(number * CHUNK, CHUNK)]
    plgpu.copy_smem_to_gmem(smem, part)

  jax.tree.map(one, source, target)
  plgpu.wait_smem_to_gmem(0)


def stage(tree: Any, slot) -> Any:
  """Returns one of several stages of buffers."""
  return jax.tree.map(lambda ref: ref.at[slot], tree)


def visit(
  first, stop, stages: int, start: Callable, barrier, body: Callable, carry
):
  """Runs `body` on neighbours while the next ones are on their way.

  Args:
    first: number of the first neighbour.
    stop: number after the last one.
    stages: neighbours for which there are buffers.
    start: of a neighbour and its stage; starts its copies.
    barrier: of every stage; passes when its copies are there.
    body: of a neighbour, its stage and the carry; returns the carry.
    carry: arrays.
  """
  for ahead in range(stages):
    pl.when(first + ahead < stop)(
      functools.partial(start, first + ahead, ahead)
    )

  def step(number, carry):
    slot = lax.rem(number - first, jnp.int32(stages))
    plgpu.barrier_wait(barrier.at[slot])
    carry = body(number, slot, carry)
    following = number + stages
    pl.when(following < stop)(functools.partial(start, following, slot))
    return carry

  return lax.fori_loop(first, stop, step, carry)


def product(a, b) -> Float[Array, "M N"]:
  """Returns a @ b in float32 of two matrices in shared memory."""

  def multiply(total):
    plgpu.wgmma(total, a, b)
    return total[...]

  shape = (a.shape[0], b.shape[1])
  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def constant(value: int | float, *shape: int) -> Float[Array, "..."]:
  """Returns one number for every row, or matrix element, in registers."""
  layout = OF_ROWS if len(shape) == 1 else MATRIX
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def across(x: Array, width: int = CHUNK) -> Array:
  """Repeats one number a row over the columns of a matrix."""
  return lax.broadcast_in_dim(x, (x.shape[0], width), [0])


# jax 0.10 wants to hear that the whole array is meant.
_NEEDS_INDEX = "idx" in inspect.signature(plgpu.load).parameters
_WHOLE: dict[str, Any] = {"idx": ()} if _NEEDS_INDEX else {}


def numbers(ref, layout=OF_ROWS) -> Array:
  """Loads one number a row, or a key, into registers."""
  return plgpu.load(ref, layout=layout, **_WHOLE)
