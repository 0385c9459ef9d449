"""A tiny TFDS data set of PNG images, as a stranger would write one."""

import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from deepseek_jax import data


def tiny_images(num: int, seed: int) -> np.ndarray:
  random = np.random.default_rng(seed)
  return random.integers(0, 256, (num, 6, 5, 3), dtype=np.uint8)


class TinyShapes(tfds.core.GeneratorBasedBuilder):
  """Forty pictures to train and ten to test, in two classes."""

  VERSION = tfds.core.Version("1.0.0")
  pkg_dir_path = Path(__file__).parent

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3)),
          "label": tfds.features.ClassLabel(names=["round", "square"]),
          "area": tfds.features.Scalar(dtype=np.float32),
          "title": tfds.features.Text(),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager):
    return {
      "train": self._generate_examples(40, 0),
      "test": self._generate_examples(10, 1),
    }

  def _generate_examples(self, num, seed):
    for key, image in enumerate(tiny_images(num, seed)):
      file = io.BytesIO()
      Image.fromarray(image).save(file, format="PNG")
      yield (
        key,
        {
          "image": file.getvalue(),
          "label": key % 2,
          "area": key / num,
          "title": f"picture {key}",
        },
      )


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
  """A directory in which the tiny data set is prepared."""
  root = tmp_path_factory.mktemp("tiny")
  data.load("tfds:tiny_shapes", data_dir=root)
  return root


@pytest.fixture(scope="session")
def digits(data_dir):
  return data.load("digits", data_dir=data_dir)


@pytest.fixture(name="tiny_images", scope="session")
def _tiny_images():
  return tiny_images
