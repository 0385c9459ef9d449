"""A bar for what takes long, and nothing for what does not."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_PATIENCE = 1.0  # Seconds without a sign of life that nobody minds.


def tracked(
  items: Iterable[Item], description: str, total: int | None = None
) -> Iterator[Item]:
  """Yields the items; on a terminal, a bar shows how many, if it takes long.

  Args:
    items: What is worked on.
    description: What is done, in a word or three.
    total: How many items there are, if that is known.

  Yields:
    The items.

  >>> list(tracked("ab", "reading"))
  ['a', 'b']
  """
  if not sys.stderr.isatty():
    yield from items
    return
  import rich.console
  import rich.progress

  bar = rich.progress.Progress(
    "[progress.description]{task.description}",
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
    console=rich.console.Console(stderr=True),
    transient=True,
  )
  task = bar.add_task(description, total=total)
  began = time.monotonic()
  try:
    for item in items:
      yield item
      bar.advance(task)
      if not bar.live.is_started and time.monotonic() - began > _PATIENCE:
        bar.start()
  finally:
    bar.stop()
