"""The windows on TPU: cells of queries with the cells of keys around them.

A cell is one block or several. The last axis of the grid walks along the band
of cells that a window touches; what it sums up stays in fast memory. There is
a kernel for queries and one for keys in the backward pass, as either sum needs
a walk of its own.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from deepseek_jax.kernels.block_sparse_attention.problem import Heads, Layout
from deepseek_jax.kernels.block_sparse_attention.tpu_parts import (
  Keys,
  Rows,
  Tuning,
  as_cells,
  as_rows,
  byte_count,
  cost,
  dot,
  log_sum,
  same_segment,
  specs,
)
from deepseek_jax.kernels.block_sparse_attention.window import window_weight
from deepseek_jax.kernels.block_sparse_attention.xla_parts import (
  Above,
  Partial,
  nonzero,
)


def windows_forward(layout: Layout, tuning: Tuning, heads: Heads) -> Partial:
  """Returns attention of all tokens to their windows."""
  cells, rows, keys = _problem(layout, tuning, heads, None)
  row = cells.row(rows)
  lanes, size = rows.q.shape[2:]
  call = _call(
    _forward_kernel, 2, cells, tuning, rows, keys,
    outs=[rows.q, row], walk=cells.back,
    scratch=[(1, lanes), (1, lanes), (size, lanes)],
  )  # fmt: skip
  out, lse = call(rows, keys)
  return Partial(out.reshape(heads.q.shape), lse.reshape(heads.q.shape[:3]))


def windows_backward(
  layout: Layout, tuning: Tuning, heads: Heads, above: Above
) -> Heads:
  """Returns the gradients that come from windows."""
  cells, rows, keys = _problem(layout, tuning, heads, above)
  row = cells.row(rows)
  lanes, size = rows.q.shape[2:]
  edges = [row for x in (rows.span, rows.offset) if x is not None]
  queries = _call(
    _query_kernel, 3, cells, tuning, rows, keys,
    outs=[rows.q, *edges], walk=cells.back, scratch=[(size, lanes)],
  )  # fmt: skip
  d_q, *edges = queries(rows, keys)
  of_keys = _call(
    _key_kernel, 4, cells, tuning, rows, keys,
    outs=[keys.k, keys.v], walk=cells.forth, scratch=[],
  )  # fmt: skip
  d_k, d_v = of_keys(rows, keys)
  edges = [x.reshape(heads.q.shape[:3]) for x in edges]
  d_span, d_offset = (*edges, None, None)[:2]
  return Heads(
    q=d_q.reshape(heads.q.shape),
    k=d_k.reshape(heads.k.shape),
    v=d_v.reshape(heads.v.shape),
    span=d_span,
    offset=d_offset,
    segments=None,
  )


class _Cells(NamedTuple):
  """The grid: N cells of C blocks, and which of them a window touches."""

  layout: Layout
  blocks: int
  count: int
  group: int

  @property
  def reach(self) -> int:
    return -(-self.layout.reach // self.blocks)

  @property
  def ahead(self) -> int:
    return -(-self.layout.ahead // self.blocks)

  @property
  def band(self) -> int:
    return self.reach + 1 + self.ahead

  @property
  def pairs(self) -> int:
    """How many cells of queries and of keys meet."""
    inside = lambda i: (
      min(i, self.reach) + 1 + min(self.count - 1 - i, self.ahead)
    )
    return sum(map(inside, range(self.count)))

  def back(self, cell, step):
    """Returns the cell of keys that a cell of queries meets at a step."""
    return cell - self.reach + step

  def forth(self, cell, step):
    """Returns the cell of queries that a cell of keys meets at a step."""
    return cell - self.ahead + step

  def row(self, rows: Rows) -> jax.ShapeDtypeStruct:
    count, cells, lanes, _ = rows.q.shape
    return jax.ShapeDtypeStruct((count, cells, 1, lanes), jnp.float32)


class _Scores(NamedTuple):
  logits: Array  # [J, L]; -inf where a query does not see the key
  weight: Array | float
  distance: Array  # from query to key, in tokens

  @classmethod
  def of(cls, cells: _Cells, behind, rows: Rows, keys: Keys):
    """Scores a cell of keys that is `behind` cells before the queries'."""
    layout = cells.layout
    logits = dot(keys.k[...], rows.q[...], (1, 1))
    query = jax.lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1)
    query = jax.lax.div(query, cells.group)
    key = jax.lax.broadcasted_iota(jnp.int32, (logits.shape[0], 1), 0)
    number = lambda token: jax.lax.div(token, layout.block)
    distance = query - key + behind * (cells.blocks * layout.block)
    blocks = number(query) - number(key) + behind * cells.blocks
    if layout.is_causal:
      seen = (blocks <= layout.reach) & (distance >= 0)
    else:
      seen = jnp.abs(blocks) <= layout.reach
    if rows.segments is not None:
      seen &= same_segment(keys.segments[...], rows.segments[...])
    weight = 1.0
    if rows.span is not None:
      offset = None if rows.offset is None else rows.offset[...]
      weight = window_weight(
        distance.astype(jnp.float32), rows.span[...], offset, layout.ramp
      )
      weight = jnp.where(blocks == 0, 1.0, weight)
      seen &= weight > 0
    return cls(jnp.where(seen, logits, -jnp.inf), weight, distance)


