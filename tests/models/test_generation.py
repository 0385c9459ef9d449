"""Laws of generation: a cache changes nothing, and chance is fair."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from deepseek_jax import models, nn
from deepseek_jax.models import generation

VOCAB, ROOM, NEW = 23, 128, 9
DYNAMIC = {
  "block_size": 8, "window": 16, "num_remote": 2, "num_hashes": 2,
  "hash_bits": 2,
}  # fmt: skip
KINDS = {
  "full": {"num_kv_heads": 1},
  "mixed": {"attention": ("dynamic", "full"), "attention_options": DYNAMIC},
  "dynamic": {"attention": "dynamic", "attention_options": DYNAMIC},
  "rounded": {
    "attention": ("full", "dynamic"), "attention_options": DYNAMIC,
    "dtype": jnp.bfloat16,
  },
}  # fmt: skip
LENGTHS = (1, 7, 8, 9, 63, 64, 65)  # Beside edges of blocks and of padding.
slow = pytest.mark.slow
each_kind = pytest.mark.parametrize(
  "kind",
  [
    "full",
    pytest.param("mixed", marks=slow),
    pytest.param("dynamic", marks=slow),
  ],
)


@functools.cache
def build(kind="full", loud=3, **kwargs):
  """A model; if loud, what it says depends on many tokens."""
  module = models.LanguageModel(
    VOCAB, features=16, num_layers=2, num_heads=2, tied=False,
    **KINDS[kind] | kwargs, rngs=nnx.Rngs(0),
  )  # fmt: skip
  louder = jax.tree.map(lambda x: loud * x, nnx.state(module, nnx.Param))
  nnx.update(module, louder)
  return module


@functools.cache
def scanned(kind):
  module = nnx.clone(build(kind))
  module.layers = nn.LayerStack(
    module.layers.unstacked(), scan=True, remat=True,
    period=2 if kind == "mixed" else 1,
  )  # fmt: skip
  return module


@functools.cache
def forward(kind, loud):
  module = nnx.clone(build(kind, loud=loud))
  module.eval()
  return jax.jit(lambda tokens: module(tokens))


@pytest.fixture
def untyped(monkeypatch):
  """Switches the type checker of the tests off, as it is for users."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def draw(length, batch=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(1, VOCAB, (batch, length)).astype(np.int32)


def padded(tokens):
  return np.pad(tokens, ((0, 0), (0, ROOM - tokens.shape[1])))


def write(module, prompt, num_tokens=NEW, **kwargs):
  """Generates with a cache of one size for all."""
  options = {"max_length": ROOM} | kwargs
  return models.generate(module, prompt, num_tokens, **options)


def recomputed(kind, text):
  """The likeliest token after every prefix, found without a cache."""
  return np.argmax(forward(kind, 3)(padded(text)), -1)[:, : text.shape[1]]


@each_kind
def test_greedy_text_is_what_recomputing_every_prefix_gives(kind):
  seen = set()
  for length in LENGTHS:
    prompt = draw(length)
    text = write(build(kind), prompt)
    assert text.shape == (3, length + NEW)
    assert text.dtype == np.int32
    np.testing.assert_array_equal(text[:, :length], prompt)
    likeliest = recomputed(kind, text)
    np.testing.assert_array_equal(
      text[:, length:], likeliest[:, length - 1 : -1]
    )
    seen |= set(text[:, length:].flat)
  assert len(seen) > VOCAB // 2  # It is not one word again and again.


@pytest.mark.parametrize(
  "kind", ["full", *(pytest.param(k, marks=slow) for k in ("mixed", "dynamic"))]
)
def test_scanned_layers_write_the_same(kind):
  for length in (9, 64):
    prompt = draw(length)
    np.testing.assert_array_equal(
      write(scanned(kind), prompt), write(build(kind), prompt)
    )


@pytest.mark.parametrize(
  "kind", ["full", *(pytest.param(k, marks=slow) for k in ("mixed", "dynamic"))]
)
def test_prefill_and_decode_give_the_logits_of_a_call(kind):
  module = nnx.clone(build(kind, loud=1))
  module.eval()
  tokens = jnp.asarray(draw(60))
  many = jnp.pad(tokens, ((0, 0), (0, 4)), constant_values=5)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  expected = forward(kind, 1)(padded(tokens))

  @jax.jit
  def prefill(tokens, length):
    return module.prefill(tokens, module.init_cache(3, ROOM), length)

  @jax.jit
  def decode(tokens, caches):
    def step(caches, token):
      logits, caches = module.decode(token, caches)
      return caches, logits

    return jax.lax.scan(step, caches, tokens.T)[1].swapaxes(0, 1)

  for length in (1, 8, 9, 60):
    logits, caches = prefill(many, length)
    close(logits, expected[:, length - 1])
    if length == 9:
      exact, same = prefill(tokens[:, :length], length)
      close(exact, logits)
      for one, other in zip(caches, same, strict=True):
        assert int(one.length) == int(other.length) == length
        close(one.total, other.total)
        close(one.count, other.count)
      close(decode(tokens[:, length:], caches), expected[:, length:60])


