"""Laws of agreement: one odd rank, and every rank says which and in what."""

import collections
import threading

import jax
import pytest

from deepseek_jax.parallel import agreement, store


class Client:
  """The part of JAX's client that stores use, within one process."""

  def __init__(self):
    self.notes = {}

  def key_value_set(self, key, value, allow_overwrite=False):
    assert allow_overwrite or key not in self.notes
    self.notes[key] = value

  def key_value_try_get(self, key):
    if key not in self.notes:
      raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
    return self.notes[key]

  def key_value_dir_get(self, key):
    found = dict(self.notes)
    return [(k, v) for k, v in found.items() if k.startswith(key)]


def agree_all(fields, seconds=5.0, absent=()):
  """Agrees from threads; returns by rank the error, None if there was none."""
  notes = store.Store(Client(), "agree/0")
  said = {}

  def come(rank):
    try:
      agreement._agree(
        notes,
        agreement.flatten(fields[rank]),
        what="configuration",
        rank=rank,
        count=len(fields),
        seconds=seconds,
      )
      said[rank] = None
    except (agreement.DisagreementError, store.StartError) as error:
      said[rank] = str(error)

  ranks = [r for r in range(len(fields)) if r not in absent]
  threads = [threading.Thread(target=come, args=(r,)) for r in ranks]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return said


def test_ranks_that_were_told_the_same_agree():
  same = {"seed": 0, "model": {"widths": [1, 2], "rate": 0.1}}
  assert agree_all([same] * 4) == dict.fromkeys(range(4))


def test_every_rank_names_the_odd_one_and_the_field():
  fields = [{"train": {"seed": 0, "epochs": 2}} for _ in range(4)]
  fields[2]["train"]["seed"] = 1
  said = agree_all(fields)
  assert set(said) == {0, 1, 2, 3}
  assert set(said.values()) == {
    "ranks disagree on their configuration: train.seed is 0 on ranks 0, 1, 3 "
    "and 1 on rank 2."
  }


def test_a_field_that_some_do_not_have_is_named_too():
  said = agree_all([{"a": 1}, {"a": 1, "b": None}])
  assert "b is not set on rank 0 and None on rank 1" in said[0]


def test_of_many_differing_fields_a_few_are_shown():
  said = agree_all([dict.fromkeys("abcdefg", rank) for rank in range(3)])
  assert "a is 0 on rank 0, 1 on rank 1 and 2 on rank 2; b is" in said[1]
  assert said[1].endswith("and 2 fields more.")


def test_who_does_not_come_is_named():
  said = agree_all([{}] * 4, seconds=0.1, absent=(1, 2))
  assert "ranks 1, 2 of 4 did not come" in said[0]
  assert set(said) == {0, 3}


def test_values_that_are_no_json_count_as_what_they_print():
  one = {"dtype": jax.numpy.float32, "path": collections.OrderedDict(a=1)}
  assert agree_all([one, dict(one)]) == {0: None, 1: None}
  said = agree_all([one, one | {"dtype": jax.numpy.bfloat16}])
  assert "dtype is" in said[0]


@pytest.mark.parametrize(
  ("ranks", "written"),
  [
    ([5], "rank 5"),
    ([0, 1], "ranks 0, 1"),
    ([3, 1, 2, 9], "ranks 1-3, 9"),
  ],
)
def test_ranks_are_written_briefly(ranks, written):
  assert store.name_ranks(ranks) == written
