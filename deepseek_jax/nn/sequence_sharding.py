"""Dynamic attention to a sequence that is cut over devices."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deepseek_jax.kernels.block_sparse_attention import api as kernel
from deepseek_jax.kernels.block_sparse_attention.checks import (
  check_heads,
  check_rows,
)
from deepseek_jax.nn.dynamic_attention import Selection
from deepseek_jax.nn.sequence_choice import (
  by_head,
  choose_from_all,
  cut_sequence,
  whole_segments,
)
from deepseek_jax.nn.sequence_exchange import (
  Parts,
  gather_around,
  plan_requests,
  segments_around,
)


def sharded_dynamic_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  *,
  axis_name: str,
  capacity: int | None = None,
  block_size: int = 64,
  window: int = 256,
  num_remote: int = 4,
  num_hashes: int = 4,
  hash_bits: int = 3,
  selection: Selection = "lsh",
  projections: Float[Array, "rounds H bits"] | None = None,
  is_causal: bool = True,
  segment_ids: Int[Array, "B T"] | None = None,
  span: Float[Array, "B T N"] | None = None,
  offset: Float[Array, "B T N"] | None = None,
  ramp: int | float = 32.0,
  scale: float | None = None,
  implementation: kernel.Implementation | None = None,
) -> Float[Array, "B T N H"]:
  """`dynamic_attention` of a sequence whose parts lie on S devices.

  Call it inside `jax.shard_map`, where every device has T consecutive tokens.
  The result and all gradients are those of `dynamic_attention(...,
  two_level=False)` of the whole sequence. Of it, a device receives

  * summaries of all blocks, in float32: rounds·2^bits·(H + 1) numbers a block
    and key-value head, where its keys and values are 2·H·`block_size`: by
    default a quarter of their bytes, or half of them in bfloat16;
  * the neighbours' blocks that windows reach into;
  * of every other device at most `capacity` blocks that own tokens chose;
  * segment ids, if there are any.

  A device works as on T + (S - 1)·`capacity`·`block_size` tokens and the halo.
  So it is a small capacity that saves bytes and time, and that suits tokens
  that want much the same blocks. If those of a device choose all sorts, as at
  the start of training, about half of the choices are dropped:
  `choose_sharded_blocks` says how many. Without a capacity nothing is dropped,
  but 1.3 times as much travels as if all keys and values were gathered: then
  gather them. Long sequences are not searched region by region.

  In causal mode no token has a say in what those on the devices before it see.
  With a capacity, later tokens of the *same* device have: all vote on what is
  fetched. So do not train a language model with dropped choices and decode
  without; without a capacity it is causal to the bit.

  Args:
    q: queries of the own tokens; T is a multiple of `block_size`.
    k: keys of the own tokens.
    v: values of the own tokens.
    axis_name: of the mesh, that the sequence is cut over.
    capacity: blocks that a device fetches from another for a key-value head, at
      most: those that most of its tokens chose. None fetches all it wants.
    block_size: as in `dynamic_attention`, and so are all others.
    window: tokens; beside its own block it reaches over one device at most.
    num_remote: blocks that a token chooses.
    num_hashes: rounds of hashing.
    hash_bits: signs in a hash.
    selection: "lsh", "mean" or "none".
    projections: the same on all devices.
    is_causal: whether tokens see no later ones.
    segment_ids: of the own tokens; numbers hold across devices.
    span: of the own tokens.
    offset: of the own tokens.
    ramp: tokens over which the window fades.
    scale: of the logits.
    implementation: "xla", "tpu" or "gpu".

  Returns:
    Outputs of the own tokens.

  Raises:
    ValueError: shapes or types do not fit, or a number is out of its range.
    NameError: no axis of that name is mapped here.

  >>> import jax
  >>> from jax.sharding import AxisType, PartitionSpec as P
  >>> auto = (AxisType.Auto,)
  >>> mesh = jax.make_mesh((2,), ("sequence",), auto, devices=jax.devices()[:2])
  >>> def attend(x):
  ...   return sharded_dynamic_attention(
  ...     x, x, x, axis_name="sequence", block_size=8, window=16, capacity=2
  ...   )
  >>> spec = P(None, "sequence")
  >>> run = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
  >>> jax.jit(run).eval_shape(jnp.ones((1, 64, 2, 8))).shape
  (1, 64, 2, 8)

  References:
    Liu et al., "Ring Attention with Blockwise Transformers", 2023,
    https://arxiv.org/abs/2310.01889 (there all keys and values travel)
    Jacobs et al., "DeepSpeed Ulysses", 2023,
    https://arxiv.org/abs/2309.14509 (there all do too, cut by heads)
  """
  check_heads(q, k, v)
  for name, edge in (("span", span), ("offset", offset)):
    check_rows(name, edge, q.shape[:3], jnp.floating)
  layout = kernel.make_layout(block_size, window, is_causal, ramp)
  parts = cut_sequence(k, layout, axis_name, capacity)
  segments = whole_segments(parts, k, segment_ids)
  ids = choose_from_all(
    parts, q, k, segments, num_remote=num_remote, num_hashes=num_hashes,
    hash_bits=hash_bits, selection=selection, projections=projections,
  )  # fmt: skip
  if not ids.shape[-1]:
    parts = parts._replace(capacity=0)
  return _attend(
    parts, q, k, v, ids, segments, span=span, offset=offset, scale=scale,
    implementation=implementation,
  )  # fmt: skip


def _attend(
  parts: Parts,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  ids: Int[Array, "P T R"],
  segments: Int[Array, "P time"],
  *,
  span: Float[Array, "B T N"] | None,
  offset: Float[Array, "B T N"] | None,
  **options: Any,
) -> Float[Array, "B T N H"]:
  """Fetches what the own tokens see, and calls the kernel once for it."""
  batch, time, kv_heads, size = k.shape
  before, after = (n * parts.layout.block for n in parts.around)
  requests = plan_requests(parts, ids)

  def own(x: Array, fill: int = 0) -> Array:
    """Adds rows for what is not own; what comes of them is cut away."""
    widths = ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=fill)

  def rows(x: Array | None) -> Any:
    return None if x is None else own(by_head(x, kv_heads))

  kv = by_head(jnp.concatenate([k, v], -1), kv_heads)
  kv = kv.reshape(len(kv), parts.blocks, parts.layout.block, 2 * size)
  kv = gather_around(parts, kv, requests).reshape(len(kv), -1, 1, 2 * size)
  k, v = jnp.split(kv, 2, axis=-1)
  # Heads are rows of a batch: what is fetched differs from head to head.
  out = kernel.attend(
    rows(q), k, v, own(requests.places(ids)[:, :, None], -1), parts.layout,
    segment_ids=segments_around(parts, segments, requests), span=rows(span),
    offset=rows(offset), **options,
  )  # fmt: skip
  out = out[:, before : before + time]
  out = out.reshape(batch, kv_heads, *out.shape[1:])
  return jnp.moveaxis(out, 1, 2).reshape(q.shape)
