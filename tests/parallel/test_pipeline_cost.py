"""What a pipeline costs: time that stages idle, memory, and bytes sent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from stacks import (
  FEATURES,
  HIDDEN,
  LAYERS,
  ROWS,
  TIME,
  arguments,
  compiled,
  layer,
  make_mesh,
  placed,
)

from deepseek_jax import parallel

slow = pytest.mark.slow


def ticks_of(jaxpr):
  """Lengths of the outermost loops of a program."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan":
      found.append(equation.params["length"])
      continue
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        found += ticks_of(inner)
  return found


@pytest.mark.parametrize(
  ("name", "microbatches", "repeats"),
  [
    ("stage 4, fsdp 2", 8, 2),
    pytest.param("stage 4, fsdp 2", 4, 1, marks=slow),
    pytest.param("stage 2, data 2, tensor 2", 8, 1, marks=slow),
  ],
)
def test_the_bubble_is_measured_in_what_is_compiled(
  name, microbatches, repeats
):
  """Ticks from the compiled loop, and visits that counted from the layers."""
  mesh = make_mesh(name)
  count = lambda params, visits, x: (x * params, visits + 1)

  def run(params, visits, x):
    return parallel.pipeline(
      count, params, x, state=visits, microbatches=microbatches,
      repeats=repeats,
    )  # fmt: skip

  args = jnp.ones(16), jnp.zeros(16, jnp.int32), jnp.ones((ROWS, 4))
  args = jax.device_put(args, NamedSharding(mesh, P()))
  program = compiled(mesh, run, *args)
  visits = program(*args)[1]
  # One number a layer; the layers of a group make their visits together.
  stages = mesh.shape["stage"]
  groups = np.asarray(visits).reshape(stages, -1, repeats)
  assert (groups == groups[:, :1]).all()
  counted = groups[:, 0].sum(1)
  loops = re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', program.as_text())
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    (ticks,) = ticks_of(jax.make_jaxpr(run)(*args).jaxpr)
  assert str(ticks) in loops
  assert ticks == max(map(int, loops))
  expected = parallel.bubble(stages, microbatches, repeats)
  np.testing.assert_allclose(1 - counted / ticks, expected, rtol=1e-12)


def kept(**how):
  """Shapes of what is kept for the way back, on two stages."""
  mesh = make_mesh("stage 2, data 2, tensor 2")
  params, x, factor, shift = arguments()
  run = lambda params, x: parallel.pipeline(
    layer, params, x, factor, shift, microbatches=4, **how
  )[0]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    back = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], params, x)
  return [leaf.shape for leaf in jax.tree.leaves(back)]


def elements(shapes, ends):
  """Numbers in arrays whose shapes end so."""
  fits = [shape for shape in shapes if shape[-len(ends) :] == ends]
  return sum(map(np.prod, fits))


@pytest.mark.parametrize("remat", [False, True, "dots"])
def test_parameters_are_kept_once_and_not_for_every_tick(remat):
  shapes = kept(remat=remat)
  for ends in ((FEATURES, HIDDEN), (HIDDEN, FEATURES)):
    assert elements(shapes, ends) <= LAYERS * FEATURES * HIDDEN


def test_remat_keeps_nothing_but_what_enters():
  rows, stages, layers = ROWS // 4, 2, LAYERS // 2
  a_tick = stages * rows * TIME * FEATURES
  # What enters each layer in each of five ticks; with two groups, what enters
  # each group in each of nine.
  entering = elements(kept(remat=True), (TIME, FEATURES))
  assert entering <= 5 * layers * a_tick
  twice = kept(remat=True, repeats=2)
  assert elements(twice, (TIME, FEATURES)) <= 9 * a_tick
  assert elements(twice, (FEATURES, HIDDEN)) <= LAYERS * FEATURES * HIDDEN
  for shapes in (kept(remat=True), twice):
    assert elements(shapes, (TIME, HIDDEN)) == 0
  assert elements(kept(), (TIME, HIDDEN)) > 0


@pytest.mark.parametrize("repeats", [1, 2])
def test_with_dots_products_are_kept_but_no_parameters(repeats):
  shapes = kept(remat="dots", repeats=repeats)
  # One of its two products a layer reads on the way back: the first.
  ticks, in_a_tick = 4 * repeats + 1, LAYERS // 2 // repeats
  products = 2 * ticks * in_a_tick * ROWS // 4 * TIME * HIDDEN
  assert elements(shapes, (TIME, HIDDEN)) == products
  assert elements(shapes, (FEATURES, HIDDEN)) <= LAYERS * FEATURES * HIDDEN


def test_stages_exchange_microbatches_and_nothing_else():
  """No device gathers rows or parameters of another."""
  mesh = parallel.make_mesh(parallel.MeshSpec(stage=4, data=2))
  params, x, factor, shift = arguments()

  def step(params, x):
    run = lambda params, x: parallel.pipeline(
      layer, params, x, factor, shift, microbatches=8
    )[0]
    return jax.grad(lambda *a: jnp.square(run(*a)).sum(), argnums=(0, 1))(
      params, x
    )

  args = placed(mesh, params, x, factor, shift)[:2]
  text = compiled(mesh, step, *args).as_text()
  moved = re.findall(
    r"= (.*?) (all-gather|all-to-all|reduce-scatter|all-reduce"
    r"|collective-permute)(?:-start)?\(", text
  )  # fmt: skip
  kinds = {kind for _, kind in moved}
  assert kinds == {"collective-permute", "all-reduce"}
  a_microbatch = ROWS // 8 // 2 * TIME * FEATURES
  for shape, kind in moved:
    if kind == "collective-permute":
      sizes = re.findall(r"\[([\d,]*)\]", shape)
      for size in sizes:
        assert np.prod([int(n) for n in size.split(",")]) <= a_microbatch
