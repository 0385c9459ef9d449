"""Bytes on the wire: what states say is what compiled programs send."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from exchanges import PLACEMENTS, Placement, gradients

from deepseek_jax import comm

P = jax.sharding.PartitionSpec
SHAPES = {"bias": (96,), "kernel": (160, 96)}
SPECS = {"bias": P(), "kernel": P("fsdp")}
METHODS = {
  "bf16": comm.bf16_all_reduce,
  "int8": comm.int_all_reduce,
  "int4": functools.partial(comm.int_all_reduce, bits=4),
  "one_bit": functools.partial(comm.one_bit, block=64, refresh=1),
  "top_k": functools.partial(comm.top_k, fraction=0.05, block=64),
  "power_sgd": comm.power_sgd,
}


def total(compiled, mesh):
  found = comm.wire_bytes(compiled, mesh)
  return sum(sum(places.values()) for places in found.values())


@pytest.mark.parametrize(
  ("method", "place"),
  [(method, "data") for method in METHODS]
  + [("int8", "fsdp"), ("one_bit", "both"), ("power_sgd", "both")],
)
def test_states_say_what_programs_send(method, place):
  at = PLACEMENTS[place]
  specs = SPECS if at.cut else None
  tx = METHODS[method](at.axis_name, specs=specs)
  params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
  compiled, state = one_step(tx, at, params, specs)
  assert float(state.sent_bytes) == pytest.approx(
    total(compiled, at.mesh), rel=0.01
  )


def one_step(tx, at, params, specs=None):
  """A compiled step, and the state after it."""
  state = comm.init(tx, params, at.mesh, at.axis_name, specs)
  own, whole = comm.state_specs(state, at.axis_name), P()
  step = jax.shard_map(
    lambda grads, state, params: tx.update(
      jax.tree.map(lambda g: g[0], grads), state, params
    ),
    mesh=at.mesh,
    in_specs=(P(at.axes), own, whole if specs is None else specs),
    out_specs=(whole if specs is None else specs, own),
    check_vma=False,
  )
  grads = gradients(at.devices, 1, shapes=SHAPES)
  grads = {name: x[0] for name, x in grads.items()}
  compiled = jax.jit(step).lower(grads, state, params).compile()
  return compiled, jax.block_until_ready(compiled(grads, state, params))[1]


def test_looks_for_zeros_count_by_how_often_they_come():
  at = PLACEMENTS["data"]
  tx = comm.one_bit("data", block=64, refresh=4)
  params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
  compiled, state = one_step(tx, at, params)
  look = 2 * (at.devices - 1) / at.devices * params["kernel"].size / 8
  assert float(state.sent_bytes) + 0.75 * look == pytest.approx(
    total(compiled, at.mesh), rel=0.01
  )


MLP = {
  "in": (784, 2048),
  "hidden": (2048, 1024),
  "last": (1024, 1024),
  "out": (1024, 10),
} | {f"bias{i}": (size,) for i, size in enumerate((2048, 1024, 1024, 10))}
RATIOS = {
  "int8": (comm.int_all_reduce, 3.9),
  "int4": (functools.partial(comm.int_all_reduce, bits=4), 7.4),
  "one_bit": (comm.one_bit, 28),
  "top_k": (functools.partial(comm.top_k, fraction=0.01), 15),
  "power_sgd": (comm.power_sgd, 100),
}


@pytest.mark.parametrize(
  ("method", "devices"),
  [(method, 8) for method in RATIOS]
  + [pytest.param(method, 2, marks=pytest.mark.slow) for method in RATIOS],
)
def test_it_sends_so_many_times_less_than_float32(method, devices):
  make, least = RATIOS[method]
  at = Placement((devices,), ("data",), "data")
  params = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in MLP.items()
  }
  size = sum(math.prod(shape) for shape in MLP.values())
  part = (devices - 1) / devices
  sent = total(lowered(make("data"), at, params).compile(), at.mesh)
  if method == "one_bit":  # All but one of 64 steps do not look for zeros.
    sent -= 2 * part * size / 8 * 63 / 64
  assert 2 * part * 4 * size / sent >= least


def lowered(tx, at, params, **options):
  init = lambda params: comm.init(tx, params, at.mesh, "data")
  state = jax.eval_shape(init, params)
  own = comm.state_specs(state, "data")
  step = jax.shard_map(
    lambda grads, state: tx.update(grads, state, grads),
    mesh=at.mesh,
    in_specs=(P(), own),
    out_specs=(P(), own),
    check_vma=False,
  )
  return jax.jit(step).trace(params, state).lower(**options)


@pytest.mark.parametrize("method", METHODS)
def test_it_lowers_for_tpus(method):
  params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
  program = lowered(
    METHODS[method]("data"),
    PLACEMENTS["data"],
    params,
    lowering_platforms=("tpu",),
  )
  types = {"bf16": "ui16", "int8": "i8", "int4": "i8", "one_bit": "ui8"}
  sent = [
    line
    for line in program.as_text().splitlines()
    if "stablehlo.all_to_all" in line
  ]
  assert bool(sent) == (method != "power_sgd")
  if method in types:
    assert any(f"x{types[method]}>" in line for line in sent)
