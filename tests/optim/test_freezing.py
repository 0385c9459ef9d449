"""`freeze_except`: what is frozen neither moves nor costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deepseek_jax import optim
from deepseek_jax.optim.freezing import freeze_except

PARAMS = {
  "head": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},
  "trunk": {"kernel": jnp.ones((5, 3))},
}
GRADS = jax.tree.map(lambda x: 0.5 * x, PARAMS)
HEAD = ["head/.*"]
INNERS = {
  "adam": optax.adam(0.1),
  "momentum": optax.sgd(0.1, momentum=0.9),
  "recipe": optim.deepseek(0.1, weight_decay=0.1),
  "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}
each_inner = pytest.mark.parametrize("name", INNERS)


def types(tree):
  return [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]


@each_inner
def test_the_state_is_that_of_the_trained_parameters_alone(name):
  inner = INNERS[name]
  state = freeze_except(HEAD, inner=inner).init(PARAMS)
  assert types(state) == types(inner.init({"head": PARAMS["head"]}))


@each_inner
def test_the_trained_part_moves_as_if_it_were_alone(name):
  inner = optax.with_extra_args_support(INNERS[name])
  tx = freeze_except(HEAD, inner=inner)
  head, alone = PARAMS["head"], inner.init(PARAMS["head"])
  params, state = PARAMS, tx.init(PARAMS)
  step = jax.jit(tx.update)
  for value in (2.0, 1.0):
    updates, state = step(GRADS, state, params, value=value)
    expected, alone = inner.update(GRADS["head"], alone, head, value=value)
    jax.tree.map(
      # One is compiled and the other not; the recipe decomposes matrices.
      functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=2e-6),
      updates["head"],
      expected,
    )
    params = optax.apply_updates(params, updates)
    head = optax.apply_updates(head, expected)
  np.testing.assert_array_equal(params["trunk"]["kernel"], 1.0)


@pytest.mark.parametrize("inner", [None, optax.adamw(0.1)])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_bad_gradient_of_a_frozen_leaf_goes_nowhere(inner, bad):
  tx = freeze_except(HEAD, inner=inner)
  grads = GRADS | {"trunk": jax.tree.map(lambda x: x * bad, GRADS["trunk"])}
  updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
  expected, clean = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  np.testing.assert_array_equal(updates["trunk"]["kernel"], 0.0)
  jax.tree.map(np.testing.assert_array_equal, updates, expected)
  jax.tree.map(np.testing.assert_array_equal, state, clean)


def test_a_clipping_norm_inside_is_that_of_the_trained_gradients():
  tx = freeze_except(["head/bias"], inner=optax.clip_by_global_norm(1.0))
  updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates["head"]["bias"], 1 / np.sqrt(2), rtol=1e-6)


def test_without_an_optimizer_it_ends_a_chain():
  base = optim.deepseek(0.1)
  tx = optax.chain(base, freeze_except(HEAD))
  state = tx.init(PARAMS)
  assert types(state) == types(base.init(PARAMS))
  updates, _ = tx.update(GRADS, state, PARAMS)
  expected, _ = base.update(GRADS, base.init(PARAMS), PARAMS)
  jax.tree.map(np.testing.assert_array_equal, updates["head"], expected["head"])
  np.testing.assert_array_equal(updates["trunk"]["kernel"], 0.0)


def test_the_loss_reaches_the_optimizer():
  inner = optax.chain(
    optim.scale_by_loss_ratio(1.0, decay=0.0), optim.scale_by_rate(0.4)
  )
  tx = freeze_except(HEAD, inner=inner)
  state = tx.init(PARAMS)
  for value in (4.0, 2.0):
    updates, state = tx.update(GRADS, state, PARAMS, value=value)
  np.testing.assert_allclose(updates["head"]["bias"], -0.4 * 0.5 * 0.5)
  rates = optim.learning_rates(state, PARAMS)
  np.testing.assert_allclose(list(rates.values()), [0.2, 0.2, 0.0])


@pytest.mark.parametrize(
  "tx",
  [
    freeze_except(HEAD, inner=optim.deepseek(0.1)),
    freeze_except(HEAD, inner=INNERS["injected"]),
    optax.chain(optim.deepseek(0.1), freeze_except(HEAD)),
    optax.chain(INNERS["injected"], freeze_except(HEAD)),
    optax.inject_hyperparams(
      lambda learning_rate: freeze_except(HEAD, inner=optax.adam(learning_rate))
    )(learning_rate=0.1),
  ],
)
def test_the_rate_of_a_frozen_parameter_reads_zero(tx):
  _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  rates = jax.jit(optim.learning_rates)(state, PARAMS)
  np.testing.assert_allclose(list(rates.values()), [0.1, 0.1, 0.0], rtol=1e-6)


def test_the_gradient_of_a_frozen_parameter_is_not_computed():
  x = jnp.ones((16, 5))

  def loss(params):
    hidden = jnp.tanh(x @ params["trunk"]["kernel"])
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"][None]
    return jnp.mean(logits**2)

  def flops(tx):
    def step(params, state):
      return tx.update(jax.grad(loss)(params), state, params)

    lowered = jax.jit(step).lower(PARAMS, tx.init(PARAMS))
    return lowered.compile().cost_analysis()["flops"]

  trunk = 2 * 16 * 5 * 3
  everything = flops(freeze_except([".*"], inner=optax.sgd(0.1)))
  assert flops(freeze_except(HEAD, inner=optax.sgd(0.1))) < everything - trunk


def test_trains_the_head_of_an_nnx_model():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.trunk = nnx.Linear(3, 4, rngs=rngs)
      self.head = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
      return self.head(nnx.relu(self.trunk(x)))

  model = Model(nnx.Rngs(0))
  tx = freeze_except(["head/.*"], inner=optax.adam(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  before = nnx.to_pure_dict(nnx.clone(nnx.state(model, nnx.Param)))
  grads = nnx.grad(lambda model: jnp.mean(model(jnp.ones((2, 3))) ** 2))(model)
  optimizer.update(model, grads)
  after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  jax.tree.map(np.testing.assert_array_equal, after["trunk"], before["trunk"])
  assert np.all(after["head"]["bias"] != before["head"]["bias"])
  head_size = 4 + 1
  sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer))]
  # Adam's two moments and its count, and the count of nnx.Optimizer.
  assert sum(sizes) == 2 * head_size + 2


@pytest.mark.parametrize(
  ("patterns", "message"),
  [
    ([], "patterns must name what is trained"),
    ("head/.*", "patterns must be a sequence"),
    (["("], "regular expression"),
  ],
)
def test_wrong_patterns_are_named_at_once(patterns, message):
  with pytest.raises(ValueError, match=message):
    freeze_except(patterns)


def test_a_pattern_that_matches_nothing_is_named_at_init():
  tx = freeze_except(["haed/.*"], inner=optax.adam(0.1))
  with pytest.raises(ValueError, match=r"'haed/\.\*'"):
    tx.init(PARAMS)
