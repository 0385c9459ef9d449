"""Laws of the watchdog: who is to blame, when it must not bark, and its end."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import threading
import time

import jax
import jobs
import pytest
from test_agreement import Client

from deepseek_jax.parallel import WATCHDOG_EXIT, Processes, Watchdog
from deepseek_jax.parallel.activity import (
  CALLBACK,
  COMPILING,
  PYTHON,
  WAITING,
  activity,
  place,
)
from deepseek_jax.parallel.exchange import Exchange
from deepseek_jax.parallel.progress import AwakeClock, Progress
from deepseek_jax.parallel.store import Store
from deepseek_jax.parallel.verdict import (
  BROKEN,
  DONE,
  PAUSED,
  RAISED,
  RUNNING,
  Bounds,
  Report,
  Verdict,
  judge,
)
from deepseek_jax.parallel.watchdog import is_of_others
from deepseek_jax.parallel.watcher import Limits, Watcher

BOUNDS = Bounds(silent=20.0, quick=4.0, never=100.0)
FINE = Report(age=1.0, limit=10.0, step=7, place=WAITING, where="loop.py:3")


def report(**changes):
  return dataclasses.replace(FINE, **changes)


def stuck(place=WAITING, **changes):
  return report(age=11.0, place=place, **changes)


def verdict(*reports, silence=None, since_excuse=math.inf):
  """Judges ranks 0, 1, ...; None stands for one that never told anything."""
  told = {rank: r for rank, r in enumerate(reports) if r is not None}
  quiet = dict.fromkeys(range(len(reports)), 0.5) | (silence or {})
  return judge(told, quiet, BOUNDS, since_excuse)


@pytest.mark.parametrize(
  ("reports", "silence", "ranks", "why"),
  [
    # A rank outside any collective holds up those that wait in one.
    ([stuck(), stuck(PYTHON)], {}, (1,), "outside any collective"),
    ([stuck(PYTHON), stuck(), stuck()], {}, (0,), "ranks 1, 2 waited for it"),
    # So does a host callback, though its main thread waits for devices.
    ([stuck(), stuck(CALLBACK)], {}, (1,), "host callback"),
    ([stuck(PYTHON), stuck(CALLBACK)], {}, (1,), "host callback"),
    # Others stopped a moment after the culprit, and are below their limit.
    ([report(age=9.0), stuck(PYTHON)], {}, (1,), "outside any collective"),
    # One that goes on, as between two saves, is no culprit.
    ([report(age=1.0, place=PYTHON), stuck(), stuck(PYTHON)], {}, (2,), "out"),
    # All in a collective: the one that is steps behind; else nobody.
    ([stuck(), stuck(step=5)], {}, (1,), "behind the others"),
    ([stuck(), stuck()], {}, (0, 1), "a collective that every rank has enter"),
    ([stuck(PYTHON), stuck(PYTHON)], {}, (0, 1), "outside any collective"),
    ([stuck(PYTHON), stuck(PYTHON, step=None)], {}, (1,), "behind"),
    # One that has left while others work.
    ([stuck(), report(state=DONE)], {}, (1,), "ended its work while others"),
    ([stuck(PYTHON), report(state=DONE)], {}, (0,), "outside any collective"),
    # A pause that does not end.
    ([stuck(), stuck(state=PAUSED, why="saving")], {}, (1,), "for 'saving'"),
    # The dead are silent; sooner, where a collective has failed.
    ([FINE, FINE, FINE], {2: 21.0}, (2,), "not heard of for 21 s, last at"),
    ([FINE, report(state=DONE)], {1: 21.0}, (1,), "not heard of"),
    ([report(state=BROKEN), FINE], {1: 5.0}, (1,), "not heard of for 5 s"),
    ([FINE, None], {1: 101.0}, (1,), "never came"),
    ([report(state=BROKEN), None], {1: 5.0}, (1,), "never came"),
    # So, too, where others hang.
    ([stuck(), stuck()], {1: 5.0}, (1,), "not heard of for 5 s"),
    # Nobody died: then it is the network, or a device, of those who say so.
    ([FINE, report(state=BROKEN, why="reset", age=9.0)], {}, (1,), "no rank d"),
    # Errors are told before all else, of several the first rank's.
    ([stuck(), report(state=RAISED, why="Boom: x")], {}, (1,), "raised Boom"),
    ([FINE, FINE, report(state=RAISED)], {0: 50.0}, (2,), "raised"),
  ],
)
def test_the_culprit_is_named(reports, silence, ranks, why):
  found = verdict(*reports, silence=silence)
  assert found is not None
  assert found.ranks == ranks
  assert why in str(found)
  assert "\n" not in str(found)
  assert Verdict.from_json(dataclasses.asdict(found)) == found


@pytest.mark.parametrize(
  ("reports", "more"),
  [
    ([FINE, FINE], {}),
    ([FINE, None], {"silence": {1: 50.0}}),
    ([FINE, FINE], {"silence": {1: 19.0}}),
    # Everybody waits for a rank that pauses or compiles within its limit,
    ([stuck(), report(state=PAUSED, excused=True)], {}),
    ([stuck(), report(place=COMPILING, excused=True)], {}),
    # and a moment longer, until its step has come through.
    ([stuck(), stuck()], {"since_excuse": 5.0}),
    # A failed collective is somebody's death: it takes a while to know whose.
    ([FINE, report(state=BROKEN)], {}),
    ([report(state=DONE), report(state=DONE)], {"silence": {1: 50.0}}),
  ],
)
def test_it_does_not_bark_without_need(reports, more):
  assert verdict(*reports, **more) is None


@pytest.mark.parametrize(
  ("error", "expected"),
  [
    (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed"), True),
    (RuntimeError("UNAVAILABLE: the slice is unhealthy"), True),
    (RuntimeError("INTERNAL: NCCL operation failed: remote error"), True),
    (ConnectionError("Connection reset by peer"), True),
    (ValueError("rate must be in (0, 1), got rate=2."), False),
    (RuntimeError("INTERNAL: CpuCallback error: Connection refused"), False),
    (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
    (KeyboardInterrupt("barrier timed out"), False),
  ],
)
def test_errors_of_collectives_are_told_from_ones_own(error, expected):
  assert is_of_others(error) is expected


def started(limit=10.0):
  clock = AwakeClock(2.0)
  clock.tick(0.0)
  progress = Progress(
    clock, seconds=limit, start_seconds=50.0, pause_seconds=30.0
  )
  return clock, progress


def pass_time(clock, seconds):
  start = clock.now
  for tick in range(int(seconds)):
    clock.tick(start + tick + 1)


def test_the_first_step_and_pauses_have_limits_of_their_own():
  clock, progress = started()
  pass_time(clock, 20)
  assert progress.report().excused
  progress.beat(0)
  pass_time(clock, 8)
  told = progress.report()
  assert (told.excused, told.age, told.limit, told.step) == (False, 8, 10, 0)
  with progress.pause("saving", 12.0):
    pass_time(clock, 11)
    told = progress.report()
    assert (told.state, told.excused, told.age) == (PAUSED, True, 11)
    pass_time(clock, 2)
    assert not progress.report().excused
  told = progress.report()
  assert (told.state, told.age, told.limit) == (RUNNING, 0, 10)


def test_an_error_inside_a_pause_stays_one():
  _, progress = started()
  with progress.pause("saving", None):
    progress.end(RAISED, "Boom")
  assert progress.report().state == RAISED


def test_time_in_which_the_process_did_not_run_does_not_count():
  clock = AwakeClock(2.0)
  for time_ in (100.0, 101.0, 500.0, 501.0):
    clock.tick(time_)
  assert clock.now == 4.0
  assert clock.lag(511.0) == 10.0


def test_code_of_jax_waits_and_locks_of_python_do_not():
  jax_file = jax.__file__
  assert place(jax_file, in_futex=False) == WAITING
  assert place(threading.__file__, in_futex=True) == PYTHON
  assert place(__file__, in_futex=True) == WAITING
  assert place(__file__, in_futex=False) == PYTHON


def activity_of(work, seconds=0.3):
  """Returns what a thread is doing after a while, and lets it go."""
  go = threading.Event()
  thread = threading.Thread(target=work, args=(go,), daemon=True)
  thread.start()
  time.sleep(seconds)
  try:
    return activity(thread.ident, thread.native_id)
  finally:
    go.set()
    thread.join()


def test_a_thread_that_sleeps_or_holds_a_lock_is_outside():
  doing, where = activity_of(lambda go: go.wait())
  assert doing == PYTHON
  assert "test_watchdog.py" in where


def test_a_host_callback_is_seen_in_whatever_thread_it_runs():

  def work(go):
    def visit(x):
      go.wait()
      return x

    shape = jax.ShapeDtypeStruct((2,), "float32")
    step = jax.jit(lambda x: jax.pure_callback(visit, shape, x))
    jax.block_until_ready(step(jax.numpy.ones(2)))

  doing, where = activity_of(work, seconds=1.5)
  assert doing == CALLBACK
  assert "in visit" in where


def make_exchanges(count, tick=0.02):
  clock = AwakeClock(1.0)
  progresses = [
    Progress(clock, seconds=10, start_seconds=10, pause_seconds=10)
    for _ in range(count)
  ]
  notes = Client()
  return progresses, [
    Exchange(Store(notes, "w"), rank, count, clock, progress.report, tick)
    for rank, progress in enumerate(progresses)
  ]


def until(holds, seconds=5.0):
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end
    time.sleep(0.005)


def test_rank_0_hears_all_and_all_hear_its_verdict():
  progresses, exchanges = make_exchanges(3)
  for exchange in exchanges:
    exchange.start()
  progresses[2].beat(41)
  until(lambda: len(exchanges[0].reports) == 3)
  until(lambda: exchanges[0].reports[2].step == 41)
  exchanges[0].verdict = Verdict((2,), "did it", raised=True)
  until(lambda: exchanges[1].verdict == Verdict((2,), "did it", raised=True))
  for progress in progresses:
    progress.end(DONE)
  until(lambda: all(exchange.over for exchange in exchanges))
  for exchange in exchanges:
    exchange.stop()


@pytest.mark.parametrize("name", ["seconds", "start_seconds", "pause_seconds"])
def test_limits_are_positive(name):
  with pytest.raises(ValueError, match=rf"{name} must be in \(0, inf\)"):
    Watchdog(**{name: 0})


def test_a_process_that_is_alone_ends_its_watch_with_its_work():
  with Watchdog(seconds=60) as watchdog:
    watchdog.beat()
  with pytest.raises(ZeroDivisionError), Watchdog():
    raise ZeroDivisionError
  assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_one_inside_another_gives_it_its_seconds():
  with Watchdog(seconds=60, start_seconds=500) as outer:
    outer.beat(7)
    progress = outer._watcher.progress
    with Watchdog(seconds=40, start_seconds=300) as inner:
      told = progress.report()
      assert (told.limit, told.excused, told.step) == (300, True, 7)
      inner.beat(8)
      assert (progress.report().limit, progress.report().step) == (40, 8)
    assert progress.report().limit == 40
    assert outer._watcher._bounds.silent == 40
    with pytest.raises(ZeroDivisionError), Watchdog():
      raise ZeroDivisionError
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("watchdog") == 1
  assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def reason(change=lambda watcher, exchange: None, rank=1):
  """Why a rank aborts, whose coordinator is at a port that nobody has."""
  nowhere = f"127.0.0.1:{jobs.free_port()}"
  watcher = Watcher(
    Processes(index=rank, count=3, coordinator=nowhere),
    Store(Client(), "watchdog"),
    Limits(seconds=10, start_seconds=20, pause_seconds=20),
  )
  exchange = watcher._exchange
  change(watcher, exchange)
  return watcher._reason_to_abort(exchange)


def test_when_jax_aborts_a_rank_it_says_why():
  found = reason()
  assert found.ranks == (0,)
  assert "is gone from 127.0.0.1:" in found.why
  told = Verdict((2,), "did it")
  assert reason(lambda _, e: setattr(e, "verdict", told)) == told
  found = reason(lambda _, e: setattr(e, "silent", (2,)))
  assert (found.ranks, found.why[:16]) == ((2,), "was not heard of")
  found = reason(lambda w, _: w._clock.tick(time.monotonic() - 60))
  assert (found.ranks, found.why) == ((1,), "was stopped for 60 s")
  # Rank 0 is its own coordinator: then it was a check in native code.
  found = reason(rank=0)
  assert (found.ranks, found.why[:7]) == ((0,), "aborted")


RUN = """
join()
step, x = make_step()
with parallel.Watchdog(4, start_seconds=60) as watchdog:
  for number in range(1, 40):
    if RANK == COUNT - 1 and number == 9:
      fault()
    x = step(x)
    if number % 3 == 0:
      np.asarray(x.addressable_data(0))
    watchdog.beat(number)
    time.sleep(0.02)
