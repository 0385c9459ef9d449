"""Batches as a pure function of (seed, step), over one batch-level source."""

import atexit
import operator
import sys
import weakref
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from deepseek_jax.data.dataset import Split

Batch = dict[str, Any]


def batches(
  split: Split,
  batch_size: int,
  *,
  seed: int = 0,
  shuffle: bool = True,
  epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
  transfer: Callable[[Batch], Batch] | None = None,
  prefetch: int = 2,
) -> grain.IterDataset:
  """Returns a stream of batches that can be stopped and resumed anywhere.

  The batch of step `s` is a pure function of `(seed, s)`: epoch `e` visits
  every example once, in the order of a permutation drawn from `(seed, e)`, so
  nothing but the step has to be saved. A batch is a dict of the schema's
  features (images in [0, 1] as float32, labels as int32) and

  * `"mask"`, float32 [B]: 1 for an example, 0 for padding;
  * `"index"`, int32 or int64 [B]: which example of the split a row is.

  All batches have the same shapes: the last one of an epoch is padded with
  rows of that epoch, which are real (so numbers stay finite) but masked. The
  iterator has `get_state` and `set_state` (JSON-able), as Grain's checkpoint
  handlers want, and `close`, which ends the prefetching thread.

  Not for data that must be augmented on the CPU example by example: here a
  batch is gathered at once, and augmentation belongs on the device.

  Args:
    split: What to read.
    batch_size: Rows of the global batch, over all processes; in [1, len(split)]
      and divisible by `process_count`.
    seed: What the permutations are drawn from; at least 0.
    shuffle: Whether to permute; otherwise examples come in the split's order.
    epochs: How many passes; `None` never ends.
    process_index: Which contiguous share of the rows to return; in
      [0, process_count).
    process_count: How many processes share a batch. The global batch does not
      depend on it.
    transfer: Applied to every batch, in the prefetching thread if there is
      one; say, a `jax.device_put` with shardings.
    prefetch: How many finished batches a thread keeps ready; 0 makes each
      batch when it is asked for, which is faster where a batch takes less
      than some 20 microseconds.

  Returns:
    A `grain.IterDataset`; each `iter` of it starts at step 0.

  Raises:
    ValueError: If an argument is out of its range.

  >>> import deepseek_jax as dj
  >>> digits = dj.data.load("digits")
  >>> stream = iter(dj.data.batches(digits.train, 64, prefetch=0))
  >>> batch = next(stream)
  >>> batch["image"].shape, batch["image"].dtype, batch["mask"].sum().item()
  ((64, 8, 8, 1), dtype('float32'), 64.0)
  >>> stream.get_state()["next_step"]
  1

  References:
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011,
    https://doi.org/10.1145/2063384.2063405 (Philox, the generator).
  """
  if prefetch < 0:
    raise ValueError(f"prefetch must be at least 0, got {prefetch=}.")
  source = BatchSource(
    split,
    batch_size,
    seed=seed,
    shuffle=shuffle,
    epochs=epochs,
    process_index=process_index,
    process_count=process_count,
  )
  inline = _Batches(source, transfer)
  return _Prefetched(inline, prefetch) if prefetch else inline


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
    self._mask = np.zeros(self.steps_per_epoch * batch_size, np.float32)
    self._mask[:num_examples] = 1
    self._mask.flags.writeable = False
    self._cached = (-1, *self._order(0))

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
    start = position * self._batch_size + self._offset
    stop = start + self._rows
    stored = self._take(order[start:stop])
    batch = {name: convert(stored[name]) for name, convert in self._to_batch}
    batch["mask"] = self._mask[start:stop]
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
    order = np.resize(order, len(self._mask))
    index = order.astype(np.int32 if num_examples < 2**31 else np.int64)
    index.flags.writeable = False  # Batches hold views of it.
    return order, index


class _Batches(grain.IterDataset):
  """Reads a `BatchSource` in order, with none of Grain's machinery between.

  `grain.MapDataset.to_iter_dataset` costs some 14 microseconds a batch, three
  times what making one takes.
  """

  def __init__(
    self, source: BatchSource, transfer: Callable[[Batch], Batch] | None
  ):
    super().__init__()
    self._source = source
    self._transfer = transfer

  def __iter__(self) -> "_BatchIterator":
    return _BatchIterator(self._source, self._transfer)


class _BatchIterator(grain.DatasetIterator):
  """The position in a `BatchSource`, which is all the state there is."""

  def __init__(
    self, source: BatchSource, transfer: Callable[[Batch], Batch] | None
  ):
    super().__init__()
    self._source = source
    self._transfer = transfer
    self._num_steps = len(source)
    self._next_step = 0

  def __next__(self) -> Batch:
    if self._next_step >= self._num_steps:
      raise StopIteration
    batch = self._source[self._next_step]
    if self._transfer is not None:
      batch = self._transfer(batch)
    self._next_step += 1
    return batch

  def get_state(self) -> dict[str, Any]:
    return {"next_step": self._next_step, **self._source.identity}

  def set_state(self, state: dict[str, Any]) -> None:
    for name, value in self._source.identity.items():
      if state.get(name) != value:
        raise ValueError(
          f"a state can only be restored into the stream it came from: it has "
          f"{name}={state.get(name)}, this stream has {name}={value}."
        )
    self._next_step = operator.index(state["next_step"])


class _Prefetched(grain.IterDataset):
  """Keeps a few batches ready in Grain's prefetching thread."""

  def __init__(self, parent: grain.IterDataset, num_batches: int):
    super().__init__(parent)
    self._num_batches = num_batches

  def __iter__(self) -> "_PrefetchIterator":
    return _PrefetchIterator(iter(self._parent), self._num_batches)


class _PrefetchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
  """Grain's iterator, closed in time when Python exits.

  Grain closes it from `__del__`, which at exit runs after the modules it needs
  are gone, and prints a traceback.
  """

  def __init__(self, parent: grain.DatasetIterator, num_batches: int):
    super().__init__(parent, num_batches)
    reference = weakref.ref(self)
    atexit.register(lambda: (it := reference()) and it.close())

  def close(self) -> None:
    """Ends the thread; the second time does nothing."""
    if not self._closed:
      super().close()


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
