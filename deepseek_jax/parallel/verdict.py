"""Who is to blame: a pure function of what the ranks told last.

When one rank of a job stops, all others wait for it in their next collective,
and look as stuck as it does. What tells them apart is where they are.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from deepseek_jax.parallel.activity import CALLBACK, PYTHON, WAITING
from deepseek_jax.parallel.store import name_ranks

RUNNING, PAUSED, DONE = "running", "paused", "done"
RAISED, BROKEN, ENDING = "raised", "broken", "ending"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What a rank tells about itself.

  Attributes:
    state: "running", "paused", "done", "raised" (an error of its own), "broken"
      (an error of a collective, which is somebody else's fault), or "ending".
    age: Seconds since its last progress.
    limit: The age at which it counts as stuck.
    excused: Whether others may have to wait for it: it pauses, compiles, or has
      not taken its first step, and is not past its limit.
    step: The last step it told of.
    place: See `activity`.
    where: The line of code.
    why: What it pauses for, or the error.
    host: Its host and the number of its process there.
  """

  state: str = RUNNING
  age: int | float = 0.0
  limit: int | float = 300.0
  excused: bool = False
  step: int | None = None
  place: str = PYTHON
  where: str = "?"
  why: str = ""
  host: str = "?"

  @property
  def at(self) -> str:
    """Where it is, in words."""
    step = "" if self.step is None else f" after step {self.step}"
    return f"at {self.where}{step} (host {self.host})"


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Which ranks ended the job, and by what.

  Attributes:
    ranks: The culprits, never empty.
    why: What they did, in words that follow on their names.
    raised: Whether they raised, and so end by themselves.
  """

  ranks: tuple[int, ...]
  why: str
  raised: bool = False

  def __str__(self):
    """Says it in one line."""
    are = "is the culprit: it" if len(self.ranks) == 1 else "are to blame: each"
    return f"{name_ranks(list(self.ranks))} {are} {self.why}"

  def to_json(self) -> dict[str, Any]:
    """Returns what `from_json` takes."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, told: Mapping[str, Any]) -> "Verdict":
    """Returns the verdict that `to_json` wrote."""
    return cls(tuple(told["ranks"]), told["why"], told["raised"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
  """Seconds of silence.

  Attributes:
    silent: After which a rank counts as dead.
    quick: The same once others fail or hang, as they do when one has died.
    never: After which a rank that never told anything counts as missing.
  """

  silent: int | float
  quick: int | float
  never: int | float

  @property
  def suspicious(self) -> "Bounds":
    """The bounds once it is known that something is wrong."""
    return Bounds(silent=self.quick, quick=self.quick, never=self.quick)


def judge(
  reports: Mapping[int, Report],
  silence: Mapping[int, float],
  bounds: Bounds,
  since_excuse: int | float = float("inf"),
) -> Verdict | None:
  """Returns who ended the job; None while nobody did.

  Args:
    reports: What each rank told last; those that never told are absent.
    silence: Seconds since each rank, absent ones too, was heard.
    bounds: What silence is too long.
    since_excuse: Seconds since the last time that some rank was excused: until
      then nobody was stuck.
  """
  states = {rank: report.state for rank, report in reports.items()}
  if len(reports) == len(silence) and set(states.values()) == {DONE}:
    return None
  raised = [rank for rank, state in states.items() if state == RAISED]
  if raised:
    first = min(raised)
    return Verdict((first,), f"raised {reports[first].why}", raised=True)
  dead = _dead(reports, silence, bounds)
  if dead is None and BROKEN in states.values():
    dead = _dead(reports, silence, bounds.suspicious)
  if dead is not None:
    return dead
  stuck = _broken(reports, bounds) or _stuck(reports, since_excuse)
  # They may be waiting for one that is not silent long enough to be dead.
  return stuck and (_dead(reports, silence, bounds.suspicious) or stuck)


def _dead(
  reports: Mapping[int, Report], silence: Mapping[int, float], bounds: Bounds
) -> Verdict | None:
  """Blames ranks that nothing is heard of."""
  dead = [r for r in sorted(reports) if silence[r] > bounds.silent]
  if dead:
    last = reports[dead[0]].at
    return Verdict(
      tuple(dead),
      f"was not heard of for {silence[dead[0]]:.0f} s, last {last}: it died, "
      "or its host is stopped or cut off",
    )
  missing = [r for r in sorted(silence) if r not in reports]
  missing = [r for r in missing if silence[r] > bounds.never]
  if missing:
    return Verdict(tuple(missing), "never came to its first heartbeat")
  return None


def _broken(reports: Mapping[int, Report], bounds: Bounds) -> Verdict | None:
  """Blames ranks whose collective failed though nobody died."""
  broken = [
    rank
    for rank, report in sorted(reports.items())
    if report.state == BROKEN and report.age > 2 * bounds.quick
  ]
  if not broken:
    return None
  return Verdict(
    tuple(broken),
    f"failed in a collective though no rank died: {reports[broken[0]].why}",
  )


def _stuck(
  reports: Mapping[int, Report], since_excuse: int | float
) -> Verdict | None:
  """Blames whom the ranks that make no progress wait for."""
  if any(report.excused for report in reports.values()):
    return None
  stuck = {
    rank: report
    for rank, report in sorted(reports.items())
    if report.state in (RUNNING, PAUSED)
    and min(report.age, since_excuse) > report.limit
  }
  if not stuck:
    return None
  # Ranks that wait for others stopped a moment later than these.
  active = {
    rank: report
    for rank, report in sorted(reports.items())
    if report.state == DONE
    or (report.state in (RUNNING, PAUSED) and report.age > report.limit / 2)
  }
  culprits, why = _blame(active)
  others = [rank for rank in active if rank not in culprits]
  first = active[culprits[0]]
  waiting = f"; {name_ranks(others)} waited for it" if others else ""
  return Verdict(tuple(culprits), f"{why}, {first.at}{waiting}")


def _blame(active: Mapping[int, Report]) -> tuple[list[int], str]:
  """Returns the culprits among ranks of which some are stuck, and why."""
  longest = max(r.age for r in active.values() if r.state != DONE)
  for_long = f"for {longest:.0f} s"

  def those(state: Collection[str], place: str | None = None) -> list[int]:
    return [
      rank
      for rank, report in active.items()
      if report.state in state and place in (None, report.place)
    ]

  running, waiting = those([RUNNING]), those([RUNNING], WAITING)
  if paused := those([PAUSED]):
    why = active[paused[0]].why
    return paused, f"paused for {why!r} longer than it may, {for_long}"
  if inside := those([RUNNING], CALLBACK):
    return inside, f"was stuck {for_long} in a host callback of its step"
  outside = [rank for rank in running if rank not in waiting]
  if outside and (waiting or len(outside) < len(active)):
    return outside, f"was stuck {for_long} outside any collective"
  if done := those([DONE]):
    return done, "ended its work while others were in theirs"
  steps = {rank: active[rank].step or 0 for rank in running}
  behind = [rank for rank in running if steps[rank] == min(steps.values())]
  if len(behind) < len(running):
    return behind, f"was behind the others, stuck {for_long}"
  if outside:
    return running, f"was stuck {for_long} outside any collective"
  return running, (
    f"waited {for_long} in a collective that every rank has entered: look at "
    "the devices and their network"
  )
