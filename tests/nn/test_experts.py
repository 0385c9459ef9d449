"""Laws of mixtures of experts beyond those of all modules."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from flax.errors import TraceContextError

from deepseek_jax import nn
from deepseek_jax.nn import expert_slots, grouped_product
from deepseek_jax.train import state as state_lib

FEATURES, HIDDEN, EXPERTS = 6, 10, 8
slow = pytest.mark.slow


def build(**options):
  defaults = {"num_experts": EXPERTS}
  return nn.MixtureOfExperts(
    FEATURES, HIDDEN, **defaults | options, rngs=nnx.Rngs(0)
  )


def normal(*shape, seed=0):
  draw = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(draw, jnp.float32)


class Run(NamedTuple):
  y: jax.Array
  chosen: jax.Array
  rest: Any  # What is no parameter, after the call.


@functools.partial(jax.jit, static_argnums=0)
def _run(structure, params, rest, x):
  layer = nnx.merge(structure, params, rest)
  chosen = layer.route(x).chosen
  return Run(layer(x), chosen, state_lib.split(layer)[2])


def run(layer, x):
  """Calls a layer, which stays as it is."""
  return _run(*state_lib.split(layer), x)


def plain(variable):
  return np.asarray(variable[...], np.float64)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def one_by_one(layer, x):
  """What the layer computes, as loops in float64: images and choices."""
  rows = np.asarray(x, np.float64).reshape(-1, FEATURES)
  scores = {"sigmoid": sigmoid, "softmax": softmax}[layer.gate](
    rows @ plain(layer.router.kernel)
  )
  gate, up, down = map(
    plain, (layer.experts.gate, layer.experts.up, layer.experts.down)
  )
  bias = 0 if layer.bias is None else plain(layer.bias)
  y, chosen = np.zeros_like(rows), []
  for row, score, out in zip(rows, scores, y, strict=True):
    best = np.argsort(-(score + bias), kind="stable")[: layer.top_k]
    weights = score[best]
    if layer.top_k > 1:
      weights = weights / weights.sum()
    for expert, weight in zip(best, weights, strict=True):
      inner = row @ gate[expert]
      hidden = inner * sigmoid(inner) * (row @ up[expert])
      out += weight * (hidden @ down[expert])
    chosen.append(best)
  if layer.shared is not None:
    y += np.asarray(layer.shared(x), np.float64).reshape(y.shape)
  return y.reshape(x.shape), np.array(chosen).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize(
  ("gate", "top_k", "rows"),
  [
    ("sigmoid", 3, (2, 41)),
    ("softmax", 1, (2, 41)),
    ("sigmoid", 1, (1,)),
    ("softmax", EXPERTS, (1,)),
  ],
  ids=str,
)
def test_it_is_its_formula(gate, top_k, rows):
  layer = build(gate=gate, top_k=top_k, num_shared=1)
  layer.eval()
  # Far enough that it chooses otherwise than the scores would.
  layer.bias[...] = 0.3 * normal(EXPERTS, seed=1)
  x = normal(*rows, FEATURES)
  expected, chosen = one_by_one(layer, x)
  found = run(layer, x)
  np.testing.assert_array_equal(found.chosen, chosen)
  np.testing.assert_allclose(found.y, expected, atol=1e-5)
  layer.bias[...] *= 0
  assert len(rows) < 2 or np.any(run(layer, x).chosen != chosen)


def every_expert(layer, x):
  """The same, computed for all experts and masked; differentiable."""
  routing = layer.route(x)
  mask = jax.nn.one_hot(routing.chosen, EXPERTS)
  share = jnp.einsum("btk,btke->bte", routing.weights, mask)
  bank = layer.experts
  hidden = jax.nn.silu(jnp.einsum("btd,edh->bteh", x, bank.gate[...]))
  hidden *= jnp.einsum("btd,edh->bteh", x, bank.up[...])
  y = jnp.einsum("bteh,ehd,bte->btd", hidden, bank.down[...], share)
  return y + layer.shared(x)


@pytest.mark.parametrize("top_k", [pytest.param(1, marks=slow), 2])
def test_gradients_are_those_of_all_experts_masked(top_k):
  layer = build(top_k=top_k, num_shared=2)
  layer.eval()
  structure, params, rest = state_lib.split(layer)
  x = normal(2, 41, FEATURES)

  @functools.partial(jax.jit, static_argnums=0)
  def grads(way, params, x):
    def loss(params, x):
      return jnp.sin(way(nnx.merge(structure, params, rest), x)).sum()

    return jax.grad(loss, (0, 1))(params, x)

  found, expected = (
    grads(way, params, x) for way in (lambda layer, x: layer(x), every_expert)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected
  )
  assert all(grad.any() for grad in jax.tree.leaves(found))


def test_tokens_do_not_see_each_other():
  layer, x = build(), normal(3, 30, FEATURES)
  before = run(layer, x).y
  turned = run(layer, x[:, ::-1]).y[:, ::-1]
  np.testing.assert_allclose(turned, before, atol=1e-6)
  after = run(layer, x.at[:, 7:].set(normal(3, 23, FEATURES, seed=1))).y
  np.testing.assert_allclose(after[:, :7], before[:, :7], atol=1e-6)
  assert np.abs(after - before)[:, 7:].max() > 0.1


def test_all_tokens_may_choose_the_same_experts():
  layer = build(top_k=2)
  layer.eval()
  layer.bias[...] = jnp.zeros(EXPERTS).at[jnp.array([3, 5])].set(9.0)
  x = normal(2, 64, FEATURES)
  found = run(layer, x)
  assert set(np.unique(found.chosen)) == {3, 5}
  np.testing.assert_allclose(found.y, one_by_one(layer, x)[0], atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_blocks_are_enough_however_rows_are_shared_out(groups, rows):
  block = grouped_product.block_size(rows, groups)
  blocks = grouped_product.block_count(rows, groups, block)
  rng = np.random.default_rng(0)
  needed = []
  for concentration in (0.01, 0.1, 1.0, 100.0):
    for _ in range(50):
      shares = rng.dirichlet([concentration] * groups)
      counts = rng.multinomial(rows, shares)
      needed.append(np.ceil(counts / block).sum())
  worst = np.ones(groups) if rows >= groups else np.ones(rows)
  worst[0] += rows - worst.sum()
  needed.append(np.ceil(worst / block).sum())
  assert max(needed) <= blocks <= (1.25 * rows + 1) // block + groups


@pytest.mark.parametrize("counts", [[1, 0, 3], [0, 0, 0]], ids=str)
def test_ways_of_the_grouped_product_are_one(counts):
  """What a TPU does is what all others do, with rows beyond the last group."""
  x, matrices = normal(5, 4, 6), normal(3, 6, 2, seed=1)
  counts = jnp.array(counts, jnp.int32)
  ways = (
    grouped_product._ragged,
    grouped_product._blocked,
    grouped_product.grouped_product,
  )

  @jax.jit
  def all_ways(x, matrices, counts):
    loss = lambda way: lambda x, m: jnp.sin(way(x, m, counts)).sum()
    grad = lambda way: jax.value_and_grad(loss(way), (0, 1))(x, matrices)
    return [grad(way) for way in ways]

  expected, *others = all_ways(x, matrices, counts)
  for found in others:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected
    )


def test_choices_beyond_the_room_are_dropped_the_latest_first():
  chosen = jnp.array([[0, 1], [1, 0], [0, 2], [0, 1], [1, 0]], jnp.int32)
  first = jnp.array([0, 2, 4], jnp.int32)

  @jax.jit
  def there_and_back(x):
    order, counts = expert_slots.sort_choices(chosen, 3)
    slots = expert_slots.lay_out(chosen, order, counts, first, room=2, size=6)
    rows = expert_slots.spread(x, slots)
    return counts, slots, rows, expert_slots.collect(rows, slots)

  x = normal(5, 3)
  counts, slots, rows, back = jax.tree.map(np.asarray, there_and_back(x))
  assert counts.tolist() == [5, 4, 1]
  assert slots.place.tolist() == [[0, 2], [3, 1], [6, 4], [6, 6], [6, 6]]
  assert slots.source.tolist() == [0, 3, 1, 2, 5, 10]
  tokens = np.asarray(x)
  np.testing.assert_array_equal(rows[:5], tokens[[0, 1, 0, 1, 2]])
  np.testing.assert_array_equal(back[0], tokens[[0, 0]])
  assert not rows[5].any()
  assert not back[3:].any()


def test_the_bias_moves_tokens_to_idle_experts():
  layer = build(bias_rate=0.004)
  # All tokens like the first experts best.
  x = normal(16, 32, FEATURES).at[..., 0].add(3.0)
  layer.router.kernel[...] *= 0.3
  layer.router.kernel[0] = jnp.linspace(0.4, 0, EXPERTS)
  structure, params, rest = state_lib.split(layer)
  busiest = []
  for _ in range(99):
    _, chosen, rest = _run(structure, params, rest, x)
    counts = np.bincount(np.ravel(chosen), minlength=EXPERTS)
    busiest.append(counts.max() / counts.mean())
  assert busiest[0] > 2.5
  assert max(busiest[-10:]) < 1.15
  layer = nnx.merge(structure, params, rest)
  bias = plain(layer.bias)
  assert bias[0] == bias.min()
  assert abs(bias.mean()) < 1e-6
  read = nn.expert_loads(layer)[""]
  assert 1 <= max(read.experts) <= read.busiest
  np.testing.assert_allclose(read.busiest, np.mean(busiest), rtol=1e-5)


def test_the_bias_rises_for_who_has_less_than_the_mean():
  counts = jnp.array([2**30, 2**30 - 1, 3, 0], jnp.int32) // 8
  moved = nn.moved_bias(jnp.zeros(4), counts, 0.5)
  np.testing.assert_allclose(moved, [-0.5, -0.5, 0.5, 0.5])
  equal = nn.moved_bias(jnp.zeros(3), jnp.full(3, 7, jnp.int32), 0.5)
  assert not equal.any()


@pytest.mark.parametrize(
  "balance",
  ["bias", *(pytest.param(x, marks=slow) for x in ("auxiliary", "none"))],
)
def test_what_balances_is_no_parameter_and_rests_in_evaluation(balance):
  layer, x = build(balance=balance), normal(2, 9, FEATURES)
  names = {
    "/".join(map(str, path))
    for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))
  }
  assert names == {
    "router/kernel", "experts/gate", "experts/up", "experts/down",
  }  # fmt: skip
  assert (layer.bias is not None) == (balance == "bias")
  before = state_lib.split(layer)[2]
  layer.eval()
  jax.tree.map(np.testing.assert_array_equal, run(layer, x).rest, before)
  layer.train()
  changed = jax.tree.map(
    lambda a, b: bool(np.any(a != b)), run(layer, x).rest, before
  )
  assert changed.pop("bias", True)
  assert changed["reading"]["load"]


@pytest.mark.parametrize(
  ("gate", "balance"),
  [
    ("sigmoid", "bias"),
    pytest.param("softmax", "auxiliary", marks=slow),
    pytest.param("sigmoid", "auxiliary", marks=slow),
  ],
)
def test_the_auxiliary_gradient_is_that_of_the_explicit_loss(gate, balance):
  weight, x = 0.7, normal(2, 40, FEATURES)
  layer = build(balance=balance, auxiliary_weight=weight, gate=gate)
  structure, params, rest = state_lib.split(layer)

  @jax.jit
  @jax.grad
  def hidden(params):
    return jnp.sin(nnx.merge(structure, params, rest)(x)).mean()

  @jax.jit
  @jax.grad
  def explicit(params):
    layer = nnx.merge(structure, params, rest)
    layer.eval()
    scores = layer.router(x)
    squash = jax.nn.sigmoid if gate == "sigmoid" else jax.nn.softmax
    shares = squash(scores)
    shares = shares / shares.sum(-1, keepdims=True)
    counts = jnp.bincount(layer.route(x).chosen.reshape(-1), length=EXPERTS)
    busy = counts / (x.shape[0] * x.shape[1] * layer.top_k)
    loss = EXPERTS * (busy * shares.mean((0, 1))).sum()
    return jnp.sin(layer(x)).mean() + weight * loss

  found, expected = hidden(params), explicit(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
    found, expected,
  )  # fmt: skip
  # It is not drowned by the other: they point elsewhere.
  assert np.abs(found["router"]["kernel"]).max() > 1e-2


def test_loads_are_those_of_the_choices_layer_by_layer():
  layers = [build(), build(num_shared=0)]
  layers[1].bias[...] = 0.2 * normal(EXPERTS, seed=3)
  stack = nn.LayerStack(layers, scan=True)
  names = [f"layers/0[{i}]" for i in range(2)]
  fresh = nn.expert_loads(stack)
  assert list(fresh) == names
  assert all(np.isnan(fresh[name].experts).all() for name in names)
  x = normal(2, 20, FEATURES)
  expected, inner = [], x
  for layer in stack.unstacked():
    found = run(layer, inner)
    expected.append(np.bincount(np.ravel(found.chosen), minlength=EXPERTS))
    inner = found.y
  structure, params, rest = state_lib.split(stack)

  @jax.jit
  def called(rest):
    stack = nnx.merge(structure, params, rest)
    stack(x)
    return state_lib.split(stack)[2]

  stack = nnx.merge(structure, params, called(rest))
  for counts, read in zip(
    expected, nn.expert_loads(stack).values(), strict=True
  ):
    np.testing.assert_allclose(read.experts, counts / counts.mean(), rtol=1e-6)
    np.testing.assert_allclose(read.busiest, counts.max() / counts.mean())
    assert read.dropped == 0


def test_the_router_is_float32_in_any_type():
  x = normal(4, 64, FEATURES).astype(jnp.bfloat16)
  wide, narrow = (build(dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
  route = lambda layer: jax.jit(lambda x: layer.route(x))(x)
  for a, b in zip(route(narrow), route(wide), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_a_batch_that_is_not_finite_leaves_the_bias_finite():
  found = run(build(), normal(2, 9, FEATURES).at[0, 4].set(jnp.nan))
  assert np.isnan(found.y[0, 4]).all()
  assert np.isfinite(found.y[0, :4]).all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.rest))


WRONG = {
  "features": ({"features": 0}, "^features must be .*got features=0"),
  "hidden": ({"hidden": 2.5}, "^hidden must be .*got hidden=2.5"),
  "num_experts": ({"num_experts": 0}, "^num_experts must be .*num_experts=0"),
  "top_k": ({"top_k": 0}, "^top_k must be .*top_k=0"),
  "top_k that is none": ({"top_k": True}, "^top_k must be .*got top_k=True"),
  "more than there are": (
    {"top_k": 9},
    "^top_k must be at most num_experts.*got top_k=9 for num_experts=8",
  ),
  "num_shared": ({"num_shared": -1}, "^num_shared must be .*num_shared=-1"),
  "capacity_factor": (
    {"capacity_factor": 0.0},
    r"^capacity_factor must be in \(0, inf\), got capacity_factor=0.0",
  ),
  "gate": ({"gate": "relu"}, "^gate must be one of 'sigmoid', 'softmax'"),
  "balance": ({"balance": None}, "^balance must be one of 'bias', .*None"),
  "bias_rate": ({"bias_rate": 0}, r"^bias_rate must be in \(0, inf\)"),
  "auxiliary_weight": (
    {"auxiliary_weight": -1.0},
    r"^auxiliary_weight must be in \[0, inf\).*-1.0",
  ),
  "nothing to weight": (
    {"balance": "none", "auxiliary_weight": 0.1},
    "^auxiliary_weight is for balance 'bias' or 'auxiliary', got 0.1",
  ),
  "activation with a state": (
    {"activation": "target_sparse_relu"},
    "^activation must be a function here",
  ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  wrong, message = WRONG[name]
  arguments = {
    "features": FEATURES, "hidden": HIDDEN, "num_experts": EXPERTS,
  }  # fmt: skip
  with pytest.raises(ValueError, match=message):
    nn.MixtureOfExperts(**arguments | wrong, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(0, FEATURES), (3, 0, FEATURES), (4, 5), ()])
def test_tokens_that_are_none_are_refused(shape, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  layer = build()
  for call in (layer, layer.route, layer.decode):
    with pytest.raises(
      ValueError, match=r"^x must be tokens of 6 f.*got shape"
    ):
      call(jnp.ones(shape))


def test_in_evaluation_mode_it_may_be_vmapped():
  layer, x = build(), normal(3, 4, FEATURES)
  with pytest.raises(TraceContextError):
    jax.vmap(layer)(x)
  layer.eval()
  assert jax.eval_shape(jax.vmap(layer), x).shape == x.shape


def test_a_grouped_product_may_be_vmapped():
  x, matrices = normal(2, 5, 4, 3), normal(3, 3, 2)
  counts = jnp.array([[1, 1, 3], [4, 0, 1]])
  times = lambda x, counts: grouped_product.grouped_product(x, matrices, counts)
  wanted = jnp.stack([times(*one) for one in zip(x, counts, strict=True)])
  found = jax.jit(jax.vmap(times))(x, counts)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_in_tree_mode_gradients_are_told_of_integers():
  loss = lambda layer, x: (layer(x) ** 2).sum()
  with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
    layer, x = build(), normal(4, FEATURES)
    grads = nnx.jit(nnx.grad(loss, allow_int=True))(layer, x)
    assert int(layer.reading.calls[...]) == 1
    for kernel in (grads.experts.up, grads.router.kernel):
      assert np.asarray(kernel[...]).any()
