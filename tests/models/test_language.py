"""Laws of the language model: what it sees, and however it is computed."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deepseek_jax import models, nn
from deepseek_jax.train import state as state_lib

VOCAB, FEATURES, BATCH, TIME, SEPARATOR = 13, 16, 3, 40, 0
DYNAMIC = {
  "block_size": 8, "window": 8, "num_remote": 1, "num_hashes": 2,
  "hash_bits": 2,
}  # fmt: skip
KINDS = {"full": "full", "mixed": ("dynamic", "full"), "dynamic": "dynamic"}
WAYS = {
  "loop": {},
  "scan": {"scan": True},
  "remat": {"remat": True},
  "scan and remat": {"scan": True, "remat": True},
}
slow = pytest.mark.slow
each_kind = pytest.mark.parametrize(
  "kind", ["full", "mixed", pytest.param("dynamic", marks=slow)]
)


def build(kind="full", num_layers=2, **kwargs):
  """A model with a state of its own in every layer."""
  defaults = {
    "features": FEATURES, "num_layers": num_layers, "num_heads": 2,
    "attention": KINDS[kind], "separator": SEPARATOR,
    "attention_options": None if kind == "full" else DYNAMIC,
  }  # fmt: skip
  return models.LanguageModel(VOCAB, **defaults | kwargs, rngs=nnx.Rngs(0))


@functools.cache
def model(kind, way, num_layers):
  """The same layers, run in one of the ways."""
  if way == "loop":
    return build(
      kind, num_layers=num_layers, num_kv_heads=1, dropout=0.2,
      activation="dynamic_sparse_relu",
      activation_options={"threshold": 0.1, "rate": 0.3},
    )  # fmt: skip
  changed = nnx.clone(model(kind, "loop", num_layers))
  changed.layers = nn.LayerStack(
    changed.layers.unstacked(), period=2 if kind == "mixed" else 1, **WAYS[way]
  )
  return changed


def draw(seed=0, batch=BATCH, time=TIME):
  """Tokens without a separator."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(1, VOCAB, (batch, time)), jnp.int32)


def packed(*documents, seed=0):
  """Rows that hold documents of some lengths, each behind a separator."""
  starts = np.cumsum((0, *documents))[:-1]
  return draw(seed, time=sum(documents)).at[:, starts].set(SEPARATOR)


@functools.cache
def evaluation(kind, way):
  module = nnx.clone(model(kind, way, 2))
  module.eval()
  return jax.jit(lambda tokens, segments=None: module(tokens, segments))


def loss_of(logits, tokens):
  chosen = jnp.take_along_axis(
    jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=2
  )
  return -chosen.mean()


def training_step(module):
  """Returns (loss, new state) and gradients, as a function; and its state."""
  module.train()
  structure, params, rest = state_lib.split(module)

  def step(params, rest, tokens):
    module = nnx.merge(structure, params, rest)
    loss = loss_of(module(tokens), tokens)
    return loss, state_lib.split(module)[2]

  return jax.value_and_grad(step, has_aux=True), params, rest


@functools.cache
def trained(kind, way):
  """Loss, state and gradients of a step, as those of layers one by one."""
  module = nnx.clone(model(kind, way, 4 if kind == "mixed" else 2))
  step, params, rest = training_step(module)
  (loss, rest), grads = jax.jit(step)(params, rest, packed(14, 26))
  if "scan" in way:
    rest, grads = one_by_one(rest), one_by_one(grads)
  return jax.tree.map(plain, (loss, rest, grads))


def one_by_one(tree):
  """Cuts stacked layers apart."""
  layers = tree["layers"]["layers"]
  period = len(layers)
  depth = period * len(jax.tree.leaves(layers)[0])
  cut = lambda i: jax.tree.map(lambda x: x[i // period], layers[i % period])
  return tree | {"layers": {"layers": {i: cut(i) for i in range(depth)}}}


def plain(x):
  is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_close(first, second, atol=1e-5):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol),
    first, second,
  )  # fmt: skip


