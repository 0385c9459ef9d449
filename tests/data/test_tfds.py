"""Laws of reading any TFDS data set, and of what cannot be read."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from deepseek_jax import data
from deepseek_jax.data import prepared

SPLITS = ("train", "validation", "test")


def rows(split: data.Split) -> list[bytes]:
  return [image.tobytes() for image in split[:]["image"]]


def test_images_are_read_as_they_were_written(tiny_root, tiny_images):
  tiny = data.load("tfds:tiny_shapes", data_dir=tiny_root)
  written = {image.tobytes() for image in tiny_images(10, 1)}
  assert set(rows(tiny.test)) == written
  assert set(tiny.test[:]["label"]) == {0, 1}


def test_the_schema_comes_from_the_supervised_keys(tiny_root):
  schema = data.load("tfds:tiny_shapes", data_dir=tiny_root).schema
  assert (schema.inputs, schema.target) == (("image",), "label")
  # The builder left height and width open: an example settles them.
  assert schema.input_shapes == {"image": (6, 5, 3)}
  assert (schema.features["image"].low, schema.features["image"].high) == (
    0,
    255,
  )
  assert schema.class_names == ("round", "square")


def test_a_missing_validation_split_is_cut_off_train(tiny_root):
  tiny = data.load("tfds:tiny_shapes", data_dir=tiny_root)
  assert [len(getattr(tiny, name)) for name in SPLITS] == [36, 4, 10]
  assert not set(rows(tiny.train)) & set(rows(tiny.validation))


def test_splits_can_be_chosen(tiny_root):
  splits = {
    "train": "train[:50%]",
    "validation": "train[50%:]",
    "test": "test[:3]",
  }
  tiny = data.load("tfds:tiny_shapes", data_dir=tiny_root, splits=splits)
  assert [len(getattr(tiny, name)) for name in SPLITS] == [20, 20, 3]


def test_a_float_feature_makes_it_regression(tiny_root):
  tiny = data.load(
    "tfds:tiny_shapes", data_dir=tiny_root, inputs=["image"], target="area"
  )
  assert tiny.schema.num_classes is None
  batch = next(iter(data.batches(tiny.train, 4, prefetch=0)))
  assert batch["area"].dtype == np.float32
  assert set(batch) == {"image", "area", "mask", "index"}


def test_what_does_not_fit_in_memory_is_read_batch_by_batch(tiny_root):
  held, read = (
    data.load("tfds:tiny_shapes", data_dir=tiny_root, memory_limit=limit)
    for limit in (2**20, 0)
  )
  assert type(held.train.reader) is not type(read.train.reader)
  assert read.train[3]["image"].shape == held.train[3]["image"].shape
  for name in SPLITS:
    for a, b in zip(
      data.batches(getattr(held, name), 4, epochs=1, prefetch=0),
      data.batches(getattr(read, name), 4, epochs=1),
      strict=True,
    ):
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_digits_are_a_tfds_data_set_like_any_other(digits, data_dir):
  again = data.load("tfds:digits", data_dir=data_dir)
  assert again.schema == digits.schema
  assert rows(again.test) == rows(digits.test)
  source = tfds.data_source(
    "digits", split="test", data_dir=data_dir, download=False
  )
  assert source[0]["image"].tobytes() == rows(digits.test)[0]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"target": "lable"}, "unknown feature 'lable'; did you mean 'label'"),
    ({"inputs": ["title"]}, "'title' is a Text"),
    ({"inputs": ["label"]}, "inputs must name at least one feature"),
    ({"splits": {"train": "train"}}, "splits must give 'train', 'validation'"),
    ({"splits": dict.fromkeys(SPLITS, "trian")}, "a part of"),
    ({"splits": dict.fromkeys(SPLITS, "train[:0]")}, "at least one example"),
  ],
)
def test_bad_arguments_are_refused(tiny_root, arguments, message):
  with pytest.raises(ValueError, match=message):
    data.load("tfds:tiny_shapes", data_dir=tiny_root, **arguments)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("digit", "unknown data set 'digit'; did you mean 'digits'"),
    ("mnist", "unknown data set 'mnist'; did you mean 'tfds:"),
    ("tfds:", "unknown data set 'tfds:'"),
    ("tfds:mnst", "unknown TFDS data set 'mnst'; did you mean 'mnist'"),
    ("tfds:glue/colla", "'glue/colla'"),
  ],
)
def test_unknown_names_are_answered_with_the_nearest(name, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    data.load(name, data_dir=tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.fixture
def offline(monkeypatch):
  def refuse(*_, **__):
    raise socket.gaierror("Name or service not known")

  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(name.lower(), raising=False)


def test_offline_says_what_to_run_where_and_leaves_nothing(offline, tmp_path):
  with pytest.raises(RuntimeError, match="does not answer") as error:
    data.load("tfds:cifar10", data_dir=tmp_path)
  text = str(error.value)
  assert "tfds build cifar10 --file_format=array_record" in text
  assert "pip install" in text
  assert "tensorflow\n" in text
  assert str(tmp_path) in text
  assert not list(tmp_path.iterdir())


def test_download_false_leaves_the_network_alone(tmp_path):
  with pytest.raises(RuntimeError, match="download is False"):
    data.load("tfds:penguins", data_dir=tmp_path, download=False)
  assert not list(tmp_path.iterdir())


def test_a_builder_that_needs_tensorflow_says_so(tmp_path):
  with pytest.raises(RuntimeError, match="its builder needs tensorflow"):
    data.load("tfds:speech_commands", data_dir=tmp_path)
  assert not list(tmp_path.iterdir())


def assert_nothing_is_left(root: Path) -> None:
  assert {path.name for path in root.iterdir()} <= {".deepseek_jax.lock"}


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise OSError("No space left on device")

  monkeypatch.setattr(tfds.core.writer.Writer, "write", fail)
  with pytest.raises(RuntimeError, match="OSError: No space left"):
    data.load("tfds:tiny_shapes", data_dir=tmp_path)
  assert_nothing_is_left(tmp_path)


def test_encoding_that_needs_tensorflow_says_so(
  tmp_path, monkeypatch, tiny_images
):
  def examples(self, num, seed):
    for key, image in enumerate(tiny_images(num, seed)):
      yield key, {"image": image, "label": 0, "area": 0.0, "title": ""}

  builder = tfds.builder_cls("tiny_shapes")
  monkeypatch.setattr(builder, "_generate_examples", examples)
  with pytest.raises(
    RuntimeError, match=r"preparing it \(not reading it\) needs tensorflow"
  ):
    data.load("tfds:tiny_shapes", data_dir=tmp_path)
  assert_nothing_is_left(tmp_path)


def damage_description(path: Path) -> None:
  (path / "dataset_info.json").write_text('{"name": ')


def damage_features(path: Path) -> None:
  (path / "features.json").unlink()


def damage_shard(path: Path) -> None:
  next(path.glob("*-train.array_record*")).unlink()


def cut_shard(path: Path) -> None:
  shard = next(path.glob("*-train.array_record*"))
  shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def flip_bytes(path: Path) -> None:
  shard = next(path.glob("*-train.array_record*"))
  stored = bytearray(shard.read_bytes())
  middle = len(stored) // 2
  stored[middle : middle + 8] = bytes(255 - b for b in stored[middle:][:8])
  shard.write_bytes(stored)


@pytest.mark.parametrize(
  "damage",
  [
    damage_description,
    damage_features,
    damage_shard,
    cut_shard,
    flip_bytes,
  ],
)
@pytest.mark.parametrize("name", ["digits", "tfds:tiny_shapes"])
def test_a_damaged_directory_is_named(tmp_path, damage, name):
  data.load(name, data_dir=tmp_path)
  (path,) = tmp_path.glob("*/1.0.0")
  damage(path)
  with pytest.raises(ValueError, match="cannot be read") as error:
    data.load(name, data_dir=tmp_path)
  assert str(path.parent) in str(error.value)


def test_the_directory_follows_the_environment(monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  assert prepared.data_root(None) == tmp_path
  monkeypatch.delenv("TFDS_DATA_DIR")
  home = Path(os.path.expanduser("~"))
  assert prepared.data_root(None) == home / "tensorflow_datasets"
  assert prepared.data_root("~/x") == home / "x"
