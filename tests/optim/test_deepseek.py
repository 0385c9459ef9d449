"""The recipe as a whole: its parts, its options, its place in a loop."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax import optim
from deepseek_jax.optim.compact import bytes_per_parameter

RANDOM = np.random.default_rng(0)
PARAMS = {
  "embed": {"table": jnp.asarray(RANDOM.normal(size=(4, 3)), jnp.float32)},
  "norm": {"scale": jnp.ones(3)},
}
GRADS = [
  jax.tree.map(
    lambda p: jnp.asarray(RANDOM.normal(size=p.shape), p.dtype), PARAMS
  )
  for _ in range(6)
]
LOSSES = (2.0, 1.5, 1.2, 1.0, 0.6, 0.5)
bare = functools.partial(optim.deepseek, 0.1, weight_decay=0, average=0, cap=0)


def descend(tx, losses=None, grads=GRADS, params=PARAMS):
  """All iterates and the last state, along gradients that are given."""

  def step(carry, inputs):
    params, state = carry
    grads, extra = inputs
    updates, state = tx.update(grads, state, params, **extra)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  @jax.jit
  def run(params, inputs):
    return jax.lax.scan(step, (params, tx.init(params)), inputs)

  stack = lambda *leaves: jnp.stack(leaves)
  extra = {} if losses is None else {"value": jnp.float32(losses)}
  inputs = jax.tree.map(stack, *grads), extra
  (_, state), iterates = run(params, inputs)
  return iterates, state


@functools.cache
def plain():
  """Iterates of the bare recipe."""
  return descend(bare())[0]


def last(iterates):
  return jax.tree.map(lambda leaf: leaf[-1], iterates)


def assert_close(a, b, rtol=1e-5):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6)
  jax.tree.map(close, a, b)


def differs(a, b, name):
  """Whether the leaves of one module differ by more than rounding."""
  a, b = jax.tree.leaves(a[name]), jax.tree.leaves(b[name])
  return any(np.abs(x - y).max() > 1e-4 for x, y in zip(a, b, strict=True))


def test_is_the_chain_that_it_says_it_is():
  rules = [("embed/.*", 1.0), (".*", 0.5)]
  chain = optax.chain(
    optim.scale_by_whitening("soap", b1=0.9, b2=0.95),
    optax.add_decayed_weights(0.1, optim.matrices),
    optim.scale_by_layer(rules),
    optim.scale_by_loss_ratio(0.5),
    optim.scale_by_rate(optim.warmup(0.1, 4)),
  )
  by_hand = optim.anytime_average(optim.cap_by_polyak(0.02, inner=chain), 0.3)
  ours = optim.deepseek(
    0.1,
    warmup_steps=4,
    layer_rules=rules,
    loss_power=0.5,
    cap=0.02,
    average=0.3,
  )
  found, state = descend(ours, LOSSES)
  expected, expected_state = descend(by_hand, LOSSES)
  assert_close(found, expected)
  assert_close(
    optim.averaged_params(state, last(found)),
    optim.averaged_params(expected_state, last(expected)),
  )
  rates = optim.learning_rates(state, PARAMS)
  assert_close(rates, optim.learning_rates(expected_state, PARAMS))
  factors = state.inner_state
  scale = factors.rate_scale * factors.inner_state["loss"].rate_scale
  assert 0 < factors.rate_scale < 1  # the cap is at work
  assert 0 < factors.inner_state["loss"].rate_scale < 1
  np.testing.assert_allclose(rates["embed/table"], 0.1 * scale, rtol=1e-6)
  np.testing.assert_allclose(rates["norm/scale"], 0.05 * scale, rtol=1e-6)


def test_takes_the_place_of_adamw_in_a_plain_loop():
  for tx in (optax.adamw(1e-2, weight_decay=0.1), optim.deepseek(1e-2)):
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for grads in GRADS[:2]:
      updates, state = update(grads, state, params)
      params = optax.apply_updates(params, updates)
    assert all(jax.tree.leaves(jax.tree.map(np.any, updates)))


def test_without_a_loss_the_cap_rests():
  tight = bare(cap=1e-3)
  assert_close(descend(tight)[0], plain())
  assert differs(descend(tight, LOSSES)[0], plain(), "embed")


def test_a_loss_of_the_past_does_not_brake_an_update_without_one():
  tx = bare(cap=1e-3)
  _, state = jax.jit(tx.update)(
    GRADS[0], tx.init(PARAMS), PARAMS, value=jnp.float32(0.0)
  )
  assert float(state.rate_scale) == 0
  updates, state = tx.update(GRADS[1], state, PARAMS, value=None)
  assert float(state.rate_scale) == 1
  assert all(jax.tree.leaves(jax.tree.map(np.any, updates)))


def test_a_negative_loss_does_not_stop_it():
  assert_close(descend(bare(cap=1e-3), [-1.0] * len(GRADS))[0], plain())


@pytest.mark.parametrize("label", ["soap", "newton_schulz"])
def test_updates_stop_when_gradients_do(label):
  matrix = lambda tree: {"embed": tree["embed"]}
  grads = [matrix(tree) for tree in GRADS]
  silence = [jax.tree.map(jnp.zeros_like, grads[0])] * 200
  tx = bare(labels=((".*", label),))
  table = descend(tx, grads=grads + silence, params=matrix(PARAMS))[0]
  table = table["embed"]["table"]
  steps = np.linalg.norm(np.diff(table, axis=0), axis=(1, 2))
  busy = len(grads) - 1
  np.testing.assert_allclose(steps[:busy], 0.1 * 0.2 * 12**0.5, rtol=1e-4)
  assert steps[busy + 60] < 0.1 * steps[0]
  assert np.sum(steps[busy + 100 :]) < 0.1 * steps[0]


def test_the_average_is_that_of_the_iterates():
  tx = bare(average=0.5)
  iterates, state = descend(tx)
  assert_close(iterates, plain())
  weights = np.zeros(len(GRADS))
  for step in range(len(GRADS)):
    newest = 1 / (1 + 0.5 * step)
    weights *= 1 - newest
    weights[step] = newest
  mean = lambda leaf: np.tensordot(weights, np.float64(leaf), 1)
  average = optim.averaged_params(state, last(iterates))
  assert_close(average, jax.tree.map(mean, iterates))
  assert differs(average, last(iterates), "embed")


def test_weights_of_matrices_decay_and_vectors_stay():
  no_grads = [jax.tree.map(jnp.zeros_like, PARAMS)] * 3
  decayed = last(descend(bare(weight_decay=0.5), grads=no_grads)[0])
  factor = (1 - 0.1 * 0.5) ** 3
  expected = {
    "embed": {"table": factor * PARAMS["embed"]["table"]},
    "norm": PARAMS["norm"],
  }
  assert_close(decayed, expected)
  mask = {"embed": {"table": False}, "norm": {"scale": True}}
  for given in (mask, lambda _: mask):
    tx = bare(weight_decay=0.5, mask=given)
    decayed = last(descend(tx, grads=no_grads)[0])
    np.testing.assert_allclose(decayed["norm"]["scale"], factor, rtol=1e-6)
    assert_close(decayed["embed"], PARAMS["embed"])


def test_warmup_scales_the_first_updates():
  slow = descend(bare(warmup_steps=4), grads=GRADS[:1])[0]
  moved = jax.tree.map(lambda new, old: new[0] - old, slow, PARAMS)
  full = jax.tree.map(lambda new, old: new[0] - old, plain(), PARAMS)
  assert_close(moved, jax.tree.map(lambda move: move / 4, full), rtol=1e-4)


def test_kind_is_the_label_of_every_matrix():
  labels = [("embed/.*", "newton_schulz"), (".*", "adam")]
  named, labelled = bare(kind="newton_schulz"), bare(labels=labels)
  assert_close(descend(named)[0], descend(labelled)[0])
  square = {"kernel": jnp.zeros((64, 64))}
  state = jax.eval_shape(optim.deepseek(kind="newton_schulz").init, square)
  assert bytes_per_parameter(state, square) < 8.1


def test_labels_take_a_matrix_out_of_the_whitening():
  adam = optax.chain(
    optax.scale_by_adam(b1=0.9, b2=0.95), optax.scale(-0.1 * 0.2)
  )
  assert_close(descend(bare(labels=[(".*", "adam")]))[0], descend(adam)[0])
  assert differs(descend(adam)[0], plain(), "embed")


def test_stacked_kernels_are_whitened_one_by_one():
  params = {f"layer{i}": jnp.zeros((4, 3)) for i in range(2)}
  grads = [
    {"layer0": g["embed"]["table"], "layer1": 7 * g["embed"]["table"][::-1]}
    for g in GRADS
  ]
  together = lambda tree: {"layers": jnp.stack(list(tree.values()))}
  alone = together(last(descend(bare(), grads=grads, params=params)[0]))
  stack = functools.partial(
    descend, grads=list(map(together, grads)), params=together(params)
  )
  assert_close(last(stack(bare(stacked=[("layers", 1)]))[0]), alone)


def test_snr_power_changes_the_sizes_between_leaves():
  iterates, _ = descend(bare(snr_power=0.5))
  assert differs(iterates, plain(), "embed")
  assert differs(iterates, plain(), "norm")


def test_the_bases_turn_every_few_updates():
  grads = (4 * GRADS)[:23]
  often, _ = descend(bare(every=1), grads=grads)
  seldom, _ = descend(bare(every=30), grads=grads)
  cut = lambda tree, part: jax.tree.map(lambda leaf: leaf[part], tree)
  assert_close(cut(often, slice(20)), cut(seldom, slice(20)))
  assert differs(cut(often, 22), cut(seldom, 22), "embed")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_moments_can_be_stored_small(dtype):
  params = jax.eval_shape(lambda: {"kernel": jnp.zeros((64, 256))})
  held = lambda tx: bytes_per_parameter(jax.eval_shape(tx.init, params), params)
  saved = held(bare()) - held(bare(moment_dtype=dtype))
  assert saved > {"bfloat16": 3.9, "int8": 5.9}[dtype]  # of the 8 of two floats


def test_the_average_can_be_stored_small():
  params = jax.eval_shape(lambda: PARAMS)
  held = lambda tx: bytes_per_parameter(jax.eval_shape(tx.init, params), params)
  wide, small = bare(average=0.1), bare(average=0.1, average_dtype=jnp.bfloat16)
  np.testing.assert_allclose(held(wide) - held(small), 2.0)


def test_an_injected_rate_can_be_turned_while_running():
  tx = optax.inject_hyperparams(optim.deepseek)(
    learning_rate=1e-2, warmup_steps=4
  )
  state, update = tx.init(PARAMS), jax.jit(tx.update)
  _, state = update(GRADS[0], state, PARAMS)
  state.hyperparams["learning_rate"] = jnp.float32(1e-3)
  _, state = update(GRADS[1], state, PARAMS)
  rates = optim.learning_rates(state, PARAMS)
  np.testing.assert_allclose(rates["norm/scale"], 1e-3 * 2 / 4, rtol=1e-6)


@pytest.mark.parametrize(
  ("shape", "kind"),
  [
    ((2048, 9000), "soap"),
    ((2049, 2049), "newton_schulz"),
    ((9000, 2049), "newton_schulz"),
    ((4096, 32, 128), "newton_schulz"),
    ((50_000, 1), "adam"),
  ],
)
def test_matrices_with_two_long_sides_are_orthogonalized(shape, kind):
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  state = jax.eval_shape(bare().init, {"leaf": leaf})
  _, state = state["whitening"]
  for other, part in state.inner_states.items():
    mu = optax.tree.get(part, "mu")
    assert isinstance(mu["leaf"], optax.MaskedNode) == (other != kind)


def test_stacks_are_judged_by_one_of_their_matrices():
  leaf = jax.ShapeDtypeStruct((4096, 64, 64), jnp.float32)
  tx = bare(stacked=[("leaf", 1)])
  _, state = jax.eval_shape(tx.init, {"leaf": leaf})["whitening"]
  soap = state.inner_states["soap"].inner_state
  assert soap.rows["leaf"].vectors.shape == (4096, 64, 64)


@pytest.mark.parametrize(
  "arguments",
  [{}, {"snr_power": 0.5, "moment_dtype": "int8", "warmup_steps": 2}],
  ids=["default", "more_parts"],
)
def test_flax_saves_and_restores_the_state(arguments):
  tx = optim.deepseek(0.1, **arguments)
  params = {"layers": [PARAMS["embed"], PARAMS["norm"]]}
  grads = jax.tree.map(jnp.ones_like, params)
  _, state = tx.update(grads, tx.init(params), params, value=1.0)
  saved = flax.serialization.to_bytes(state)
  restored = flax.serialization.from_bytes(tx.init(params), saved)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  rates = optim.learning_rates(restored, params)
  assert rates == optim.learning_rates(state, params)
  assert rates["layers/1/scale"] > 0


def test_python_numbers_can_be_parameters():
  tx = optim.deepseek(0.5, cap=0)
  params = {"a": 2.0}
  state = tx.init(params)
  step = jax.jit(tx.update)
  for _ in range(2):
    updates, state = step({"a": jnp.float32(1.0)}, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params["a"], 1.8, rtol=1e-5)
  assert optim.averaged_params(state, {"a": 1.8})["a"] > 1.8


def test_stacked_biases_do_not_decay():
  params = {"layers": {"bias": jnp.ones((4, 3)), "kernel": jnp.ones((4, 3, 3))}}
  grads = jax.tree.map(jnp.zeros_like, params)
  tx = optim.deepseek(0.1, weight_decay=0.5, stacked=[("layers/.*", 1)])
  updates, _ = tx.update(grads, tx.init(params), params)
  np.testing.assert_array_equal(updates["layers"]["bias"], 0.0)
  np.testing.assert_allclose(updates["layers"]["kernel"], -0.05, rtol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"learning_rate": -1.0}, "learning_rate must"),
    ({"learning_rate": float("nan")}, "learning_rate must"),
    ({"weight_decay": -0.1}, "weight_decay must"),
    ({"weight_decay": float("inf")}, "weight_decay must"),
    ({"warmup_steps": -1}, "warmup_steps must"),
    ({"warmup_steps": 1.5}, "warmup_steps must be a whole number"),
    ({"b1": 1.0}, r"b1 must be in \[0, 1\), got b1=1.0"),
    ({"b2": -0.1}, "b2 must"),
    ({"every": 0}, "every must be a whole number, at least 1, got every=0"),
    ({"average": 1.5}, r"average must be in \[0, 1\]"),
    ({"average_dtype": jnp.int8}, "average_dtype must be a floating dtype"),
    ({"cap": 2.0}, r"cap must be in \[0, 2\)"),
    ({"cap": -0.5}, "cap must"),
    ({"loss_power": float("inf")}, "loss_power must"),
    ({"snr_power": float("nan")}, "snr_power must"),
  ],
)
def test_arguments_out_of_range_are_named(arguments, message):
  # The annotations refuse some of these first, where they are checked.
  unchecked = getattr(optim.deepseek, "__wrapped__", optim.deepseek)
  with pytest.raises(ValueError, match=message):
    unchecked(**arguments)


def test_rules_that_do_not_fit_are_named_at_init():
  with pytest.raises(ValueError, match="'norm/scale'"):
    optim.deepseek(layer_rules=[("embed/.*", 1.0)]).init(PARAMS)
  with pytest.raises(ValueError, match="'norm/scale'"):
    optim.deepseek(labels=[("embed/.*", "soap")]).init(PARAMS)