each_run = pytest.mark.parametrize(
  ("kind", "way"),
  [
    ("full", "loop"),
    ("full", "scan"),
    ("mixed", "loop"),
    pytest.param("mixed", "scan", marks=slow),
    pytest.param("dynamic", "loop", marks=slow),
    pytest.param("dynamic", "scan", marks=slow),
  ],
)


@each_run
@pytest.mark.parametrize("start", [1, 8, 27, TIME - 1])
def test_a_changed_token_changes_no_bit_before_it(kind, way, start):
  run, tokens = evaluation(kind, way), draw()
  before = np.asarray(run(tokens))
  one = run(tokens.at[:, start].set(tokens[:, start] % (VOCAB - 1) + 1))
  all_ = run(tokens.at[:, start:].set(draw(1)[:, start:]))
  for after in map(np.asarray, (one, all_)):
    np.testing.assert_array_equal(after[:, :start], before[:, :start])
    assert (after[:, start] != before[:, start]).any()


@each_run
@pytest.mark.parametrize("length", [16, 13])
def test_documents_of_a_row_do_not_see_each_other(kind, way, length):
  run = evaluation(kind, way)
  tokens, other = (packed(length, TIME - length, seed=seed) for seed in (0, 1))
  first, second = slice(0, length), slice(length, TIME)
  before = np.asarray(run(tokens))
  for here, there in ((first, second), (second, first)):
    after = np.asarray(run(tokens.at[:, there].set(other[:, there])))
    np.testing.assert_array_equal(after[:, here], before[:, here])
    assert (after[:, there] != before[:, there]).any()


@pytest.mark.parametrize("way", ["loop", "scan"])
def test_a_document_is_the_same_wherever_it_stands(way):
  run, tokens = evaluation("full", way), packed(13, 27)
  moved = jnp.roll(tokens, -13, axis=1)
  np.testing.assert_allclose(run(moved)[:, :27], run(tokens)[:, 13:], atol=1e-5)


def test_separators_begin_segments():
  tokens = packed(9, 31)
  run = evaluation("full", "loop")
  numbers = jnp.repeat(jnp.array([4, 2]), jnp.array([9, 31]))
  rows = jnp.broadcast_to(numbers, (BATCH, TIME))
  np.testing.assert_array_equal(run(tokens, rows), run(tokens))
  together = run(tokens, jnp.zeros_like(tokens))
  np.testing.assert_array_equal(together[:, :9], run(tokens)[:, :9])
  assert np.abs(together - run(tokens))[:, 9:].max() > 1e-3


@pytest.mark.parametrize("kind", ["full", pytest.param("mixed", marks=slow)])
def test_padding_is_not_seen_and_stays_finite(kind):
  run, tokens, length = evaluation(kind, "loop"), draw(), 21
  numbers = jnp.where(jnp.arange(TIME) < length, 0, -1)
  rows = jnp.broadcast_to(numbers, (BATCH, TIME))
  logits = run(tokens, rows)
  assert np.isfinite(logits).all()
  other = tokens.at[:, length:].set(3)
  np.testing.assert_array_equal(
    run(other, rows)[:, :length], logits[:, :length]
  )
  # In front of what is read: rows of a batch may be padded there.
  behind = jnp.flip(rows, 1)
  other = jnp.where(behind < 0, 3, tokens)
  np.testing.assert_array_equal(
    run(other, behind)[:, -length:], run(tokens, behind)[:, -length:]
  )
  assert np.isfinite(run(tokens, jnp.full_like(rows, -1))).all()


@each_kind
def test_rows_of_a_batch_do_not_see_each_other(kind):
  run, tokens = evaluation(kind, "loop"), draw()
  swapped = run(tokens[::-1])
  np.testing.assert_allclose(swapped[::-1], run(tokens), atol=1e-5)