@pytest.mark.parametrize("kind", ["full", pytest.param("mixed", marks=slow)])
def test_rows_of_a_batch_are_texts_of_their_own(kind):
  text = write(build(kind), draw(9))
  for row in range(3):
    alone = write(build(kind), draw(9)[row : row + 1])
    np.testing.assert_array_equal(alone[0], text[row])


def test_prompts_may_be_given_in_many_ways():
  prompt = draw(9, batch=1)
  expected = write(build(), prompt)
  ways = (
    prompt[0],
    prompt.tolist(),
    prompt[0].tolist(),
    jnp.asarray(prompt),
    prompt.astype(np.uint8),
    prompt.astype(np.int64),
  )
  for way in ways:
    np.testing.assert_array_equal(write(build(), way), expected)


def test_streamed_parts_are_the_text():
  prompt, many = draw(9), 40
  parts = list(models.stream(build(), prompt, many, max_length=ROOM))
  assert len(parts) > 2
  text = write(build(), prompt, many)
  np.testing.assert_array_equal(np.concatenate(parts, 1), text[:, 9:])
  assert text.shape == (3, 9 + many)
  likeliest = recomputed("full", text)
  np.testing.assert_array_equal(text[:, 9:], likeliest[:, 8:-1])


def test_a_longer_text_begins_as_a_shorter_one():
  one, two, many = (write(build(), draw(9), n) for n in (1, 2, 33))
  np.testing.assert_array_equal(one, many[:, :10])
  np.testing.assert_array_equal(two, many[:, :11])


def compiled():
  return generation._begin._cache_size(), generation._go_on._cache_size()


def test_one_compilation_serves_prompts_of_similar_length():
  module, key = build(), jax.random.key(0)
  run = lambda length, new, **kwargs: models.generate(
    module, draw(length), new, **kwargs
  )
  run(5, 3)
  before = compiled()
  for length, new in ((1, 20), (6, 17), (33, 31), (40, 2)):
    run(length, new)
  run(5, 3, max_length=64)
  assert compiled() == before
  # Nor does a copy of the model, or of its weights.
  models.generate(nnx.clone(module), draw(3), 3)
  assert compiled() == before
  run(5, 3, temperature=0.5, key=key)
  before = compiled()
  run(7, 30, temperature=1.5, top_p=0.3, key=jax.random.key(1))
  assert compiled() == before


def test_the_model_stays_as_it_is():
  module = build(
    "full", dropout=0.5, activation="dynamic_sparse_relu", separator=0
  )
  module.train()
  before, state = nnx.split(nnx.clone(module))
  first = write(module, draw(9))
  after, kept = nnx.split(module)
  assert after == before
  same = lambda a, b: np.testing.assert_array_equal(*map(plain, (a, b)))
  jax.tree.map(same, nnx.to_pure_dict(state), nnx.to_pure_dict(kept))
  # In training mode or not, it writes in evaluation mode.
  np.testing.assert_array_equal(write(module, draw(9)), first)
  module.eval()
  np.testing.assert_array_equal(write(module, draw(9)), first)


def plain(x):
  x = getattr(x, "raw_value", x)
  is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


def cut(row, separator):
  """What a row becomes whose text ends with the separator."""
  ends = np.flatnonzero(row == separator)
  row = row.copy()
  if ends.size:
    row[ends[0] :] = separator
  return row


@functools.cache
def free_text():
  return write(build(), draw(9), 40)[:, 9:]


def a_late_word(rows):
  """A word that all rows say, as late as can be, and no prompt holds."""
  usual = set.intersection(*map(set, rows)) - set(draw(9).flat)
  return int(max(usual, key=lambda word: (rows == word).argmax(1).max()))


