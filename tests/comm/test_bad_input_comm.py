"""Errors that say which argument, which rule and which value."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from exchanges import PLACEMENTS, SMALL

from deepseek_jax import comm

P = jax.sharding.PartitionSpec
AT = PLACEMENTS["data"]
BOTH = ("data", "fsdp")
sgd = optax.sgd(0.1)
PARAMS = {"bias": jnp.ones(3), "kernel": jnp.ones((6, 4))}
EXCHANGES = {
  "bf16": comm.bf16_all_reduce,
  "int": comm.int_all_reduce,
  "one_bit": comm.one_bit,
  "top_k": comm.top_k,
  "power_sgd": comm.power_sgd,
}
WORKERS = {
  "diloco": lambda axis: comm.diloco(sgd, axis),
  "asynchronous": lambda axis: comm.asynchronous(sgd, axis, speeds=(1.0,) * 4),
}


def unchecked(make):
  # The annotations refuse some of these first, where they are checked.
  return getattr(make, "__wrapped__", make)


def diloco(**arguments):
  return unchecked(comm.diloco)(sgd, "data", **arguments)


def asynchronous(**arguments):
  arguments = {"speeds": (1.0, 0.5)} | arguments
  return unchecked(comm.asynchronous)(sgd, "data", **arguments)


def of(make):
  return lambda **arguments: unchecked(make)("data", **arguments)


TABLE = [
  (comm.int_all_reduce, {"bits": 5}, r"bits must be one of \(8, 4\).*bits=5"),
  (comm.int_all_reduce, {"block": 3}, "block must be a multiple of 2.*block=3"),
  (comm.int_all_reduce, {"block": 0}, "block must be an integer, at least 1"),
  (comm.int_all_reduce, {"min_size": -1}, "min_size must .* got min_size=-1"),
  (comm.one_bit, {"block": 12}, "block must be a multiple of 8, got block=12"),
  (comm.one_bit, {"refresh": 0}, "refresh must .* got refresh=0"),
  (comm.one_bit, {"warmup": -1}, "warmup must .* got warmup=-1"),
  (comm.one_bit, {"warmup": 1.5}, "warmup must be an integer.* warmup=1.5"),
  (comm.top_k, {"fraction": 0}, r"fraction must be in \(0, 1\].*fraction=0"),
  (comm.top_k, {"fraction": 1.5}, "fraction must .* got fraction=1.5"),
  (comm.top_k, {"fraction": float("nan")}, "fraction must .* fraction=nan"),
  (comm.top_k, {"second_fraction": 0}, "second_fraction must .*=0"),
  (comm.top_k, {"block": 0}, "block must .* got block=0"),
  (comm.top_k, {"block": 65537}, r"block must be in \[1, 65536\].*=65537"),
  (comm.power_sgd, {"rank": 0}, "rank must .* at least 1, got rank=0"),
  (comm.power_sgd, {"rank": 2.0}, "rank must be an integer.* rank=2.0"),
  (diloco, {"period": 0}, "period must .* got period=0"),
  (diloco, {"fragments": 0}, "fragments must .* got fragments=0"),
  (
    diloco,
    {"fragments": 3, "period": 2},
    "fragments must be at most period, got fragments=3 for period=2",
  ),
  (diloco, {"local_steps": (1, 0)}, r"local_steps\[1\] must .* at least 1"),
  (
    diloco,
    {"local_steps": (9, 1), "period": 2},
    "local_steps must be at most period, got 9 for period=2",
  ),
  (asynchronous, {"speeds": (1.0, 0.0)}, r"speeds\[1\] must be in \(0, 1\]"),
  (asynchronous, {"speeds": (2.0, 1.0)}, r"speeds\[0\] must .*=2.0"),
  (asynchronous, {"period": 0}, "period must"),
  (asynchronous, {"max_staleness": -1}, "max_staleness must .*=-1"),
  (asynchronous, {"outer_rate": 0}, "outer_rate must .* got outer_rate=0"),
  (asynchronous, {"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), TABLE)
def test_arguments_out_of_range_are_named(make, arguments, message):
  make = make if make in (diloco, asynchronous) else of(make)
  with pytest.raises(ValueError, match=message):
    make(**arguments)


@pytest.mark.parametrize("steps", [0, 1.5, -1])
def test_delays_are_whole_numbers(steps):
  delayed = unchecked(comm.delayed)
  with pytest.raises(ValueError, match=f"steps must .* got steps={steps}"):
    delayed(comm.int_all_reduce("data"), steps)


def test_a_delay_needs_the_axis_that_cuts_parameters():
  exchange = comm.int_all_reduce("fsdp", specs=P("fsdp"))
  with pytest.raises(ValueError, match=r"axis_name must .* got axis_name=\(\)"):
    comm.delayed(exchange, specs=P("fsdp"))


@pytest.mark.parametrize("make", EXCHANGES.values(), ids=EXCHANGES)
@pytest.mark.parametrize(
  ("axis_name", "specs", "message"),
  [
    ((), None, r"axis_name must name one mesh axis .* got axis_name=\(\)"),
    (("data", "data"), None, "axis_name must .* got"),
    (
      BOTH,
      {"kernel": P("data", "fsdp"), "bias": P()},
      r"specs must cut .* over one axis .* got \['data', 'fsdp'\]",
    ),
    (BOTH, {"kernel": P(BOTH), "bias": P()}, "specs must cut"),
  ],
)
def test_axes_and_specs_that_do_not_fit_are_named(
  make, axis_name, specs, message
):
  with pytest.raises(ValueError, match=message):
    make(axis_name, specs=specs)


def all_of(axis):
  made = {name: make(axis, **SMALL) for name, make in EXCHANGES.items()}
  made |= {name: make(axis) for name, make in WORKERS.items()}
  return made | {"delayed": comm.delayed(made["int"])}


def abstract_step(tx, params, grads=None, specs=None, at=AT, init_at=AT):
  """Makes the state where it can be made; updates where `at` says."""
  grads = params if grads is None else grads
  axis = init_at.axis_name

  def step(grads, state, params):
    return tx.update(grads, state, params)[0]

  state = jax.eval_shape(
    lambda params: comm.init(tx, params, init_at.mesh, axis, specs), params
  )
  if at is None:
    alone = lambda x: jnp.zeros(x.shape, x.dtype)
    return jax.eval_shape(step, grads, jax.tree.map(alone, state), params)
  whole = P() if specs is None else specs
  mapped = jax.shard_map(
    step,
    mesh=at.mesh,
    in_specs=(P(), comm.state_specs(state, axis), whole),
    out_specs=whole,
    check_vma=False,
  )
  return jax.eval_shape(mapped, grads, state, params)


@pytest.mark.parametrize("name", all_of("data"))
def test_outside_of_a_shard_map_it_says_so(name):
  tx = all_of("data")[name]
  message = "axis_name must name axes .* there is none here; got 'data'"
  with pytest.raises(ValueError, match=message):
    tx.init(PARAMS)
  with pytest.raises(ValueError, match=message):
    abstract_step(tx, PARAMS, at=None)
  # Also where all there is is exempt.
  with pytest.raises(ValueError, match=message):
    tx.init({"bias": jnp.ones(3)})


@pytest.mark.parametrize("name", all_of("data"))
def test_an_axis_that_does_not_exist_is_named(name):
  tx = all_of("dta")[name]
  message = r"axes .* whose axes are \('data',\); got 'dta'"
  with pytest.raises(ValueError, match=message):
    comm.init(tx, PARAMS, AT.mesh, "data")


def test_ranks_above_the_sides_are_named_with_the_parameter():
  tx = comm.power_sgd("data", rank=5, **SMALL)
  message = r"rank must be at most .* rank=5 for 'kernel'.* \(6, 4\); exempt it"
  with pytest.raises(ValueError, match=message):
    comm.init(tx, PARAMS, AT.mesh, "data")
  exempt = comm.power_sgd("data", rank=5, exempt=("kernel",), **SMALL)
  comm.init(exempt, PARAMS, AT.mesh, "data")


@pytest.mark.parametrize("count", [3, 5])
def test_numbers_of_other_workers_are_refused(count):
  rule = f"must have one number for each of 4 workers, got {count}"
  for tx, name in (
    (comm.diloco(sgd, "data", local_steps=(1,) * count), "local_steps"),
    (comm.asynchronous(sgd, "data", speeds=(1.0,) * count), "speeds"),
  ):
    with pytest.raises(ValueError, match=f"{name} {rule}"):
      comm.init(tx, PARAMS, AT.mesh, "data")


def test_more_fragments_than_arrays_are_refused():
  tx = comm.diloco(sgd, "data", fragments=3)
  message = "fragments must be at most .* got fragments=3 for 2"
  with pytest.raises(ValueError, match=message):
    comm.init(tx, PARAMS, AT.mesh, "data")


@pytest.mark.parametrize("name", WORKERS)
def test_workers_need_the_common_parameters(name):
  tx = WORKERS[name]("data")
  with pytest.raises(ValueError, match="params must be given"):
    unchecked(tx.update)(PARAMS, None, None)


FSDP = PLACEMENTS["fsdp"]
CUT = {"bias": P(), "kernel": P(None, "fsdp")}


@pytest.mark.parametrize("name", EXCHANGES)
def test_gradients_that_were_summed_before_are_refused(name):
  tx = EXCHANGES[name]("fsdp", specs=CUT, **SMALL)
  part = {"bias": jnp.ones(3), "kernel": jnp.ones((6, 1))}
  message = (
    r"updates must be whole gradients.* got shape \(6, 1\) for 'kernel', whose "
    r"part has \(6, 1\), cut along 1 in 4"
  )
  rank = {"rank": 1} if name == "power_sgd" else {}
  tx = EXCHANGES[name]("fsdp", specs=CUT, **SMALL, **rank)
  with pytest.raises(ValueError, match=message):
    abstract_step(tx, PARAMS, part, specs=CUT, at=FSDP, init_at=FSDP)


def test_parts_of_parameters_must_be_given():
  tx = comm.int_all_reduce("fsdp", specs=CUT, **SMALL)
  with pytest.raises(ValueError, match="params must be given where specs cut"):
    tx.update(PARAMS, None)


@pytest.mark.parametrize("name", all_of("data"))
def test_whole_numbers_are_refused_by_their_path(name):
  params = {"count": np.int32(3), "kernel": jnp.ones((6, 4))}
  params["count"] = jnp.asarray(params["count"])
  message = "params must be floating .* got int32 for '.*count'"
  with pytest.raises(ValueError, match=message):
    comm.init(all_of("data")[name], params, AT.mesh, "data")


def test_exemptions_of_nothing_are_refused():
  tx = comm.int_all_reduce("data", exempt=("head/.*",))
  with pytest.raises(ValueError, match=re.escape("head/.*")):
    comm.init(tx, PARAMS, AT.mesh, "data")
