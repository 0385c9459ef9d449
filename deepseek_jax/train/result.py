"""What a run gives back."""

import dataclasses
import math
import pathlib
from typing import Any

from flax import nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """How a run went; everything but the model is also in RUN/result.json.

  Attributes:
    metrics: Final metrics of the best weights: `test/accuracy`, `test/loss`,
      `validation/...`; a run cut short by a signal has no test metrics.
    best_step: Step of the best evaluation, or None when none was finite.
    steps: Steps run.
    ended_by: "epochs", "steps", "early stopping", "non-finite", "SIGTERM" or
      "SIGINT".
    complete: Whether the run is over; if not, the same call goes on with it.
    wall_seconds: Seconds spent, over all starts of the run.
    peak_memory_bytes: Peak memory of this process (of the device where it
      tells).
    workdir: The run directory.
    history: The records of metrics.jsonl.
    model: The model you gave, now with the best weights, in evaluation mode.
  """

  metrics: dict[str, float]
  best_step: int | None
  steps: int
  ended_by: str
  complete: bool
  wall_seconds: float
  peak_memory_bytes: int
  workdir: pathlib.Path
  history: list[dict[str, Any]] = dataclasses.field(repr=False)
  model: nnx.Module = dataclasses.field(repr=False)

  def to_json(self) -> dict[str, Any]:
    """Returns the plain part."""
    return {name: getattr(self, name) for name in _PLAIN}

  @classmethod
  def from_json(cls, plain: dict[str, Any], **rest: Any) -> "Result":
    """Returns the result whose plain part was written.

    Args:
      plain: What `to_json` gave; other names are passed over.
      **rest: The other attributes.
    """
    fields = {name: plain[name] for name in _PLAIN}
    # JSON has no NaN: what was not finite was written as null.
    fields["metrics"] = {
      name: math.nan if value is None else value
      for name, value in plain["metrics"].items()
    }
    return cls(**fields, **rest)


_PLAIN = tuple(
  field.name
  for field in dataclasses.fields(Result)
  if field.name not in ("workdir", "history", "model")
)