def test_rows_end_with_the_separator_and_the_text_with_the_last():
  free = free_text()
  word = a_late_word(free)
  ends = (free == word).argmax(1)
  assert ends.min() < ends.max()
  text = write(build(separator=word), draw(9), 40)[:, 9:]
  expected = np.stack([cut(row, word) for row in free])
  np.testing.assert_array_equal(text, expected[:, : text.shape[1]])
  # It looks every 16 tokens after the first whether all have ended.
  assert text.shape[1] == min(40, 1 + 16 * -(-ends.max() // 16))


def test_what_ends_at_once_is_one_token_long():
  word = int(free_text()[0, 0])
  prompt = draw(9)[:1]
  assert word not in prompt
  text = write(build(separator=word), prompt, 1000, max_length=None)
  np.testing.assert_array_equal(text, [[*prompt[0], word]])


def test_a_separator_may_begin_the_prompt():
  prompt = draw(9)
  prompt[:, 0] = 0
  module, free = build(separator=0), build()
  text, expected = write(module, prompt, 5), write(free, prompt, 5)
  for row, other in zip(text[:, 9:], expected[:, 9:], strict=True):
    np.testing.assert_array_equal(row, cut(other, 0)[: len(row)])


def test_the_same_key_writes_the_same_text():
  run = lambda seed: write(
    build(), draw(9), 30, temperature=1.0, top_p=0.9, key=jax.random.key(seed)
  )
  first = run(0)
  np.testing.assert_array_equal(run(0), first)
  assert (run(1) != first).any()
  # Rows of the same prompt draw for themselves.
  rows = write(
    build(), np.full((2, 9), 4), 30, temperature=1.0, key=jax.random.key(0)
  )
  assert (rows[0] != rows[1]).any()


@slow
def test_keys_of_the_old_kind_do(untyped):
  old, new = (
    write(build(), draw(9), temperature=1.0, key=make(0))
    for make in (jax.random.PRNGKey, jax.random.key)
  )
  np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
  "options",
  [
    {"temperature": 1e-6},
    {"temperature": 1e-40},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 5.0, "top_p": 1e-30},
  ],
  ids=str,
)
def test_without_chance_it_is_greedy(options):
  greedy = write(build(), draw(9), 30)
  found = write(build(), draw(9), 30, key=jax.random.key(3), **options)
  np.testing.assert_array_equal(found, greedy)


def test_each_token_is_drawn_by_a_key_of_its_own():
  module = build()
  flat = nnx.clone(module)
  flat.head.kernel[...] *= 0.0
  text = write(
    flat, np.ones((3, 1), int), 100, temperature=1.0, key=jax.random.key(0)
  )[:, 1:]
  counts = np.bincount(text.ravel(), minlength=VOCAB)
  assert stats.chisquare(counts).pvalue > 1e-3
  pairs = np.bincount(
    (text[:, :-1] % 3 * 3 + text[:, 1:] % 3).ravel(), minlength=9
  )
  chance = np.outer(*[np.bincount(np.arange(VOCAB) % 3) / VOCAB] * 2).ravel()
  assert stats.chisquare(pairs, chance * pairs.sum()).pvalue > 1e-3


LOGITS = np.array([-3.0, 1.0, 0.5, -1.0, 0.9, -9.0], np.float32)


@functools.cache
def draws(temperature, top_p, count=20_000):
  rows = jnp.broadcast_to(jnp.asarray(LOGITS), (count, len(LOGITS)))
  found = jax.jit(models.sample)(jax.random.key(0), rows, temperature, top_p)
  assert found.dtype == jnp.int32
  return np.bincount(found, minlength=len(LOGITS))


def nucleus(temperature, top_p):
  p = np.exp(np.float64(LOGITS) / temperature)
  p /= p.sum()
  order = np.argsort(-p)
  before = np.cumsum(p[order]) - p[order]
  kept = np.zeros(len(p), bool)
  kept[order[before < top_p]] = True
  return np.where(kept, p, 0) / p[kept].sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6, 0.2])
def test_draws_follow_the_softmax_of_what_top_p_keeps(temperature, top_p):
  counts, expected = draws(temperature, top_p), nucleus(temperature, top_p)
  kept = expected > 0
  assert not counts[~kept].any()
  if kept.sum() > 1:
    usual = expected * counts.sum() > 5
    counts = np.append(counts[usual], counts[~usual].sum())
    expected = np.append(expected[usual], expected[~usual].sum())
    real = expected > 0
    test = stats.chisquare(counts[real], expected[real] * counts.sum())
    assert test.pvalue > 1e-3


def test_no_temperature_changes_what_is_likeliest():
  logits = jnp.array([[-5.0, -3.0, -4.0], [2.0, -1.0, 1.5], [0.0, 9.0, 8.9]])
  for temperature in (1e-45, 1e-40, 1e-38, 1e-30, 1e-6):
    found = models.sample(jax.random.key(0), logits, temperature)
    np.testing.assert_array_equal(found, [1, 0, 1])
  found = models.sample(jax.random.key(0), logits, greedy=True)
  np.testing.assert_array_equal(found, [1, 0, 1])
  wild = models.sample(jax.random.key(0), logits, 1e30)
  assert ((wild >= 0) & (wild < 3)).all()


