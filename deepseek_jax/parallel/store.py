"""Notes that processes leave for each other at JAX's coordinator.

They travel over the network between the hosts, not between the devices, so
they arrive while every device is stuck in a collective.
"""

import atexit
import ctypes
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

_SEPARATOR = "/"


class StartError(RuntimeError):
  """The processes of a job did not find each other."""


class Store:
  """Text by key, seen by every process.

  A call blocks while the coordinator does not answer, for as long as that
  takes; the GIL is free meanwhile.

  Args:
    client: JAX's client of its coordinator, or anything with its methods
      `key_value_set`, `key_value_try_get` and `key_value_dir_get`.
    room: Prefix of every key.
  """

  def __init__(self, client: Any, room: str):
    self._client = client
    self._room = f"deepseek_jax/{room}/"

  def put(self, key: str, value: Any) -> None:
    """Leaves something JSON under a key, over what was there."""
    self._client.key_value_set(
      self._room + key, json.dumps(value), allow_overwrite=True
    )

  def get(self, key: str) -> Any:
    """Returns what was left under a key, None if nothing was.

    Raises:
      jax.errors.JaxRuntimeError: If the coordinator does not answer.
    """
    try:
      return json.loads(self._client.key_value_try_get(self._room + key))
    except jax.errors.JaxRuntimeError as error:
      if "NOT_FOUND" not in str(error):
        raise
      return None

  def ranks(self, folder: str) -> dict[int, Any]:
    """Returns by rank what was left under the keys `folder/RANK`."""
    found = self._client.key_value_dir_get(self._room + folder + _SEPARATOR)
    return {
      int(key.rpartition(_SEPARATOR)[2]): json.loads(value)
      for key, value in found
    }


def open_store(room: str) -> Store | None:
  """Returns a store of the running processes; None where there is but one.

  >>> open_store("notes") is None
  True
  """
  from jax._src import distributed  # Nothing public leads to the client.

  client = distributed.global_state.client
  return None if client is None else Store(client, room)


def leave_at_exit() -> None:
  """Lets this process end without waiting for the others of its job.

  JAX's own way out is a meeting of all processes, for which one that failed
  would wait in vain.
  """
  from jax._src import distributed

  def leave() -> None:
    state = distributed.global_state
    for kept in (state.preemption_sync_manager, state.client, state.service):
      # What destroys them waits as well: they stay until the process is gone.
      ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    state.preemption_sync_manager = state.client = state.service = None

  atexit.register(leave)  # Before JAX's: the last registered goes first.


def gather(
  store: Store,
  folder: str,
  value: Any,
  *,
  rank: int,
  count: int,
  seconds: int | float,
  clock: Callable[[], float] = time.monotonic,
) -> Mapping[int, Any]:
  """Leaves a value and returns those of all processes, by rank.

  Args:
    store: Where.
    folder: A name that no earlier call used.
    value: Anything JSON.
    rank: Of this process.
    count: How many processes there are.
    seconds: How long to wait for the slowest, positive.
    clock: What tells the time.

  Raises:
    StartError: If some left nothing in time; names their ranks.
  """
  store.put(f"{folder}/{rank}", value)
  end = clock() + seconds
  pause = 0.02
  while len(found := store.ranks(folder)) < count:
    if clock() > end:
      missing = [r for r in range(count) if r not in found]
      raise StartError(
        f"{name_ranks(missing)} of {count} did not come to {folder!r} within "
        f"{seconds:g} s."
      )
    time.sleep(pause)
    # A thousand processes that ask often would keep the coordinator busy.
    pause = min(1.5 * pause, 1.0)
  return found


def name_ranks(ranks: list[int]) -> str:
  """Writes ranks as people do, those in a row as a range.

  >>> name_ranks([2])
  'rank 2'
  >>> name_ranks([0, 1, 2, 3, 7])
  'ranks 0-3, 7'
  """
  runs: list[list[int]] = []
  for rank in sorted(ranks):
    if runs and rank == runs[-1][-1] + 1:
      runs[-1].append(rank)
    else:
      runs.append([rank])
  parts = []
  for run in runs:
    wide = len(run) > 2
    parts += [f"{run[0]}-{run[-1]}"] if wide else [str(rank) for rank in run]
  return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(parts)
