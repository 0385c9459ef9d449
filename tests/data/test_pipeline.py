"""Laws of the stream of batches."""

import json
import pickle
import subprocess
import sys
import threading

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax import data


def make_split(num: int) -> data.Split:
  """A split whose every row tells its index."""
  rows = {"x": np.arange(num, dtype=np.float32), "y": np.arange(num) % 2}
  return data.from_arrays(
    rows, rows, rows, inputs=["x"], target="y", num_classes=2
  ).train


def assert_same(left: list, right: list) -> None:
  assert len(left) == len(right)
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


@st.composite
def streams(draw):
  num = draw(st.integers(1, 40))
  processes = draw(st.integers(1, min(num, 4)))
  rows = draw(st.integers(1, num // processes))
  return num, rows * processes, processes


@settings(max_examples=60, deadline=None)
@given(streams(), st.integers(0, 2**40), st.booleans())
def test_every_example_comes_once_an_epoch(shape, seed, shuffle):
  num, batch_size, _ = shape
  split = make_split(num)
  stream = list(
    data.batches(
      split, batch_size, seed=seed, shuffle=shuffle, epochs=2, prefetch=0
    )
  )
  steps = data.steps_per_epoch(num, batch_size)
  assert len(stream) == 2 * steps
  for epoch in (stream[:steps], stream[steps:]):
    seen = np.concatenate([b["x"][b["mask"] == 1] for b in epoch])
    assert sorted(seen) == list(range(num))
    if not shuffle:
      assert list(seen) == list(range(num))


@settings(max_examples=30, deadline=None)
@given(streams())
def test_only_the_tail_of_an_epoch_is_padded_and_with_real_rows(shape):
  num, batch_size, _ = shape
  split = make_split(num)
  *full, last = data.batches(split, batch_size, epochs=1, prefetch=0)
  assert all(batch["mask"].all() for batch in full)
  real = num - len(full) * batch_size
  np.testing.assert_array_equal(last["mask"], np.arange(batch_size) < real)
  for batch in (*full, last):
    assert batch["mask"].dtype == np.float32
    assert all(len(column) == batch_size for column in batch.values())
    np.testing.assert_array_equal(batch["x"], split[batch["index"]]["x"])


@settings(max_examples=30, deadline=None)
@given(streams(), st.integers(0, 100))
def test_processes_together_read_the_global_batch(shape, seed):
  num, batch_size, processes = shape
  split = make_split(num)
  whole, *shares = (
    list(
      data.batches(
        split,
        batch_size,
        seed=seed,
        epochs=1,
        process_index=index,
        process_count=count,
        prefetch=0,
      )
    )
    for index, count in [(0, 1), *((i, processes) for i in range(processes))]
  )
  union = [
    {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    for rows in zip(*shares, strict=True)
  ]
  assert_same(union, whole)


@settings(max_examples=30, deadline=None)
@given(streams(), st.integers(0, 100), st.integers(0, 1000))
def test_a_batch_is_a_pure_function_of_seed_and_step(shape, seed, step):
  num, batch_size, _ = shape
  split = make_split(num)
  source = data.BatchSource(split, batch_size, seed=seed)
  first = source[step]
  for other in (step + 1, max(0, step - 7), 0):
    source[other]
  again = data.BatchSource(split, batch_size, seed=seed)[step]
  assert_same([first, source[step]], [again, again])


def test_the_order_is_pinned():
  # Runs saved by one version must resume under the next.
  source = data.BatchSource(make_split(10), 5, seed=3)
  orders = [
    np.concatenate([source[2 * e]["index"], source[2 * e + 1]["index"]])
    for e in range(2)
  ]
  assert [order.tolist() for order in orders] == [
    [0, 1, 2, 7, 5, 6, 9, 8, 4, 3],
    [5, 8, 9, 6, 3, 7, 0, 1, 2, 4],
  ]


def test_epochs_and_seeds_have_different_orders():
  split = make_split(100)
  source, other = (data.BatchSource(split, 100, seed=seed) for seed in (0, 1))
  orders = [source[0]["index"], source[1]["index"], other[0]["index"]]
  for i in range(3):
    for j in range(i):
      assert np.mean(orders[i] == orders[j]) < 0.1


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("epochs", [None, 2])
def test_a_restored_stream_continues_as_the_unbroken_one(prefetch, epochs):
  split = make_split(23)
  make = lambda prefetch: data.batches(
    split, 5, seed=4, epochs=epochs, prefetch=prefetch
  )
  dataset = make(prefetch)
  unbroken = iter(dataset)
  states, expected = [unbroken.get_state()], []
  for _ in range(10):
    expected.append(next(unbroken))
    states.append(json.loads(json.dumps(unbroken.get_state())))
  unbroken.close()
  for step in (0, 1, 4, 5, 9, 10):
    other = 2 - prefetch  # States do not depend on prefetching.
    fresh = iter(dataset if step % 2 else make(other))
    for _ in range(3):  # A restore replaces whatever happened before.
      next(fresh)
    fresh.set_state(states[step])
    assert fresh.get_state() == states[step]
    assert_same([next(fresh) for _ in range(10 - step)], expected[step:])
    if epochs:
      with pytest.raises(StopIteration):
        next(fresh)
    fresh.close()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_prefetch_changes_nothing_but_the_thread(prefetch):
  split, threads = make_split(23), []

  def transfer(batch):
    threads.append(threading.current_thread() is threading.main_thread())
    return {**batch, "x": batch["x"] + 1}

  batches = list(
    data.batches(split, 4, epochs=2, transfer=transfer, prefetch=prefetch)
  )
  plain = list(data.batches(split, 4, epochs=2, prefetch=0))
  assert_same(batches, [{**b, "x": b["x"] + 1} for b in plain])
  assert set(threads) == {prefetch == 0}


def test_prefetched_states_do_not_run_ahead():
  stream = iter(data.batches(make_split(50), 5, prefetch=4))
  next(stream)
  assert stream.get_state()["next_step"] == 1
  stream.close()


def test_an_error_in_transfer_reaches_the_reader():
  def transfer(batch):
    raise OSError("no device")

  stream = iter(data.batches(make_split(5), 5, transfer=transfer))
  with pytest.raises(OSError, match="no device"):
    next(stream)
  stream.close()


def test_close_ends_the_thread_twice():
  before = threading.active_count()
  stream = iter(data.batches(make_split(50), 5, prefetch=4))
  next(stream)
  assert threading.active_count() == before + 1
  stream.close()
  stream.close()
  assert threading.active_count() == before


def test_an_open_stream_does_not_disturb_the_end_of_python():
  code = (
    "import numpy as np\n"
    "from deepseek_jax import data\n"
    "x = {'x': np.ones(9, np.float32), 'y': np.ones(9, np.float32)}\n"
    "split = data.from_arrays(x, x, x, inputs=['x'], target='y').train\n"
    "stream = iter(data.batches(split, 2))\n"
    "next(stream)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_orbax_saves_and_restores_the_iterator(tmp_path, prefetch):
  dataset = data.batches(make_split(23), 5, seed=4, prefetch=prefetch)
  saved, restored = iter(dataset), iter(dataset)
  for _ in range(7):
    next(saved)
  with ocp.CheckpointManager(tmp_path) as manager:
    save = grain.checkpoint.CheckpointSave(saved)
    manager.save(0, args=ocp.args.Composite(data=save))
    manager.wait_until_finished()
    restore = grain.checkpoint.CheckpointRestore(restored)
    manager.restore(0, args=ocp.args.Composite(data=restore))
  assert_same(
    [next(restored) for _ in range(5)], [next(saved) for _ in range(5)]
  )
  saved.close()
  restored.close()


def test_a_state_of_another_stream_is_refused():
  split = make_split(20)
  state = iter(data.batches(split, 5, prefetch=0)).get_state()
  for other in (
    data.batches(split, 4, prefetch=0),
    data.batches(split, 5, seed=1, prefetch=0),
    data.batches(split, 5, shuffle=False, prefetch=0),
    data.batches(make_split(21), 5, prefetch=0),
  ):
    with pytest.raises(ValueError, match="stream it came from: it has"):
      iter(other).set_state(state)


def test_a_source_of_batches_composes_with_grain():
  source = data.BatchSource(make_split(23), 5, seed=1, epochs=1)
  dataset = grain.MapDataset.source(source).to_iter_dataset(
    grain.ReadOptions(num_threads=0)
  )
  plain = data.batches(make_split(23), 5, seed=1, epochs=1, prefetch=0)
  assert_same(list(dataset), list(plain))


def test_sources_can_be_pickled():
  source = data.BatchSource(make_split(23), 5, seed=1)
  assert_same([pickle.loads(pickle.dumps(source))[7]], [source[7]])


def test_digits_batches_are_scaled_by_the_range_of_the_schema(digits):
  (batch,) = data.batches(digits.test, 360, shuffle=False, epochs=1, prefetch=0)
  stored = digits.test[:]
  assert batch["image"].dtype == np.float32
  assert batch["label"].dtype == np.int32
  np.testing.assert_array_equal(batch["image"] * 16, stored["image"])
  np.testing.assert_array_equal(batch["label"], stored["label"])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 0}, "batch_size must be at least 1, got batch_size=0"),
    ({"batch_size": 11}, "batch_size must be at most the 10 examples"),
    ({"seed": -1}, "seed must be at least 0, got seed=-1"),
    ({"epochs": 0}, "epochs must be None or at least 1, got epochs=0"),
    ({"prefetch": -1}, "prefetch must be at least 0, got prefetch=-1"),
    ({"process_count": 3}, "divisible by process_count"),
    ({"process_count": 0}, "divisible by process_count"),
    ({"process_count": 2, "process_index": 2}, "process_index must be in"),
    ({"process_index": -1}, "process_index must be in"),
  ],
)
def test_bad_arguments_are_refused(change, message):
  arguments = {"batch_size": 4, **change}
  with pytest.raises(ValueError, match=message):
    data.batches(make_split(10), **arguments)


def test_steps_outside_the_stream_are_refused():
  source = data.BatchSource(make_split(10), 4, epochs=2)
  with pytest.raises(IndexError, match=r"step must be in \[0, 6\), got step=6"):
    source[6]


@pytest.mark.parametrize(
  ("num_examples", "batch_size"), [(0, 4), (4, 0), (-1, 1)]
)
def test_steps_per_epoch_wants_positive_numbers(num_examples, batch_size):
  with pytest.raises(ValueError, match="must be at least 1"):
    data.steps_per_epoch(num_examples, batch_size)
