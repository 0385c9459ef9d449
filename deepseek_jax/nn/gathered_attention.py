"""Full attention to a sequence that is cut over devices."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from deepseek_jax.kernels.block_sparse_attention.checks import (
  check_heads,
  check_rows,
)
from deepseek_jax.nn.full_attention import window_weights

_STRIPE = 128  # Rows whose logits exist at once.
_LEAST = -1e30  # Finite, so that a row that sees nothing stays finite.


def gathered_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  *,
  axis_name: str,
  block_size: int = 64,
  window: int = 256,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
  span: Float[Array, "B T N"] | None = None,
  offset: Float[Array, "B T N"] | None = None,
  ramp: int | float = 32.0,
) -> Float[Array, "B T N H"]:
  """`full_attention` of a sequence whose parts lie on devices.

  Call it inside `jax.shard_map`, where every device has T consecutive tokens.
  Each receives the keys and values of all, once, and reads them with its own
  queries, some rows at a time, so that logits take memory linear in the length
  of the whole sequence; they are recomputed on the way back. A device does the
  same work whether or not its tokens may see all of it.

  Args:
    q: queries of the own tokens.
    k: keys of the own tokens.
    v: values of the own tokens.
    axis_name: of the mesh, that the sequence is cut over.
    block_size: as in `dynamic_attention`, and so are all others.
    window: tokens.
    is_causal: whether tokens see no later ones.
    segment_ids: of the own tokens; numbers hold across devices.
    span: of the own tokens.
    offset: of the own tokens.
    ramp: tokens over which the window fades.

  Returns:
    Outputs of the own tokens; 0 where one sees no key.

  Raises:
    ValueError: shapes or types do not fit.
    NameError: no axis of that name is mapped here.

  >>> from jax.sharding import AxisType, PartitionSpec as P
  >>> auto = (AxisType.Auto,)
  >>> mesh = jax.make_mesh((2,), ("sequence",), auto, devices=jax.devices()[:2])
  >>> attend = lambda x: gathered_attention(x, x, x, axis_name="sequence")
  >>> spec = P(None, "sequence")
  >>> run = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
  >>> jax.jit(run).eval_shape(jnp.ones((1, 6, 2, 8))).shape
  (1, 6, 2, 8)
  """
  check_heads(q, k, v)
  check_rows("segment_ids", segment_ids, q.shape[:2], jnp.integer)
  for name, edge in (("span", span), ("offset", offset)):
    check_rows(name, edge, q.shape[:3], jnp.floating)
  time = q.shape[1]
  gather = functools.partial(_gather, axis_name)
  segments = None if segment_ids is None else gather(segment_ids)
  keys = _Keys(gather(k), gather(v), segments)
  place = jax.lax.axis_index(axis_name) * time + jnp.arange(time)
  rows = _Rows(q * q.shape[-1] ** -0.5, place[None], segment_ids, span, offset)

  def read(rows):
    weight = jnp.ones((1, 1, 1, 1))
    if rows.span is not None:
      weight = window_weights(
        rows.place[0], jnp.arange(keys.k.shape[1]), block_size, window,
        rows.span, rows.offset, ramp,
      )  # fmt: skip
    weight = jnp.where(_seen(rows, keys, is_causal)[:, None], weight, 0)
    return _read(rows.q, keys, weight)

  # Recomputed stripe by stripe: of what lies between, nothing is kept.
  out = jax.lax.map(jax.checkpoint(read), _stripes(rows))
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :time]


class _Keys(NamedTuple):
  """What lies on all devices together."""

  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K H"]
  segments: Int[Array, "B S"] | None


class _Rows(NamedTuple):
  """Some of the own tokens; the second axis of all is their number."""

  q: Float[Array, "B T N H"]
  place: Int[Array, "1 T"]
  segments: Int[Array, "B T"] | None
  span: Float[Array, "B T N"] | None
  offset: Float[Array, "B T N"] | None


def _gather(axis_name: str, x: Shaped[Array, "B T ..."]) -> Any:
  """Returns the parts of all devices, one after the other."""
  kind = x.dtype
  if kind == jnp.bfloat16 and jax.default_backend() == "cpu":
    # On the way back this is a sum, which XLA cannot compile in bfloat16 there.
    x = x.astype(jnp.float32)
  x = jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
  return x.astype(kind)


def _stripes(rows: _Rows) -> Any:
  """Cuts the second axis into equal stripes, which come first."""
  time = rows.q.shape[1]
  size = min(_STRIPE, time)
  more = -time % size

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(cut, rows)


def _seen(rows: _Rows, keys: _Keys, is_causal: bool) -> Bool[Array, "#B T S"]:
  """Says which keys tokens may see."""
  row = rows.place[..., None]
  key = jnp.arange(keys.k.shape[1])[None, None]
  seen = (row >= key) | (not is_causal)
  if rows.segments is None or keys.segments is None:
    return seen
  mine = rows.segments[..., None]
  return seen & (mine == keys.segments[:, None]) & (mine >= 0)


def _read(
  q: Float[Array, "B T N H"], keys: _Keys, weight: Float[Array, "#B #N #T S"]
) -> Float[Array, "B T N H"]:
  """Returns the softmax over keys, each counted with its weight."""
  batch, time, heads, size = q.shape
  kv_heads = keys.k.shape[2]
  q = q.reshape(batch, time, kv_heads, -1, size)
  logits = jnp.einsum(
    "bqkgh,btkh->bkgqt", q, keys.k, preferred_element_type=jnp.float32
  )
  if weight.shape[1] == 1:
    weight = weight[:, :, None]
  else:
    weight = weight.reshape(-1, kv_heads, heads // kv_heads, *weight.shape[2:])
  logits = jnp.where(weight > 0, logits, _LEAST)
  peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  p = weight * jnp.exp(logits - peak)
  # Divided last, where there are H numbers a row and not as many as keys.
  total = p.sum(-1, keepdims=True)
  found = jnp.einsum(
    "bkgqt,btkh->bkgqh", p.astype(keys.v.dtype), keys.v,
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  found = jnp.where(total > 0, found / jnp.where(total > 0, total, 1), 0)
  found = jnp.moveaxis(found, 3, 1)
  return found.reshape(batch, time, heads, size).astype(q.dtype)
