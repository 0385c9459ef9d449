"""Laws of data sets of texts: what is read, what is kept, what is refused."""

import logging
import threading

import numpy as np
import pytest

from deepseek_jax import data
from deepseek_jax.data import progress, token_cache
from deepseek_jax.data.tokenizers import make_tokenizer

SPLITS = ("train", "validation", "test")
TITLES = {"inputs": ["title"], "length": 16}


def load(root, tokenizer="bpe:262", **change) -> data.Dataset:
  return data.load(
    "tfds:tiny_shapes",
    data_dir=root,
    tokenizer=tokenizer,
    **{**TITLES, **change},
  )


def titles(split: data.Split) -> list[str]:
  stream = split[:]["tokens"].ravel()
  decode = split.schema.tokenizer.decode
  parts = np.split(stream, np.flatnonzero(stream == 0))
  return [title for part in parts if (title := decode(part))]


@pytest.fixture
def root(tiny_root, tmp_path):
  """The tiny data set, in a directory where nothing else is kept."""
  (tmp_path / "tiny_shapes").symlink_to(tiny_root / "tiny_shapes")
  return tmp_path


@pytest.fixture
def no_work(monkeypatch):
  """Makes learning and encoding fail, so that only what is kept is read."""

  def fail(*_, **__):
    raise AssertionError("worked again")

  return lambda: monkeypatch.setattr(
    "deepseek_jax.data.reading_text.make_tokenizer", fail
  )


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:262"])
def test_any_text_of_tfds_can_be_read(root, tokenizer):
  tiny = load(root, tokenizer)
  assert sorted(titles(tiny.test)) == sorted(f"picture {i}" for i in range(10))
  assert len(titles(tiny.train) + titles(tiny.validation)) == 40
  assert tiny.schema.input_shapes == {"tokens": (16,)}
  assert tiny.name == "tfds:tiny_shapes"


def test_splits_can_be_chosen(root):
  splits = dict(zip(SPLITS, ("train[:3]", "train[3:5]", "test"), strict=True))
  tiny = load(root, "bytes", splits=splits)
  assert [len(titles(getattr(tiny, name))) for name in SPLITS] == [3, 2, 10]


def test_pairs_are_learned_from_the_training_split_alone(root):
  tiny = load(root)
  assert tiny.schema.tokenizer == data.BPETokenizer.train(
    titles(tiny.train), 262
  )


def test_a_schema_alone_decodes(root):
  tiny = load(root)
  schema = data.Schema.from_json(tiny.schema.to_json())
  assert schema == tiny.schema
  assert schema.tokenizer == tiny.schema.tokenizer
  assert schema.tokenizer.decode(tiny.test[0]["tokens"]).startswith("pict")


def test_what_was_learned_is_kept(root, no_work):
  first = load(root)
  no_work()
  again = load(root)
  longer = load(root, length=32)
  assert again.schema == first.schema
  for name in SPLITS:
    rows, kept = (getattr(each, name)[:] for each in (first, again))
    for column in rows:
      np.testing.assert_array_equal(rows[column], kept[column])
    assert titles(getattr(longer, name)) == titles(getattr(first, name))


@pytest.mark.parametrize(
  "change",
  [
    {"tokenizer": "bpe:261"},
    {"tokenizer": data.BPETokenizer([(113, 106)])},
    {"splits": dict.fromkeys(SPLITS, "train")},
  ],
)
def test_what_was_learned_of_something_else_is_not_taken(root, change):
  load(root)
  kept = set((root / ".tokens").glob("*.npz"))
  assert len(kept) == 1
  load(root, **change)
  assert len(set((root / ".tokens").glob("*.npz")) - kept) == 1


def test_bytes_are_not_kept(root):
  load(root, "bytes")
  load(root, data.ByteTokenizer())
  assert not (root / ".tokens").exists()


def damage_all(stored: bytes) -> bytes:
  return bytes(len(stored))


