"""Bytes that an exchange sends, and how long a step takes to compile."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import exchange_methods as methods
import exchange_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import comm, optim

TOPOLOGY = "v5e:2x4"
# Of the bytes of float32.
ASKED = {
  "int8": 3.9, "int4": 7.4, "1 bit": 28, "1 bit 256": 28,
  "PowerSGD 4": 100, "top-k 1 %": 15,
}  # fmt: skip
ASKED_COMPILE = 1.5


def case(flags: Any, keep: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
  """Returns bytes and seconds, by method; hands each part to `keep`, too."""
  found: dict[str, Any] = {
    "parameters": methods.size_of_mlp(),
    "sizes": methods.SIZES,
    "sent": {n: sent(n, flags) for n in (2, 8)},
  }
  show_sent(found["sent"])
  keep(found)
  found["compile"] = {"mlp, adam": compile_times(mlp_step, 3, flags)}
  keep(found)
  names = None if flags.only else ("float32", "int8", "PowerSGD 4", "DiLoCo 10")
  found["compile"]["bytes, deepseek"] = compile_times(
    text_step, 1, flags, names
  )
  show_compile(found["compile"])
  keep(found)
  if importlib.util.find_spec("libtpu") is not None and not flags.tiny:
    found["tpu"] = {"topology": TOPOLOGY} | tpu(flags)
    print(f"\nseconds to compile for {TOPOLOGY}: {found['tpu']}")
  return found


def chosen(flags: Any) -> list[str]:
  """Returns the methods that were asked for, with float32."""
  names = [x for x in methods.NAMES if flags.only is None or x in flags.only]
  return ["float32", *(x for x in names if x != "float32")]


def sent(count: int, flags: Any) -> dict[str, Any]:
  """Returns bytes of one exchange by the program and by the state, by method.

  Of the mode with workers that meet, when all meet. The program of 1 bit is the
  one that also looks where zeros are; the state says what a step sends on
  average. "saved" is what float32's all-reduce sends by what is sent a step.
  """
  mesh = methods.make_mesh(jax.devices()[:count])
  sizes = (64, 96, 20) if flags.tiny else methods.SIZES
  params = methods.mlp(0, sizes)
  plain = 2 * (count - 1) / count * 4 * sum(
    x.size for x in jax.tree.leaves(params)
  )  # fmt: skip
  found = {}
  for name in chosen(flags):
    if name.startswith("asynchronous") and count != runs.WORKERS:
      continue  # Its speeds are those of so many; it sends as DiLoCo does.
    tx = methods.build(name, optax.sgd(0.1))
    program, state = _exchanged(tx, params, mesh)
    period = methods.PERIODS.get(name, 1)
    told = program if state is None or period > 1 else state
    found[name] = {
      "program": program, "state": state, "saved": plain * period / told,
    }  # fmt: skip
  return found


def _exchanged(tx: Any, params: Any, mesh: Any) -> tuple[float, float | None]:
  """Returns what the program of an exchange sends, and what its state says."""
  state = comm.init(tx, params, mesh, methods.AXIS)
  specs, whole = comm.state_specs(state, methods.AXIS), PartitionSpec()
  update = jax.jit(
    jax.shard_map(
      lambda params, state: tx.update(params, state, params),
      mesh=mesh,
      in_specs=(whole, specs),
      out_specs=(whole, specs),
      check_vma=False,
    )
  )
  compiled = update.lower(params, state).compile()
  program = sum(
    sum(places.values()) for places in comm.wire_bytes(compiled).values()
  )
  place = NamedSharding(mesh, whole)
  _, state = compiled(jax.device_put(params, place), state)
  exchanges = comm.state.find(state, comm.ExchangeState)
  told = [float(x.sent_bytes) for x in exchanges]
  return program, (sum(told) if told and sum(told) else None)


def show_sent(found: dict[int, Any]) -> None:
  """Prints how many times less than float32 is sent a step."""
  few, many = found.values()
  print(f"\n{'':16} times less than float32, 2 and 8 devices  asked")
  for name in few:
    columns = f"{few[name]['saved']:9.2f} {many[name]['saved']:9.2f}"
    told = [row[name]["state"] for row in (few, many)]
    agree = "" if None in told else " program / state " + " ".join(
      f"{row[name]['program'] / row[name]['state']:.3f}" for row in (few, many)
    )  # fmt: skip
    print(f"{name:16} {columns}  {ASKED.get(name, '')} {agree}")


def mlp_step(name: str, mesh: Any, sizes: Any = methods.SIZES) -> Any:
  """Returns a lowered step of the MLP with Adam."""
  params = jax.eval_shape(lambda: methods.mlp(0, sizes))
  tx = methods.build(name, optax.adam(1e-3))
  alone = name in methods.ALONE
  step, carry = methods.stepper(
    methods.mlp_loss, tx, mesh, params, alone=alone, count=2
  )
  rows = NamedSharding(mesh, PartitionSpec(methods.AXIS))
  give = lambda shape, kind: jax.ShapeDtypeStruct(shape, kind, sharding=rows)
  batch = 32 * mesh.size
  return step.lower(
    *carry, give((batch, sizes[0]), jnp.float32), give((batch,), jnp.int32)
  )


def text_step(name: str, mesh: Any) -> Any:
  """Returns a lowered step of the byte model with `deepseek()`."""
  task = runs.text()
  params = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, task.start(0)))
  tx = methods.build(name, optim.deepseek(average=0))
  step, carry = methods.stepper(
    task.loss, tx, mesh, params, alone=name in methods.ALONE, count=2
  )
  rows = NamedSharding(mesh, PartitionSpec(methods.AXIS))
  tokens = jax.ShapeDtypeStruct((4 * mesh.size, 64), jnp.int32, sharding=rows)
  return step.lower(*carry, tokens, tokens)


def compile_times(
  lowered: Any, repeats: int, flags: Any, names: Any = None
) -> dict[str, Any]:
  """Returns seconds that a step for 4 fake devices takes, and the ratio."""
  mesh = methods.make_mesh(jax.devices()[: runs.WORKERS])
  names = names or chosen(flags)
  seconds: dict[str, list[float]] = {name: [] for name in names}
  for number in range(1 if flags.tiny else repeats):
    for name in names:
      jax.clear_caches()
      start = time.perf_counter()
      lowered(name, mesh).compile()
      seconds[name].append(time.perf_counter() - start)
    print(f"compiled {number + 1} times", flush=True)
  plain = np.array(seconds["float32"])
  return {
    name: {
      "seconds": [round(x, 2) for x in times],
      "ratio": round(float(np.median(np.array(times) / plain)), 2),
    }
    for name, times in seconds.items()
  }


def show_compile(found: dict[str, Any]) -> None:
  """Prints the compile times."""
  print(f"\nseconds to compile a step / plain (asked {ASKED_COMPILE:g})")
  for name in next(iter(found.values())):
    columns = [
      f"{task}: {np.median(rows[name]['seconds']):6.2f} s, "
      f"{rows[name]['ratio']:.2f}x"
      for task, rows in found.items()
      if name in rows
    ]
    print(f"  {name:16}", "   ".join(columns))


def tpu(flags: Any) -> dict[str, Any]:
  """Returns seconds to compile the MLP's step for TPUs, by method."""
  from jax.experimental import topologies

  place = topologies.get_topology_desc(TOPOLOGY, "tpu")
  found: dict[str, float | str] = {}
  for name in chosen(flags):
    count = (
      runs.WORKERS if name.startswith("asynchronous") else len(place.devices)
    )
    mesh = methods.make_mesh(place.devices[:count])
    start = time.perf_counter()
    try:
      mlp_step(name, mesh).compile()
      found[name] = round(time.perf_counter() - start, 1)
    except Exception as error:  # It is the finding.
      found[name] = f"{type(error).__name__}: {str(error)[:300]}"
    print(f"{name}: {found[name]}", flush=True)
  return found