@pytest.mark.parametrize(
  ("kind", "way"),
  [
    ("full", "scan"),
    ("full", "remat"),
    pytest.param("full", "scan and remat", marks=slow),
    pytest.param("mixed", "scan and remat", marks=slow),
    pytest.param("mixed", "scan", marks=slow),
    pytest.param("mixed", "remat", marks=slow),
    pytest.param("dynamic", "scan", marks=slow),
    pytest.param("dynamic", "scan and remat", marks=slow),
  ],
)
def test_scan_and_remat_change_nothing(kind, way):
  loss, rest, grads = trained(kind, "loop")
  assert_close(trained(kind, way), (loss, rest, grads))
  # Which is something: all of it has moved.
  for layer in rest["layers"]["layers"].values():
    assert layer["dropout"]["rngs"]["count"] == 1
    assert layer["feed_forward"]["activation"]["threshold"] != 0.1
  assert all(grad.any() for grad in jax.tree.leaves(grads))


def test_a_tied_head_is_the_embedding():
  tied = build(num_layers=1)
  untied = build(num_layers=1, tied=False)
  paths = lambda module: {
    path[0] for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))
  }
  assert paths(untied) - paths(tied) == {"head"}
  kernel = untied.head.kernel[...]
  assert kernel.shape == (FEATURES, VOCAB)
  nnx.update(untied, nnx.state(tied, nnx.Param))
  untied.head.kernel[...] = tied.embedding.embedding[...].T
  found = {}
  for name, module in (("tied", tied), ("untied", untied)):
    step, params, rest = training_step(module)
    (loss, _), grads = jax.jit(step)(params, rest, draw())
    found[name] = loss, grads
  np.testing.assert_allclose(found["tied"][0], found["untied"][0], rtol=1e-6)
  one, two = found["tied"][1], found["untied"][1]
  both = two["embedding"]["embedding"] + two["head"]["kernel"].T
  np.testing.assert_allclose(one["embedding"]["embedding"], both, atol=1e-6)
  assert np.abs(two["head"]["kernel"]).min() > 0
  assert np.abs(two["embedding"]["embedding"]).max() > 1e-3


def test_the_untrained_model_is_nearly_uniform():
  logits = evaluation("full", "loop")(draw())
  loss = float(loss_of(logits, draw()))
  assert abs(loss - np.log(VOCAB)) < 1.0


@pytest.mark.parametrize("kind", ["full", "mixed"])
@pytest.mark.parametrize("way", WAYS)
def test_abstract_models_have_the_shapes_of_real_ones(kind, way):
  real = nnx.state(model(kind, way, 2), nnx.Param)
  abstract = nnx.eval_shape(lambda: build(kind, num_kv_heads=1, **WAYS[way]))
  state = nnx.state(abstract, nnx.Param)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(nnx.to_pure_dict(state)) == shapes(nnx.to_pure_dict(real))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_float32_and_bfloat16_is_near(tied):
  exact, rounded = (
    build(dtype=dtype, tied=tied) for dtype in (jnp.float32, jnp.bfloat16)
  )
  both = []
  for module in (exact, rounded):
    module.eval()
    both.append(jax.jit(lambda x, module=module: module(x))(draw()))
  assert both[1].dtype == jnp.float32
  np.testing.assert_allclose(both[1], both[0], atol=0.1)
  # Not only in name: a bfloat16 has three digits.
  assert (both[1] != both[1].astype(jnp.bfloat16).astype(jnp.float32)).any()
  params = jax.tree.leaves(state_lib.split(rounded)[1])
  assert {leaf.dtype for leaf in params} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("kind", ["full", pytest.param("mixed", marks=slow)])