@pytest.mark.parametrize("kind", ["full", pytest.param("rounded", marks=slow)])
def test_a_bfloat16_cache_writes_nearly_the_same(kind):
  exact = write(build(kind), draw(9))
  near = write(build(kind), draw(9), cache_dtype=jnp.bfloat16)
  assert near.shape == exact.shape
  assert np.mean(near == exact) > 0.5


def test_a_larger_cache_changes_nothing():
  expected = models.generate(build(), draw(9), 5)
  for room in (14, 64, 200):
    found = models.generate(build(), draw(9), 5, max_length=room)
    np.testing.assert_array_equal(found, expected)


WRONG = {
  "no token": ({"prompt": []}, r"^prompt must be at least one token"),
  "no rows": ({"prompt": np.zeros((0, 3), int)}, "^prompt must be at least"),
  "floats": ({"prompt": [1.0, 2.0]}, "^prompt must be .*integers.*float64"),
  "bools": ({"prompt": [[True]]}, "^prompt must be .*integers.*bool"),
  "letters": ({"prompt": "abc"}, "^prompt must be .*integers.*<U3"),
  "bytes": ({"prompt": b"abc"}, "^prompt must be .*integers.*S3"),
  "cube": ({"prompt": [[[1]]]}, r"^prompt must be .*\(1, 1, 1\)"),
  "ragged": ({"prompt": [[1, 2], [3]]}, "^prompt must be rows of as many"),
  "negative": ({"prompt": [1, -2]}, r"^prompt must be tokens in \[0, 23\).*-2"),
  "unknown": ({"prompt": [1, VOCAB]}, "^prompt must be tokens in .*got 23"),
  "separator": (
    {"prompt": [[3, 0, 1]]},
    "^prompt must be of one document, got the separator, token 0",
  ),
  "num_tokens": ({"num_tokens": 0}, "^num_tokens must be .*num_tokens=0"),
  "half a token": ({"num_tokens": 2.5}, "^num_tokens must be .*=2.5"),
  "without end": (
    {"num_tokens": 10**12},
    r"^num_tokens must be at most .*num_tokens=1000000000000",
  ),
  "max_length": (
    {"max_length": 5},
    "^max_length must hold the prompt and num_tokens, 3 . 4, got max_length=5",
  ),
  "max_length of the prompt": ({"max_length": 2}, "^max_length must hold"),
  "half a length": ({"max_length": 99.5}, "^max_length must be an integer"),
  "cold": ({"temperature": -1.0}, "^temperature must be .*temperature=-1.0"),
  "nan": ({"temperature": float("nan")}, "^temperature must be .*nan"),
  "hot": ({"temperature": float("inf")}, "^temperature must be finite .*inf"),
  "no top_p": ({"top_p": 0.0}, r"^top_p must be in \(0, 1\], got top_p=0.0"),
  "top_p": ({"top_p": 1.5}, r"^top_p must be in \(0, 1\], got top_p=1.5"),
  "nan as top_p": ({"top_p": float("nan")}, r"^top_p must be in .*nan"),
  "no key": ({"temperature": 1.0}, "^key must be given with a temperature"),
  "cache_dtype": ({"cache_dtype": jnp.int32}, "^cache_dtype must be floating"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("function", [models.generate, models.stream])
def test_wrong_arguments_are_named(untyped, function, name):
  wrong, message = WRONG[name]
  arguments = {"prompt": [[1, 2, 3]], "num_tokens": 4} | wrong
  # At the call, not when the first token is wanted.
  with pytest.raises(ValueError, match=message):
    function(build(separator=0), **arguments)


def test_what_does_not_fit_a_cache_is_named(untyped):
  module, tokens = build(), jnp.ones((2, 9), jnp.int32)
  caches = module.init_cache(2, 64)
  with pytest.raises(ValueError, match=r"^cache must have room for 65 more"):
    module.prefill(jnp.ones((2, 65), jnp.int32), caches)
  with pytest.raises(ValueError, match=r"^cache must have as many rows"):
    module.prefill(tokens[:1], caches)
  for length in (0, 10, -1):
    with pytest.raises(
      ValueError, match=r"^length must be from 1 to .* 9, got"
    ):
      module.prefill(tokens, caches, length)
  with pytest.raises(ValueError, match=r"^token must be one of every row"):
    module.decode(tokens, caches)
  with pytest.raises(ValueError, match=r"^tokens must be integers"):
    module.decode(jnp.ones(2), caches)
  with pytest.raises(ValueError, match=r"^max_length must be"):
    module.init_cache(2, 0)
