"""What the processes of one run have to agree on."""

import contextlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax import parallel

T = TypeVar("T")


def watched(
  seconds: int | float,
) -> contextlib.AbstractContextManager[parallel.Watchdog | None]:
  """Returns the context in which a run of several processes is watched.

  What comes before the first step may take three times as long, compiling not
  counted. A process that is alone is not watched: it gives None.

  Args:
    seconds: How long a step may take.
  """
  if not jax.distributed.is_initialized():
    return contextlib.nullcontext()
  return parallel.Watchdog(seconds, start_seconds=3 * seconds)


def pause(
  watchdog: parallel.Watchdog | None, why: str
) -> contextlib.AbstractContextManager[None]:
  """Returns a context in which a watchdog, if there is one, expects no step."""
  return contextlib.nullcontext() if watchdog is None else watchdog.pause(why)


def is_first() -> bool:
  """Whether this process is the one that writes files and speaks."""
  return jax.process_index() == 0


def of_first(function: Callable[[], T]) -> T:
  """Returns what a function returns in the first process, to all of them.

  It runs there alone. What it raises is raised everywhere, as a `ValueError`
  or `OSError` of the same words: every process ends, and for the same reason.

  >>> of_first(lambda: {"steps": 3})
  {'steps': 3}

  Args:
    function: Returns JSON.
  """
  if jax.process_count() == 1:
    return function()
  error: BaseException | None = None
  answer: dict[str, Any] = {}
  if is_first():
    try:
      answer = {"value": function()}
    except (ValueError, OSError) as raised:
      error = raised
      kind = "OSError" if isinstance(raised, OSError) else "ValueError"
      answer = {"error": str(raised), "kind": kind}
  answer = _told(answer)
  if error is not None:
    raise error
  if "error" in answer:
    kind = OSError if answer["kind"] == "OSError" else ValueError
    raise kind(answer["error"])
  return answer["value"]


def agreed(value: bool) -> bool:
  """Returns the first process's value, to all of them."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def should_stop(step: int) -> bool:
  """Whether all processes stop after this step, as one got a SIGTERM.

  To be asked after every step by all of them.
  """
  if jax.process_count() == 1:
    return False
  return multihost_utils.reached_preemption_sync_point(step)


def _told(answer: dict[str, Any]) -> dict[str, Any]:
  """Returns the first process's JSON."""
  text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.asarray(text.size)))
  mine = text if is_first() else np.zeros(size, np.uint8)
  told = multihost_utils.broadcast_one_to_all(mine)
  return json.loads(np.asarray(told).astype(np.uint8).tobytes())
