"""SIGTERM and SIGINT become a request to stop after the current step."""

import signal
import threading
from types import FrameType

import jax

from deepseek_jax.train.processes import should_stop


class StopSignal:
  """Context in which SIGTERM and SIGINT set `name` instead of killing.

  A second SIGINT raises KeyboardInterrupt, for people who cannot wait. Outside
  the main thread, where Python allows no handlers, signals keep their meaning.
  With several processes SIGINT keeps its own, and SIGTERM to one of them stops
  all after the same step, which JAX's coordination service finds.

  Attributes:
    name: "SIGTERM" or "SIGINT" once one arrived, else None.
  """

  def __init__(self):
    self.name: str | None = None
    self._alone = jax.process_count() == 1
    self._previous: dict[int, object] = {}

  def __enter__(self) -> "StopSignal":
    """Installs the handlers."""
    main = threading.current_thread() is threading.main_thread()
    if main and self._alone:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    """Puts the previous handlers back."""
    for number, handler in self._previous.items():
      signal.signal(number, handler)  # pyrefly: ignore
    self._previous.clear()

  def look(self, step: int) -> None:
    """Learns of another process's signal; to be called after every step."""
    if not self._alone and should_stop(step):
      self.name = "SIGTERM"

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if self.name is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.name = signal.Signals(number).name