def _forward_kernel(
  cells: _Cells, rows: Rows, keys: Keys, out, lse, top, total, heap
):
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    top[...] = jnp.full(top.shape, jnp.finfo(top.dtype).min)
    total[...] = jnp.zeros(total.shape, total.dtype)
    heap[...] = jnp.zeros(heap.shape, heap.dtype)

  @_if_inside(cells, cells.back)
  def _():
    logits, weight, _ = _Scores.of(cells, cells.reach - step, rows, keys)
    higher = jnp.maximum(top[...], logits.max(0, keepdims=True))
    p = weight * jnp.exp(logits - higher)
    decay = jnp.exp(top[...] - higher)
    top[...] = higher
    total[...] = decay * total[...] + p.sum(0, keepdims=True)
    heap[...] = decay * heap[...] + dot(keys.v[...], p, (0, 0))

  @pl.when(step == cells.band - 1)
  def _():
    out[...] = (heap[...] / nonzero(total[...])).T
    lse[...] = log_sum(top[...], total[...])


def _query_kernel(cells: _Cells, rows: Rows, keys: Keys, d_q, *rest):
  *edges, heap = rest
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    for x in rest:
      x[...] = jnp.zeros(x.shape, x.dtype)

  @_if_inside(cells, cells.back)
  def _():
    scores = _Scores.of(cells, cells.reach - step, rows, keys)
    _, d_weight, d_logits = _gradients(scores, rows, keys)
    heap[...] += dot(keys.k[...], d_logits, (0, 0))
    for x, slope in zip(
      edges, _slopes(cells, scores, rows, d_weight), strict=True
    ):
      x[...] += slope.sum(0, keepdims=True)

  @pl.when(step == cells.band - 1)
  def _():
    d_q[...] = heap[...].T


def _key_kernel(cells: _Cells, rows: Rows, keys: Keys, d_k, d_v):
  step = pl.program_id(2)

  @pl.when(step == 0)
  def _():
    d_k[...] = jnp.zeros(d_k.shape, d_k.dtype)
    d_v[...] = jnp.zeros(d_v.shape, d_v.dtype)

  @_if_inside(cells, cells.forth)
  def _():
    scores = _Scores.of(cells, step - cells.ahead, rows, keys)
    p, _, d_logits = _gradients(scores, rows, keys)
    d_k[...] += dot(d_logits, rows.q[...], (1, 0))
    d_v[...] += dot(p, rows.d_out[...], (1, 0))


def _gradients(scores: _Scores, rows: Rows, keys: Keys):
  """Returns the weights, and the gradients of the window's and of logits."""
  open_p = jnp.exp(scores.logits - rows.lse[...])
  d_p = dot(keys.v[...], rows.d_out[...], (1, 1))
  d_weight = open_p * (d_p - rows.delta[...])
  return scores.weight * open_p, d_weight, scores.weight * d_weight


def _slopes(cells: _Cells, scores: _Scores, rows: Rows, d_weight):
  """Yields the gradients of span and offset, which act on the ramp alone."""
  if rows.span is None:
    return
  on_ramp = (scores.weight > 0) & (scores.weight < 1)
  slope = jnp.where(on_ramp, d_weight, 0) / cells.layout.ramp
  yield slope
  if rows.offset is not None:
    away = scores.distance.astype(jnp.float32) - rows.offset[...]
    # `jnp.sign` would ask which TPU this is, which a compiler may not know.
    yield jnp.where(away > 0, slope, jnp.where(away < 0, -slope, 0))


def _if_inside(cells: _Cells, walk: Callable):
  """Runs what it decorates where the walk has not left the sequence."""
  other = walk(pl.program_id(1), pl.program_id(2))
  return pl.when((other >= 0) & (other < cells.count))


def _call(
  kernel, dots: int, cells: _Cells, tuning: Tuning, rows: Rows, keys: Keys, *,
  outs, walk, scratch,
):  # fmt: skip
  own = lambda head, cell, step: (head, cell)

  def met(head, cell, step):
    # Beside the sequence the nearest cell stands in, which is there already.
    return head, jnp.clip(walk(cell, step), 0, cells.count - 1)

  at_rows, at_keys = (own, met) if walk == cells.back else (met, own)
  kept, fetched = (rows, keys) if walk == cells.back else (keys, rows)
  outs = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in outs]
  # What is met is fetched for every cell that meets it.
  moved = byte_count((kept, outs))
  moved += byte_count(fetched) // cells.count * cells.pairs
  return pl.pallas_call(
    functools.partial(kernel, cells),
    out_shape=outs,
    grid=(rows.q.shape[0], cells.count, cells.band),
    in_specs=[specs(rows, at_rows), specs(keys, at_keys)],
    out_specs=[specs(x, own) for x in outs],
    cost_estimate=cost(dots, rows.q.shape[0] * cells.pairs, rows, keys, moved),
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=tuning.interpret,
    name="windows" + kernel.__name__,
  )


def _problem(
  layout: Layout, tuning: Tuning, heads: Heads, above: Above | None
) -> tuple[_Cells, Rows, Keys]:
  _, time, group, _ = heads.q.shape
  blocks = math.gcd(tuning.blocks, time // layout.block)
  length = blocks * layout.block
  lanes = length * group
  segments = heads.segments
  keys = Keys(
    as_cells(heads.k, length), as_cells(heads.v, length),
    as_rows(segments, length),
  )  # fmt: skip
  if segments is not None:
    segments = jnp.repeat(segments, group, -1)
  row = functools.partial(as_rows, lanes=lanes)
  rows = Rows(
    as_cells(heads.q, lanes), row(segments), row(heads.span), row(heads.offset)
  )
  if above is not None:
    rows = rows._replace(
      d_out=as_cells(above.d_out, lanes),
      lse=row(above.lse),
      delta=row(above.delta),
    )
  return _Cells(layout, blocks, time // length, group), rows, keys
