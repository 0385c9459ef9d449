"""Remember the best evaluation; say when it is time to stop."""

import dataclasses
import math


@dataclasses.dataclass(kw_only=True)
class EarlyStopping:
  """Tracks the best value of one metric over evaluations.

  The best step is tracked even without patience, because a run ends with its
  best weights whatever ended it.

  Args:
    monitor: Name of the metric, for example "validation/loss".
    patience: Evaluations without an improvement after which to stop, at least
      1; None never stops. With patience 1 the first evaluation that does not
      improve stops the run.
    min_delta: How much better a value must be to count, at least 0, in the
      metric's unit.
    mode: "min" or "max"; None chooses "max" for accuracies and "min" otherwise.
    best: Best value so far, or None.
    best_step: Step of the best value, or None.
    waited: Evaluations since the best one.

  Raises:
    ValueError: If an argument is out of its range.

  Examples:
    >>> stopping = EarlyStopping(monitor="validation/loss", patience=2)
    >>> values = [3.0, 2.0, 5.0]
    >>> [stopping.update(value, step) for step, value in enumerate(values)]
    [True, True, False]
    >>> stopping.best_step, stopping.should_stop
    (1, False)
    >>> stopping.update(4.0, 3), stopping.should_stop
    (False, True)

  References:
    Prechelt, Early Stopping - But When?, 1998,
    https://doi.org/10.1007/3-540-49430-8_3
  """

  monitor: str = "validation/loss"
  patience: int | None = None
  min_delta: float = 0.0
  mode: str | None = None
  best: float | None = None
  best_step: int | None = None
  waited: int = 0

  def __post_init__(self):
    """Checks the arguments and chooses the mode."""
    if self.patience is not None and self.patience < 1:
      raise ValueError(
        f"patience must be at least 1 evaluation or None, got {self.patience=}."
      )
    if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
      raise ValueError(
        f"min_delta must be finite and at least 0, got {self.min_delta=}."
      )
    if self.mode is None:
      self.mode = "max" if self.monitor.endswith("accuracy") else "min"
    if self.mode not in ("min", "max"):
      raise ValueError(f"mode must be 'min' or 'max', got {self.mode=}.")

  def update(self, value: float, step: int) -> bool:
    """Takes one evaluation; returns whether it is the best so far.

    A value that is not finite never improves on anything.
    """
    if self._improves(value):
      self.best, self.best_step, self.waited = value, step, 0
      return True
    self.waited += 1
    return False

  @property
  def should_stop(self) -> bool:
    """Whether patience has run out."""
    return self.patience is not None and self.waited >= self.patience

  def progress(self) -> dict[str, float | int | None]:
    """Returns what changes during a run, as plain JSON."""
    return {
      "best": self.best,
      "best_step": self.best_step,
      "waited": self.waited,
    }

  def load(self, progress: dict) -> None:
    """Continues from what `progress` returned."""
    self.best = progress["best"]
    self.best_step = progress["best_step"]
    self.waited = progress["waited"]

  def _improves(self, value: float) -> bool:
    if not math.isfinite(value):
      return False
    if self.best is None:
      return True
    gain = self.best - value if self.mode == "min" else value - self.best
    return gain > self.min_delta
