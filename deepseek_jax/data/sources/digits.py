"""Scikit-learn's handwritten digits as a TFDS data set, made offline."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

_DESCRIPTION = """
1,797 grey images, 8 by 8 pixels of 0 to 16, of digits written by 43 people:
the test set of the UCI "Optical Recognition of Handwritten Digits", as bundled
with scikit-learn. Splits are stratified by class: 1,257 examples to train, 180
to validate and 360 to test.
"""

_CITATION = """
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}
"""


class Digits(tfds.core.GeneratorBasedBuilder):
  """Handwritten digits in three fixed, disjoint, stratified splits.

  The examples are ordered by (class, SHA-256 of the example's number), and of
  every ten in that order the first goes to validation, the next two to test
  and the other seven to train. So each class is divided 70 : 10 : 20 to within
  one example, and no version of any library can move an example.

  References:
    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998,
    https://doi.org/10.24432/C50P49.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar = {"1.0.0": "First release."}

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      citation=_CITATION,
      homepage="https://doi.org/10.24432/C50P49",
      features=tfds.features.FeaturesDict(
        {
          # A Tensor: writing an Image feature would need TensorFlow, and its
          # range would be 0 to 255.
          "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
          "label": tfds.features.ClassLabel(names=[*"0123456789"]),
        }
      ),
      supervised_keys=("image", "label"),
      metadata=tfds.core.MetadataDict(ranges={"image": [0, 16]}),
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> Mapping[str, Iterator[tuple[int, dict[str, Any]]]]:
    from sklearn import datasets  # A second to import: only when preparing.

    images, labels = datasets.load_digits(return_X_y=True)
    images = np.reshape(images, (-1, 8, 8, 1)).astype(np.uint8)
    labels = np.asarray(labels)
    order = sorted(range(len(labels)), key=lambda i: (labels[i], _hash(i)))
    parts = {"train": [], "validation": [], "test": []}
    for place, example in enumerate(order):
      parts[_SPLIT_OF_TEN[place % 10]].append(example)
    return {
      name: self._generate_examples(images, labels, part)
      for name, part in parts.items()
    }

  def _generate_examples(
    self, images: np.ndarray, labels: np.ndarray, part: list[int]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for example in part:
      yield (
        example,
        {"image": images[example], "label": int(labels[example])},
      )


_SPLIT_OF_TEN = ["validation", "test", "test", *["train"] * 7]


def _hash(example: int) -> str:
  return hashlib.sha256(str(example).encode()).hexdigest()