print("finished")
"""


def drill(fault):
  body = "\n".join(f"  {line}" for line in fault.splitlines())
  return jobs.run(f"def fault():\n  global watchdog\n{body}\n{RUN}", 2)


@pytest.mark.slow
def test_a_long_pause_of_one_rank_is_waited_for():
  ended = drill("with watchdog.pause('saving', 30):\n  time.sleep(9)")
  for process in ended.values():
    assert process.code == 0, process.err
    assert process.out.endswith("finished\n")


@pytest.mark.slow
def test_a_rank_that_keeps_the_gil_ends_too():
  ended = drill("import ctypes\nctypes.PyDLL(None).sleep(1000)")
  assert ended[0].code == WATCHDOG_EXIT
  assert "rank 1 is the culprit: it was not heard of" in ended[0].err
  assert ended[1].code == 1
  assert "in fault" in ended[1].err  # The line, in the stacks.


@pytest.mark.slow
def test_rank_0_which_hosts_the_coordinator_may_die():
  ended = jobs.run(
    RUN.replace("RANK == COUNT - 1", "RANK == 0").replace(
      "fault()", "os.kill(os.getpid(), 9)"
    ),
    2,
  )
  assert ended[0].code == -9
  assert ended[1].code == WATCHDOG_EXIT
  assert "rank 0 is the culprit: it is gone from" in ended[1].err


@pytest.mark.slow
def test_a_drill_ends_in_time_and_names_the_culprit(tmp_path):
  out = tmp_path / "drills.json"
  folder = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"
  subprocess.run(
    [
      *(sys.executable, str(folder / "drills.py"), "--out", str(out)),
      *("--processes", "2", "--repeats", "1", "--seconds", "4"),
      *("--faults", "inside"),
    ],
    check=True,
    env=jobs.environment(),
  )
  (row,) = json.loads(out.read_text())["rows"]
  assert (row["fault"], row["good"]) == ("inside", 1)
  assert row["trials"][0]["codes"] == [WATCHDOG_EXIT] * 2


@pytest.mark.slow
def test_when_all_raise_each_says_its_own_and_keeps_its_exit_code():
  ended = jobs.run(
    """
    join()
    with parallel.Watchdog(60):
      time.sleep(0.7 * RANK)
      print(f"rank {RANK} was told nonsense", file=sys.stderr)
      raise SystemExit(2)
    """,
    2,
  )
  for rank, process in ended.items():
    assert process.code == 2, process.err
    assert f"rank {rank} was told nonsense" in process.err
    assert "Check failure" not in process.err
