"""Laws of launching: places, lines, exit codes, and that nobody is left."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jobs
import pytest

from deepseek_jax import cli
from deepseek_jax.parallel import WATCHDOG_EXIT
from deepseek_jax.parallel.launch import launch

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = str(ROOT / "experiments" / "digits.py")


def python(script):
  return [sys.executable, "-S", "-c", textwrap.dedent(script)]


def is_gone(pid):
  """Whether a process has ended; one that nobody has waited for yet has."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return True
  return stat.rpartition(")")[2].split()[0] == "Z"


def wait_for(path, seconds=60):
  end = time.monotonic() + seconds
  while not path.exists() or not path.read_text().endswith("\n"):
    assert time.monotonic() < end, path
    time.sleep(0.02)
  return path.read_text()


def test_every_process_knows_its_place_and_its_lines_say_whose(capfd):
  script = """
    import os, sys
    names = ("PROCESS_ID", "NUM_PROCESSES", "COORDINATOR")
    print(*(os.environ["DEEPSEEK_JAX_" + name] for name in names))
    print(os.environ["JAX_NUM_CPU_DEVICES"], os.environ["JAX_LOCAL_DEVICE_IDS"])
    print("aside", file=sys.stderr)
    """
  assert launch(python(script), 3, devices_per_process=2) == 0
  out, err = capfd.readouterr()
  lines = sorted(out.splitlines())
  address = lines[0].split()[-1]
  assert lines == sorted(
    line
    for rank in range(3)
    for line in (
      f"[{rank}] {rank} 3 {address}",
      f"[{rank}] 2 {2 * rank},{2 * rank + 1}",
    )
  )
  assert sorted(err.splitlines()) == [f"[{rank}] aside" for rank in range(3)]


def test_a_process_alone_has_lines_of_its_own(capfd):
  assert launch(python("print('hello')"), 1) == 0
  assert capfd.readouterr().out == "hello\n"


@pytest.mark.parametrize(
  ("codes", "expected"),
  [
    ((0, 0), 0),
    ((0, 3), 3),
    # Victims of the watchdog ended first, but another is the culprit.
    ((WATCHDOG_EXIT, 2), 2),
    ((WATCHDOG_EXIT, WATCHDOG_EXIT), WATCHDOG_EXIT),
    ((0, -9), 137),
  ],
)
def test_the_exit_code_is_the_culprits(codes, expected, capfd):
  script = f"""
    import os, sys, time
    rank = int(os.environ["DEEPSEEK_JAX_PROCESS_ID"])
    code = {codes}[rank]
    time.sleep(0.2 * rank)
    if code < 0: os.kill(os.getpid(), -code)
    sys.exit(code)
    """
  assert launch(python(script), 2) == expected
  said = capfd.readouterr().err
  assert ("deepseek-jax launch: rank" in said) == (expected != 0)
  assert ("was killed by SIGKILL" in said) == (expected == 137)


@pytest.mark.slow
def test_when_one_fails_the_others_are_ended_with_their_children(tmp_path):
  script = f"""
    import os, signal, subprocess, sys, time
    rank = os.environ["DEEPSEEK_JAX_PROCESS_ID"]
    if rank == "1": sys.exit(5)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if rank == "2" else
                  lambda *_: sys.exit(0))
    child = subprocess.Popen(["sleep", "600"])
    with open({str(tmp_path)!r} + "/" + rank, "w") as file:
      print(os.getpid(), child.pid, file=file)
    while True: time.sleep(1)
    """
  started = time.monotonic()
  assert launch(python(script), 3, grace_seconds=0.5) == 5
  # One goes at SIGTERM; the other, which ignores it, five seconds later.
  assert 5 < time.monotonic() - started < 15
  pids = [pid for p in tmp_path.iterdir() for pid in p.read_text().split()]
  assert len(pids) == 4
  # A killed process takes the kernel a moment, on a busy machine a long one.
  end = time.monotonic() + 10
  while not all(is_gone(pid) for pid in pids):
    assert time.monotonic() < end, pids
    time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process(number, capfd):
  script = """
    import os, signal, sys, time
    def stop(number, frame):
      print("heard", number)
      sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if os.environ["DEEPSEEK_JAX_PROCESS_ID"] == "0":
      time.sleep(0.5)  # Until the other one listens, too.
      os.kill(os.getppid(), int(os.environ["NUMBER"]))
    while True: time.sleep(0.05)
    """
  before = signal.getsignal(number)
  variables = os.environ | {"NUMBER": str(int(number))}
  assert launch(python(script), 2, environment=variables) == 75
  heard = sorted(capfd.readouterr().out.splitlines())
  assert heard == [f"[{rank}] heard {int(number)}" for rank in range(2)]
  assert signal.getsignal(number) is before


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ({"num_processes": 0}, "num_processes must be an integer, at least 1"),
    ({"devices_per_process": 0}, "devices_per_process must be an integer"),
    ({"grace_seconds": -1}, "grace_seconds must be in"),
  ],
)
def test_wrong_numbers_are_named(arguments, said):
  with pytest.raises(ValueError, match=said):
    launch(["true"], **({"num_processes": 2} | arguments))


def test_a_command_that_is_none_leaves_nothing_behind():
  before = len(os.listdir("/proc/self/fd"))
  with pytest.raises(FileNotFoundError):
    launch(["no-such-command"], 2)
  assert len(os.listdir("/proc/self/fd")) == before


def test_the_command_line_hands_flags_behind_the_file_to_train(monkeypatch):
  seen = []

  def record(command, num_processes, **more):
    seen.append((command, num_processes, more))
    return 7

  monkeypatch.setattr("deepseek_jax.parallel.launch.launch", record)
  words = ["launch", "-n", "4", "--devices-per-process", "2", DIGITS]
  assert cli.main([*words, "--train.epochs", "3", "-x"]) == 7
  (command, num_processes, more), *_ = seen
  assert command[1:] == [
    *("-m", "deepseek_jax.cli", "train", DIGITS),
    *("--train.epochs", "3", "-x"),
  ]
  assert num_processes == 4
  assert more == {"devices_per_process": 2, "grace_seconds": 15.0}


def test_the_command_line_wants_a_file(capsys):
  assert cli.main(["launch", "-n", "2", "absent.py"]) == cli.BAD_INPUT
  assert "no experiment file 'absent.py'" in capsys.readouterr().err


LAUNCHER = """
import sys
from deepseek_jax.parallel.launch import launch
launch([sys.executable, "-c", sys.argv[1]], 2)
"""
CHILD = """
import os, subprocess, time
from deepseek_jax import parallel
from deepseek_jax.parallel import tether
tether.tie()
assert tether.VARIABLE not in os.environ  # For its own children.
child = subprocess.Popen(["sleep", "600"])
with open("FOLDER/" + os.environ["DEEPSEEK_JAX_PROCESS_ID"], "w") as file:
  print(os.getpid(), child.pid, file=file)
time.sleep(600)
"""


@pytest.mark.slow
def test_no_process_outlives_a_launcher_that_is_killed(tmp_path):
  child = CHILD.replace("FOLDER", str(tmp_path))
  launcher = subprocess.Popen(
    [sys.executable, "-c", LAUNCHER, child], env=jobs.environment()
  )
  try:
    told = [wait_for(tmp_path / str(rank)) for rank in range(2)]
  finally:
    launcher.kill()
    launcher.wait()
  pids = [pid for text in told for pid in text.split()]
  end = time.monotonic() + 10
  while not all(is_gone(pid) for pid in pids):
    assert time.monotonic() < end
    time.sleep(0.02)