def test_eight_devices_equal_one(kind):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  everywhere = NamedSharding(mesh, PartitionSpec())
  rows = NamedSharding(mesh, PartitionSpec("data"))
  tokens = draw(batch=16)
  module = nnx.clone(model(kind, "loop", 2 if kind == "mixed" else 1))
  step, params, rest = training_step(module)
  found = {}
  for name, weights, batch, options in (
    ("one", None, None, {}),
    ("eight", everywhere, rows, {"out_shardings": everywhere}),
  ):
    state = jax.device_put((params, rest), weights)
    run = jax.jit(step, **options)
    (loss, new), grads = run(*state, jax.device_put(tokens, batch))
    found[name] = loss, new, grads
  assert all(
    leaf.sharding == everywhere for leaf in jax.tree.leaves(found["eight"])
  )
  one, eight = (jax.tree.map(plain, found[name]) for name in ("one", "eight"))
  assert_close(eight, one)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 9)], ids=str)
@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_any_length_is_served(kind, shape):
  run = lambda tokens: build(kind)(tokens)
  tokens = jnp.ones(shape, jnp.int32)
  assert jax.eval_shape(run, tokens).shape == (*shape, VOCAB)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint32], ids=str)
def test_tokens_of_any_integer_type_are_the_same(dtype):
  tokens = packed(4, 5)
  module = build(num_layers=1, separator=VOCAB - 1)
  module.eval()
  np.testing.assert_array_equal(module(tokens.astype(dtype)), module(tokens))


def test_bytes_may_have_a_separator_that_is_none():
  def run(text):
    return models.LanguageModel(
      257, features=16, num_layers=1, separator=256, rngs=nnx.Rngs(0)
    )(text)

  text = np.frombuffer(b"bytes", np.uint8)[None]
  assert jax.eval_shape(run, text).shape == (1, 5, 257)


def test_a_model_is_vectorized_over_its_weights():
  module = build(num_layers=1)
  module.eval()
  structure, params, rest = state_lib.split(module)
  two = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
  run = lambda params: nnx.merge(structure, params, rest)(draw())
  both = jax.jit(jax.vmap(run))(two)
  for i in range(2):
    one = jax.jit(run)(jax.tree.map(lambda x, i=i: x[i], two))
    np.testing.assert_allclose(both[i], one, atol=1e-5)


@slow
def test_flax_may_compile_it():
  module = nnx.clone(model("mixed", "scan and remat", 4))
  module.train()

  @nnx.jit
  def step(module, tokens):
    return nnx.value_and_grad(lambda module: loss_of(module(tokens), tokens))(
      module
    )

  loss, grads = step(module, packed(14, 26))
  expected = trained("mixed", "loop")
  np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
  assert_close(
    one_by_one(jax.tree.map(plain, nnx.to_pure_dict(nnx.as_pure(grads)))),
    expected[2],
  )
  rest = one_by_one(state_lib.split(module)[2])
  assert_close(jax.tree.map(plain, rest), expected[1])