def cut(stored: bytes) -> bytes:
  return stored[: len(stored) // 2]


def flip(stored: bytes) -> bytes:
  middle = len(stored) // 2
  flipped = bytes(255 - byte for byte in stored[middle : middle + 8])
  return stored[:middle] + flipped + stored[middle + 8 :]


def empty(stored: bytes) -> bytes:
  return b""


@pytest.mark.parametrize("damage", [damage_all, cut, flip, empty])
def test_what_is_damaged_is_made_anew(root, damage, caplog):
  rows = load(root).train[:]
  (path,) = (root / ".tokens").glob("*.npz")
  stored = path.read_bytes()
  path.write_bytes(damage(stored))
  with caplog.at_level(logging.WARNING):
    again = load(root).train[:]
  assert str(path) in caplog.text
  for name, column in rows.items():
    np.testing.assert_array_equal(column, again[name])
  # Nothing else remains, and what does is whole.
  assert {p.name for p in path.parent.iterdir()} <= {path.name, ".lock"}
  with np.load(path) as file, np.load(path) as other:
    assert set(file) == set(other) == {"tokenizer", *SPLITS}


def test_where_nothing_can_be_written_nothing_is_kept(root):
  (root / ".tokens").write_text("a file where a directory should be")
  assert len(titles(load(root).test)) == 10


def test_a_full_disk_is_no_reason_to_fail(root, monkeypatch, caplog):
  def fail(*_, **__):
    raise OSError("No space left on device")

  monkeypatch.setattr(np, "savez", fail)
  assert len(titles(load(root).test)) == 10
  assert "No space left" in caplog.text
  assert {p.name for p in (root / ".tokens").iterdir()} <= {".lock"}


def test_one_works_while_others_wait(tmp_path):
  calls = []
  made = token_cache.Encoded(
    data.ByteTokenizer(), dict.fromkeys(SPLITS, np.arange(3, dtype=np.uint8))
  )

  def make():
    calls.append(threading.get_ident())
    return made

  path = tmp_path / "kept.npz"
  workers = [
    threading.Thread(target=token_cache.cached, args=(path, make))
    for _ in range(4)
  ]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  assert len(calls) == 1


def test_own_texts_are_packed():
  texts = data.from_texts(
    iter(["one", b"two"]), ("three",), ["four"], length=5, name="mine"
  )
  assert (texts.name, len(texts.train), len(texts.test)) == ("mine", 2, 1)
  assert texts.train[:]["tokens"].tobytes() == b"\0one\0two\0\0"
  assert texts.validation[0]["targets"].tolist() == [*b"three"]


def test_own_texts_teach_pairs_if_asked():
  some = ["spam eggs spam", "eggs spam"]
  texts = data.from_texts(
    iter(some), ["x"], ["y"], length=4, tokenizer="bpe:260"
  )
  assert texts.schema.tokenizer == data.BPETokenizer.train(some, 260)
  assert texts.schema.vocab_size == 260
  assert texts.train[0]["tokens"].dtype == np.uint16
  given = data.from_texts(
    some, ["x"], ["y"], length=4, tokenizer=texts.schema.tokenizer
  )
  assert given.schema == texts.schema


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"length": 0}, "length must be at least 1, got length=0"),
    ({"train": "one text"}, "train must be several texts, got one"),
    ({"test": []}, "test: a split must hold at least one text, got 0"),
    ({"validation": ["a", "b\0"]}, r"validation\[1\]: text must hold no NUL"),
    ({"train": [b""]}, r"train\[0\]: text must not be empty"),
    ({"tokenizer": "words"}, '"bytes", "bpe:SIZE" or a Tokenizer, got tokeni'),
    ({"tokenizer": "bpe:many"}, "got tokenizer='bpe:many'"),
    ({"tokenizer": "bpe:12"}, "vocab_size must be at least 257"),
    ({"tokenizer": "bpe:5000"}, "vocab_size must be at most 257 for these"),
  ],
)
def test_bad_texts_are_refused(change, message):
  arguments = {"train": ["a"], "validation": ["b"], "test": ["c"], "length": 4}
  arguments |= change
  splits = [arguments.pop(name) for name in SPLITS]
  with pytest.raises(ValueError, match=message):
    data.from_texts(*splits, **arguments)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"length": 0}, "length must be at least 1, got length=0"),
    ({"length": None}, "length must be given to read text as tokens"),
    ({"target": "label"}, "target must be None for tokens, .*target='label'"),
    ({"inputs": None}, r"must name one text, of \['title'\], .* \['image'\]"),
    ({"inputs": ["area"]}, r"inputs must name one text, .* got \['area'\]"),
    ({"inputs": ["title", "title"]}, "inputs must name one text"),
    ({"tokenizer": "bpe"}, "tokenizer must be .* got tokenizer='bpe'"),
    (
      {"memory_limit": 10},
      "must hold the tokens of 'train', .* memory_limit=10",
    ),
  ],
)
def test_bad_arguments_are_refused(root, change, message):
  load(root)  # What is kept is refused too.
  with pytest.raises(ValueError, match=message):
    load(root, **change)


@pytest.mark.parametrize("change", [{"length": 4}, {"tokenizer": "bpe:300"}])
@pytest.mark.parametrize("name", ["digits", "tfds:digits"])
def test_a_data_set_without_text_is_no_text(name, change, digits):
  rule = "length and tokenizer are for data sets of text|length must be given"
  with pytest.raises(ValueError, match=rule):
    data.load(name, **change)


def test_a_text_among_numbers_says_how_to_read_it(root):
  with pytest.raises(ValueError, match="Give length to read a text as tokens"):
    data.load("tfds:tiny_shapes", data_dir=root, inputs=["title"])


def test_what_is_kept_is_no_data_set(root):
  load(root)
  with pytest.raises(ValueError, match="unknown data set") as error:
    data.load("tokens", data_dir=root)
  assert ".tokens" not in str(error.value)


def test_a_tokenizer_is_taken_as_it_is():
  tokenizer = data.BPETokenizer([(98, 99)])
  assert make_tokenizer(tokenizer, list) is tokenizer


def test_what_takes_long_shows_a_bar_on_a_terminal(monkeypatch, capsys):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
  for patience, shown in ((0.0, True), (60.0, False)):
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    assert list(progress.tracked(range(3), "waiting", 3)) == [0, 1, 2]
    assert ("waiting" in capsys.readouterr().err) == shown
