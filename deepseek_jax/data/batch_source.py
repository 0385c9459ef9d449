"""The batches of a split, to be had at any step."""

import sys
from typing import Any

import numpy as np

from deepseek_jax.data.dataset import Split

Batch = dict[str, Any]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
  """Returns how many batches visit every example once: the quotient, up.

  Args:
    num_examples: Examples in the split; at least 1.
    batch_size: Rows of the global batch; at least 1.

  Returns:
    The number of batches, the last of which may be padded.

  Raises:
    ValueError: If an argument is below 1.

  >>> steps_per_epoch(1257, 64)
  20
  """
  if num_examples < 1:
    raise ValueError(f"num_examples must be at least 1, got {num_examples=}.")
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size=}.")
  return -(-num_examples // batch_size)


class BatchSource:
  """The batches of a split, each to be had at any step, as NumPy arrays.

  Reading whole batches, rather than examples which are then batched, is what
  makes the stream fast: one gather a column, and no Python loop over rows.
  It is a Grain `RandomAccessDataSource`, for those who compose their own
  pipelines: `grain.MapDataset.source(BatchSource(split, 64, epochs=1))`.

  The arguments and the batches are those of `batches`.
  """

  def __init__(
    self,
    split: Split,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Checks the arguments and draws the first epoch's order."""
    num_examples = len(split)
    self.steps_per_epoch = steps_per_epoch(num_examples, batch_size)
    _check_stream(num_examples, batch_size, seed, epochs)
    _check_processes(batch_size, process_index, process_count)
    self.identity = {
      "examples": num_examples,
      "batch_size": batch_size,
      "seed": seed,
      "shuffle": shuffle,
    }
    # Grain wants a length; no run sees the end of this one.
    self._num_steps = (
      sys.maxsize if epochs is None else epochs * self.steps_per_epoch
    )
    self._batch_size = batch_size
    self._rows = batch_size // process_count
    self._offset = process_index * self._rows
    self._take = split.take
    self._to_batch = [
      (name, feature.to_batch)
      for name, feature in split.schema.features.items()
    ]
    self._full = np.ones(batch_size, np.float32)
    self._last = np.ones(batch_size, np.float32)
    self._last[num_examples - (self.steps_per_epoch - 1) * batch_size :] = 0
    for mask in (self._full, self._last):
      mask.flags.writeable = False  # Batches hold views of them.
    self._cached = (0, *self._order(0))

  def __len__(self) -> int:
    """Returns the number of steps; `sys.maxsize` if there is no end."""
    return self._num_steps

  def __getitem__(self, step: int) -> Batch:
    """Returns this process's rows of the batch of `step`."""
    if not 0 <= step < self._num_steps:
      raise IndexError(f"step must be in [0, {self._num_steps}), got {step=}.")
    epoch, position = divmod(step, self.steps_per_epoch)
    if not self.identity["shuffle"]:
      epoch = 0
    cached, order, index = self._cached
    if cached != epoch:
      order, index = self._order(epoch)
      # One assignment, so that threads see an epoch and its order together.
      self._cached = (epoch, order, index)
    mask = self._last if position == self.steps_per_epoch - 1 else self._full
    start = position * self._batch_size + self._offset
    stop = start + self._rows
    stored = self._take(order[start:stop])
    batch = {name: convert(stored[name]) for name, convert in self._to_batch}
    batch["mask"] = mask[self._offset : self._offset + self._rows]
    batch["index"] = index[start:stop]
    return batch

  def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the epoch's examples, padded to whole batches, in two types."""
    num_examples, seed = self.identity["examples"], self.identity["seed"]
    if self.identity["shuffle"]:
      # Sorting raw Philox words, because NumPy promises the words of a bit
      # generator for ever, but not the permutations made from them.
      words = np.random.Philox(np.random.SeedSequence((seed, epoch)))
      order = words.random_raw(num_examples).argsort(kind="stable")
    else:
      order = np.arange(num_examples)
    order = np.resize(order, self.steps_per_epoch * self._batch_size)
    index = order.astype(np.int32 if num_examples < 2**31 else np.int64)
    index.flags.writeable = False  # Batches hold views of it.
    return order, index


def _check_stream(
  num_examples: int, batch_size: int, seed: int, epochs: int | None
) -> None:
  if batch_size > num_examples:
    raise ValueError(
      f"batch_size must be at most the {num_examples} examples of the split, "
      f"got {batch_size=}."
    )
  if seed < 0:
    raise ValueError(f"seed must be at least 0, got {seed=}.")
  if epochs is not None and epochs < 1:
    raise ValueError(f"epochs must be None or at least 1, got {epochs=}.")


def _check_processes(
  batch_size: int, process_index: int, process_count: int
) -> None:
  if process_count < 1 or batch_size % process_count:
    raise ValueError(
      "batch_size must be divisible by process_count, which is at least 1, "
      f"got {batch_size=}, {process_count=}."
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index must be in [0, process_count), got {process_index=}, "
      f"{process_count=}."
    )