WRONG = {
  "vocab_size": ({"vocab_size": 1}, "^vocab_size must be .*got vocab_size=1"),
  "vocab_size of bytes": ({"vocab_size": "256"}, "^vocab_size must be"),
  "features": ({"features": 0}, "^features must be .*got features=0"),
  "num_layers": ({"num_layers": 0}, "^num_layers must be .*got num_layers=0"),
  "num_heads": ({"num_heads": 3}, "^num_heads must divide features"),
  "num_kv_heads": (
    {"num_heads": 4, "num_kv_heads": 3},
    "^num_kv_heads must divide num_heads.*got num_kv_heads=3",
  ),
  "head_dim": ({"head_dim": 3}, "^head_dim must be even.*got head_dim=3"),
  "hidden": ({"hidden": 0}, "^hidden must be .*got hidden=0"),
  "activation": ({"activation": "rely"}, "^activation must be .*nearest: relu"),
  "activation_options": (
    {"activation_options": {"rate": 0.1}},
    "^options must be empty for activation='silu'",
  ),
  "attention": (
    {"attention": "sparse"},
    "^attention must be one of 'full', 'dynamic', got attention='sparse'",
  ),
  "attention of a layer": (
    {"attention": ("full", None)},
    "^attention must be one of .*got attention=None",
  ),
  "pattern": (
    {"attention": ("dynamic", "full"), "num_layers": 3},
    "^attention must be .*a pattern whose length divides.*num_layers=3",
  ),
  "empty pattern": ({"attention": ()}, "^attention must be one kind or"),
  "options of nothing": (
    {"attention_options": DYNAMIC},
    "^attention_options are those of attention='dynamic', got",
  ),
  "options that see the future": (
    {"attention": "dynamic", "attention_options": {"is_causal": False}},
    "^attention_options must not .*is_causal",
  ),
  "options of the model": (
    {"attention": "dynamic", "attention_options": {"num_heads": 2}},
    "^attention_options must not .*num_heads",
  ),
  "an option that there is not": (
    {"attention": "dynamic", "attention_options": {"windw": 64}},
    "^attention_options must be of .*got 'windw'; did you mean 'window'",
  ),
  "option": (
    {"attention": "dynamic", "attention_options": {"window": 7}},
    "^window must be a multiple of block_size",
  ),
  "rotary_base": ({"rotary_base": 0}, "^rotary_base must be .*rotary_base=0"),
  "dropout": ({"dropout": 1.0}, "^dropout must be .*got dropout=1.0"),
  "separator": (
    {"separator": VOCAB},
    rf"^separator must be a token in \[0, {VOCAB}\).*separator={VOCAB}",
  ),
  "negative separator": ({"separator": -1}, "^separator must be a token"),
  "half a separator": ({"separator": 2.5}, "^separator must be a token"),
}


@pytest.fixture
def untyped(monkeypatch):
  """Switches the type checker of the tests off, as it is for users."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(untyped, name):
  wrong, message = WRONG[name]
  arguments = {"vocab_size": VOCAB, "features": FEATURES} | wrong
  with pytest.raises(ValueError, match=message):
    models.LanguageModel(**arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"attention": "sparse"}, "^attention must be one of 'full', 'dynamic'"),
    ({"attention_options": DYNAMIC}, "^attention_options are those of"),
  ],
  ids=str,
)
def test_wrong_arguments_of_a_layer_are_named(untyped, wrong, message):
  with pytest.raises(ValueError, match=message):
    models.DecoderLayer(FEATURES, hidden=8, **wrong, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    (jnp.ones(4, jnp.int32), r"\[B, T\].*got shape \(4,\)"),
    (jnp.ones((1, 1, 4), jnp.int32), r"\[B, T\].*got shape \(1, 1, 4\)"),
    (jnp.ones((1, 4)), "integers.*float32"),
    (jnp.ones((1, 4), bool), "integers.*bool"),
    (jnp.ones((2, 0), jnp.int32), r"at least one.*\(2, 0\)"),
  ],
  ids=["row", "cube", "floats", "bools", "nothing"],
)
@pytest.mark.parametrize("separator", [None, SEPARATOR])
def test_what_is_no_rows_of_tokens_is_named(
  untyped, tokens, message, separator
):
  module = build(num_layers=1, separator=separator)
  with pytest.raises(ValueError, match=f"^tokens must .*{message}"):
    module(tokens)
  with pytest.raises(ValueError, match=f"^tokens must .*{message}"):
    module.prefill(tokens, module.init_cache(1, 8))


@pytest.mark.parametrize(
  "segments", [jnp.zeros(4, int), jnp.zeros((2, 3), int), jnp.zeros((2, 4))]
)
def test_what_is_no_segments_is_named(untyped, segments):
  module = build(num_layers=1)
  with pytest.raises(ValueError, match=r"^segment_ids must"):
    module(jnp.ones((2, 4), jnp.int32), segments)
