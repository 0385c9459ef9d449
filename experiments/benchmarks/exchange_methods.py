"""What `exchange.py` compares, and the step that all of them take."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_jax import comm

AXIS = "data"
SPEEDS = (1.0, 1.0, 0.5, 0.25)  # Of the workers of the asynchronous mode.
# An MLP of 5,266,452 parameters: the one of earlier measurements.
SIZES = (3072, 1024, 1024, 1024, 20)
# Steps between exchanges, of methods whose workers step for themselves.
PERIODS = {
  "DiLoCo 10": 10, "DiLoCo 50": 50, "DiLoCo 50 calm": 50, "DiLoCo 10 int8": 10,
}  # fmt: skip
ALONE = (*PERIODS, "asynchronous", "asynchronous even")

Transform = optax.GradientTransformation


def float32() -> Transform:
  """Averages gradients as they are: what others are compared with."""
  mean = lambda grads, params: jax.lax.pmean(grads, AXIS)
  return optax.stateless(mean)


def exchanges(warmup: int = 0) -> dict[str, Transform]:
  """Returns what averages gradients, by name; the coarsest after a warm-up."""
  return {
    "float32": float32(),
    "bf16": comm.bf16_all_reduce(AXIS),
    "int8": comm.int_all_reduce(AXIS),
    "int4": comm.int_all_reduce(AXIS, bits=4),
    "1 bit": comm.one_bit(AXIS, warmup=warmup),
    "1 bit 256": comm.one_bit(AXIS, block=256, warmup=2 * warmup),
    "top-k 1 %": comm.top_k(AXIS, warmup=warmup),
    "PowerSGD 4": comm.power_sgd(AXIS, 4),
    "PowerSGD 2": comm.power_sgd(AXIS, 2),
    "delayed": comm.delayed(float32()),
  }


NAMES = (*exchanges(), *ALONE)


def build(name: str, inner: Transform, warmup: int = 0) -> Any:
  """Returns the optimizer `inner` with a method of exchange.

  All with their defaults, but for "1 bit 256", with smaller blocks and a longer
  warm-up, and "calm", with an outer momentum of 0.6.
  """
  if name.startswith("asynchronous"):
    speeds = (1.0,) * len(SPEEDS) if "even" in name else SPEEDS
    return comm.asynchronous(inner, AXIS, speeds=speeds)
  if name in PERIODS:
    int8 = comm.int_all_reduce(AXIS) if "int8" in name else None
    calm = optax.sgd(0.7, momentum=0.6, nesterov=True)
    return comm.diloco(
      inner, AXIS, period=PERIODS[name], compression=int8,
      outer=calm if "calm" in name else None,
    )  # fmt: skip
  return optax.chain(exchanges(warmup)[name], inner)


def make_mesh(devices: Sequence[Any]) -> Mesh:
  """Returns a mesh of one axis."""
  return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def stepper(
  loss: Callable[..., jax.Array],
  tx: Any,
  mesh: Mesh,
  params: Any,
  *,
  alone: bool,
  count: int = 0,
) -> tuple[Any, Any]:
  """Returns a jitted step, and what it begins with: (params, state).

  Args:
    loss: Of parameters and the arrays of a batch.
    tx: Optimizer with exchange.
    mesh: Of `make_mesh`.
    params: Arrays, or their shapes.
    alone: Whether workers step for themselves, and have losses of their own.
    count: Of the arrays of a batch; they are cut along their first axis.
  """
  tx = optax.with_extra_args_support(tx)
  is_abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
  start = lambda p: comm.init(tx, p, mesh, AXIS)
  state = jax.eval_shape(start, params) if is_abstract else start(params)
  whole, rows = PartitionSpec(), PartitionSpec(AXIS)
  specs = comm.state_specs(state, AXIS)

  def local(params, state, *batch):
    own = comm.local_params(state, params)
    value, grads = jax.value_and_grad(loss)(own, *batch)
    value = value if alone else jax.lax.pmean(value, AXIS)
    updates, state = tx.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state, value[None]

  place = lambda spec: NamedSharding(mesh, spec)
  kept = (place(whole), jax.tree.map(place, specs))
  sharded = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(whole, specs, *(rows,) * count),
    out_specs=(whole, specs, rows),
    check_vma=False,
  )
  step = jax.jit(
    sharded, donate_argnums=(0, 1), out_shardings=(*kept, place(rows))
  )
  if is_abstract:
    give = lambda tree, places: jax.tree.map(
      lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
      tree,
      places,
    )
    same = jax.tree.map(lambda _: kept[0], params)
    return step, (give(params, same), give(state, kept[1]))
  # A copy, as the step donates what it is given.
  params = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=kept[0])(
    params
  )
  return step, (params, jax.device_put(state, kept[1]))


def mlp(seed: int, sizes: Sequence[int] = SIZES) -> dict[str, jax.Array]:
  """Returns the parameters of a multi-layer perceptron."""
  rng = np.random.default_rng(seed)
  params = {}
  for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
    draw = rng.normal(size=(rows, columns)) * np.sqrt(2 / rows)
    params[f"kernel_{i}"] = jnp.asarray(draw, jnp.float32)
    params[f"bias_{i}"] = jnp.zeros(columns)
  return params


def mlp_loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the mean cross-entropy, in nats."""
  last = len(params) // 2 - 1
  for i in range(last + 1):
    x = x @ params[f"kernel_{i}"] + params[f"bias_{i}"][None]
    x = jax.nn.relu(x) if i < last else x
  return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


@functools.cache
def size_of_mlp() -> int:
  """Returns its number of parameters."""
  return sum((a + 1) * b for a, b in itertools.pairwise(SIZES))
