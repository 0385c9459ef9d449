"""How ranks hear of each other: one thread that writes and reads notes.

Every rank leaves its report at JAX's coordinator; rank 0 reads them all, and
leaves one note for everybody with the verdict, if there is one. So a tick costs
every rank two small messages, however many ranks there are.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping

import jax

from deepseek_jax.parallel.progress import AwakeClock
from deepseek_jax.parallel.store import Store
from deepseek_jax.parallel.verdict import DONE, ENDING, Report, Verdict


class Exchange:
  """Notes of all ranks, as far as they were heard; the watchdog reads them.

  Calls to the coordinator may block for minutes when it is stopped. They are
  made in a thread of their own, so nothing here waits for them.

  Args:
    store: Where the notes are.
    rank: Of this process.
    count: How many there are.
    clock: What tells the time.
    report: What this rank has to tell.
    tick: Seconds between notes.

  Attributes:
    verdict: What rank 0 has decided; at rank 0, what it tells.
    over: Whether all ranks are done.
    contact: Time of the last answer of the coordinator.
  """

  def __init__(
    self,
    store: Store,
    rank: int,
    count: int,
    clock: AwakeClock,
    report: Callable[[], Report],
    tick: int | float,
  ):
    self._store, self._rank, self._count = store, rank, count
    self._clock, self._report, self._tick = clock, report, tick
    self._number = 0
    self._numbers: dict[int, int] = {}
    self._heard = dict.fromkeys(range(count), clock.now)
    self._reports: Mapping[int, Report] = {}
    self._asked, self._told = 0, 0
    self._wake = threading.Event()
    self._stopped = False
    self.verdict: Verdict | None = None
    self.over = False
    self.contact = clock.now
    self.silent: tuple[int, ...] = ()
    self._thread = threading.Thread(
      target=self._run, name="watchdog-exchange", daemon=True
    )

  def start(self) -> None:
    """Begins to write and read."""
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread, after one last note."""
    self._stopped = True
    self._wake.set()
    self._thread.join(timeout=2 * self._tick)

  @property
  def reports(self) -> Mapping[int, Report]:
    """What each rank told last; at other ranks than 0, none."""
    return self._reports

  def silence(self) -> dict[int, float]:
    """Returns for how long each rank was not heard, while rank 0 listened."""
    return {rank: self.contact - time for rank, time in self._heard.items()}

  def muteness(self) -> float:
    """Returns for how long the coordinator has not answered."""
    return self._clock.now - self.contact

  def head_silence(self) -> float:
    """Returns for how long rank 0 has left no note."""
    return self.contact - self._heard[0]

  @property
  def head_was_heard(self) -> bool:
    """Whether rank 0 ever left a note."""
    return 0 in self._numbers

  def tell(self) -> int:
    """Sends a note now; returns what `was_told` takes."""
    self._asked += 1
    self._wake.set()
    return self._asked

  def was_told(self, ticket: int) -> bool:
    """Says whether a note has gone out since `tell` gave the ticket."""
    return self._told >= ticket

  def unaware(self, bound: int | float) -> list[int]:
    """Returns the other ranks, heard within so long, that know no verdict."""
    silence = self.silence()
    return [
      rank
      for rank, report in self._reports.items()
      if rank != self._rank and report.state != ENDING and silence[rank] < bound
    ]

  def _run(self) -> None:
    while True:
      asked, last = self._asked, self._stopped
      try:
        self._write()
        self._read()
        self._told = asked
      except jax.errors.JaxRuntimeError:
        pass  # How long this lasts is for the watchdog to judge.
      if last:
        return
      self._wake.wait(self._tick)
      self._wake.clear()

  def _write(self) -> None:
    self._number += 1
    report = dataclasses.asdict(self._report())
    self._store.put(f"report/{self._rank}", [self._number, report])
    if self._rank == 0:
      self._store.put(
        "head",
        {
          "number": self._number,
          "verdict": None if self.verdict is None else self.verdict.to_json(),
          "over": self.over,
          "silent": self.silent,
        },
      )

  def _read(self) -> None:
    if self._rank == 0:
      notes = self._store.ranks("report")
      self._hear({rank: number for rank, (number, _) in notes.items()})
      self._reports = {
        rank: Report(**told) for rank, (_, told) in notes.items()
      }
      done = [r.state == DONE for r in self._reports.values()]
      self.over = len(done) == self._count and all(done)
      return
    head = self._store.get("head")
    self._hear({} if head is None else {0: head["number"]})
    if head is not None:
      self.over = head["over"]
      self.silent = tuple(head["silent"])
      if head["verdict"] is not None:
        self.verdict = Verdict.from_json(head["verdict"])

  def _hear(self, numbers: Mapping[int, int]) -> None:
    """Notes the time of every rank whose note is a new one."""
    self.contact = self._clock.now
    for rank, number in numbers.items():
      if self._numbers.get(rank) != number:
        self._numbers[rank] = number
        self._heard[rank] = self.contact
