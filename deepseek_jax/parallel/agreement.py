"""All processes of a job do the same, or all end and say what differs."""

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Mapping
from typing import Any

import jax

from deepseek_jax.parallel.initialization import initialize
from deepseek_jax.parallel.store import (
  Store,
  gather,
  name_ranks,
  open_store,
)

_SHOWN = 5  # Fields that an error names.
_calls = itertools.count()  # Every process calls in the same order.


class DisagreementError(ValueError):
  """Processes of one job were told different things."""


def agree(
  fields: Mapping[str, Any],
  *,
  what: str = "configuration",
  seconds: int | float = 300,
) -> None:
  """Returns if every process was given the same; else raises on all of them.

  Ranks that differ in the size of a batch or in the library's version hang in
  their first collective. So they compare hashes at the start, over the network
  of the hosts, where nothing hangs; the versions of JAX and of this library
  are compared too. Alone, a process agrees with itself.

  >>> agree({"seed": 0, "model": {"width": 32}})

  Args:
    fields: Names and values, which may be nested mappings; values that are no
      JSON count as what `repr` makes of them.
    what: What an error calls them.
    seconds: How long to wait for the slowest process.

  Raises:
    DisagreementError: If some differ: names the fields, their values and the
      ranks. On every process.
    StartError: If some did not call this in time; names their ranks.
  """
  room = f"agree/{next(_calls)}"
  store = open_store(room)
  if store is None:
    return
  processes = initialize()
  versions = {
    "version of jax": jax.__version__,
    "version of deepseek-jax": importlib.metadata.version("deepseek-jax"),
  }
  _agree(
    store,
    flatten(fields) | versions,
    what=what,
    rank=processes.index,
    count=processes.count,
    seconds=seconds,
  )


def _agree(
  store: Store,
  fields: Mapping[str, Any],
  *,
  what: str,
  rank: int,
  count: int,
  seconds: int | float,
) -> None:
  text = json.dumps(fields, sort_keys=True, default=repr)
  digest = hashlib.sha256(text.encode()).hexdigest()
  # What all of them read is short; the fields are read only when they differ.
  store.put(f"fields/{rank}", text)
  digests = gather(
    store, "digests", digest, rank=rank, count=count, seconds=seconds
  )
  kinds: dict[str, list[int]] = {}
  for index in sorted(digests):
    kinds.setdefault(digests[index], []).append(index)
  if len(kinds) == 1:
    return
  groups = list(kinds.values())
  told = [json.loads(store.get(f"fields/{group[0]}")) for group in groups]
  raise DisagreementError(describe(what, groups, told))


def describe(
  what: str, groups: list[list[int]], told: list[Mapping[str, Any]]
) -> str:
  """Says in one line which fields differ between groups of ranks.

  >>> describe("configuration", [[0, 1], [2]], [{"seed": 0}, {"seed": 1}])
  'ranks disagree on their configuration: seed is 0 on ranks 0, 1 and 1 on \
rank 2.'

  Args:
    what: What the fields are.
    groups: Ranks that were told the same.
    told: For each group its fields.
  """
  absent = object()
  names = dict.fromkeys(name for fields in told for name in fields)
  differing = [
    name
    for name in names
    if len({json.dumps(f.get(name, absent), default=repr) for f in told}) > 1
  ]
  parts = []
  for name in differing[:_SHOWN]:
    values = [
      f"{fields[name]!r} on {name_ranks(group)}"
      if name in fields
      else f"not set on {name_ranks(group)}"
      for group, fields in zip(groups, told, strict=True)
    ]
    parts.append(f"{name} is {', '.join(values[:-1])} and {values[-1]}")
  if len(differing) > _SHOWN:
    parts.append(f"and {len(differing) - _SHOWN} fields more")
  return f"ranks disagree on their {what}: {'; '.join(parts)}."


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns nested mappings as one, its names joined by dots.

  >>> flatten({"model": {"width": 32}, "seed": 0})
  {'model.width': 32, 'seed': 0}
  """
  flat: dict[str, Any] = {}
  for name, value in fields.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat
