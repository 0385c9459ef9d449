"""Two processes over a throttled link, and the time that encoding takes.

Two network namespaces, joined by a pair of virtual devices of which `tc tbf`
limits what goes out, hold a process each: a job of `jax.distributed`, with gloo
between. Methods take turns, so that a slow minute of the machine falls on all.
What they send is read from the device.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import exchange_quantizer as quantizer
import numpy as np

FOLDER = pathlib.Path(__file__).parent
FAST = 10_000.0  # Mbit/s: a link that hardly limits.
_LIMIT = 900  # Seconds that a session may take.
_MTU = 9000  # Bytes of a frame: headers are 1 % of it.
ASKED = {"int8": 2.5, "PowerSGD 4": 5.0, "DiLoCo 10": 4.0}  # At 100 Mbit/s.


class LinkError(RuntimeError):
  """This machine cannot make such a link."""


def case(flags: Any, keep: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
  """Returns steps' times by rate, bytes sent, and crossovers."""
  found: dict[str, Any] = {"quantizer": quantizer.measure(flags.tiny)}
  quantizer.show(found["quantizer"])
  keep(found)
  try:
    sessions = session(flags)
  except LinkError as error:
    print(f"no link: {error}")
    return found | {"failed": str(error)}
  found["sessions"] = sessions
  found["summary"] = summary(sessions)
  show(found["summary"])
  return found


def session(flags: Any) -> dict[str, Any]:
  """Returns what rank 0 measured, by Mbit/s of the link."""
  rates = [f"{rate:g}" for rate in (FAST, *flags.rates)]
  words = ["--rounds", str(flags.rounds), "--rates", *rates]
  words += ["--tiny"] if flags.tiny else []
  words += ["--only", *flags.only] if flags.only else []
  with link() as names, tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "found.json"
    commands = [
      ["ip", "netns", "exec", name, sys.executable,
       str(FOLDER / "exchange_rank.py"), str(rank), str(out), *words]
      for rank, name in enumerate(names)
    ]  # fmt: skip
    errors = _run(commands, pathlib.Path(folder))
    if not out.exists():
      raise RuntimeError(f"the job on the link failed: {errors}")
    return json.loads(out.read_text())


def _run(commands: list[list[str]], folder: pathlib.Path) -> str:
  """Runs them side by side to their ends; returns the last lines of each."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "PYTHONPATH": str(FOLDER.parents[1]),
  }
  logs = [folder / f"{rank}.log" for rank in range(len(commands))]
  children = []
  try:
    for command, log in zip(commands, logs, strict=True):
      with log.open("wb") as file:
        children.append(
          subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
          )
        )  # fmt: skip
    for child in children:
      with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_LIMIT)
  finally:
    for child in children:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
      child.wait()
  return " | ".join(log.read_text()[-400:].strip() for log in logs)


@contextlib.contextmanager
def link() -> Iterator[list[str]]:
  """Makes two namespaces with a link between; yields their names.

  Raises:
    LinkError: Where that is not possible.
  """
  if not hasattr(os, "geteuid") or os.geteuid():
    raise LinkError("network namespaces need root, on Linux")
  # As on an interrupt, so that nothing is left behind.
  before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  tag = f"ex{os.getpid() % 100000}"
  names = [f"{tag}a", f"{tag}b"]
  hosts = [pathlib.Path("/etc/netns") / name for name in names]
  try:
    for name, place, address in zip(names, hosts, "12", strict=True):
      _ip("netns", "add", name)
      # gloo listens where the host's name leads.
      place.mkdir(parents=True, exist_ok=True)
      own = f"10.77.0.{address} {os.uname().nodename}\n"
      (place / "hosts").write_text(f"127.0.0.1 localhost\n{own}")
    ends = [f"{name}v" for name in names]
    _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for name, end, address in zip(names, ends, "12", strict=True):
      _ip("link", "set", end, "netns", name)
      _ip("-n", name, "addr", "add", f"10.77.0.{address}/24", "dev", end)
      _ip("-n", name, "link", "set", end, "mtu", str(_MTU), "up")
      _ip("-n", name, "link", "set", "lo", "up")
      _call("ip", "netns", "exec", name, *throttle("add", end, FAST))
    yield names
  finally:
    for name, place in zip(names, hosts, strict=True):
      with contextlib.suppress(LinkError):
        _ip("netns", "del", name)
      (place / "hosts").unlink(missing_ok=True)
      for folder in (place, place.parent):  # The parent if it is empty.
        with contextlib.suppress(OSError):
          folder.rmdir()
    signal.signal(signal.SIGTERM, before)


def throttle(verb: str, device: str, rate: float) -> list[str]:
  """Returns the command that limits what a device sends, in Mbit/s."""
  # What one burst lets through at once is a millisecond's, or a few frames.
  burst = max(64_000, int(rate * 1e6 / 8 / 1000))
  return [
    "tc", "qdisc", verb, "dev", device, "root", "tbf", "rate", f"{rate:g}mbit",
    "burst", f"{burst}b", "latency", "50ms",
  ]  # fmt: skip


def _ip(*words: str) -> None:
  _call("ip", *words)


def _call(*words: str) -> None:
  try:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
  except OSError as error:
    raise LinkError(f"{words[0]}: {error}") from error
  if done.returncode:
    raise LinkError(f"{' '.join(words)}: {done.stderr.strip()}")


def summary(sessions: dict[str, Any]) -> dict[str, Any]:
  """Returns by method and rate how much faster than float32 a step is.

  As median and quartiles of pairs of one round; the time without the network
  is that over the fast link, less what its bytes take there. The crossover is
  the rate at which that time and the bytes give float32's: below it the method
  is faster.
  """
  found: dict[str, Any] = {}
  fast = sessions[f"{FAST:g}"]["methods"]
  compute = {
    name: float(np.median(row["seconds"])) - row["counted"] * 8e-6 / FAST
    for name, row in fast.items()
  }
  for name, row in fast.items():
    entry: dict[str, Any] = {
      "wire_bytes": row["wire_bytes"],
      "counted": row["counted"],
      "counted_by_wire": row["counted"] / row["wire_bytes"],
      "seconds_without_network": compute[name],
      "times_faster": {},
    }
    for rate, one in sessions.items():
      rows = one["methods"]
      pairs = zip(
        rows["float32"]["seconds"], rows[name]["seconds"], strict=True
      )
      ratios = np.percentile([a / b for a, b in pairs], (50, 25, 75))
      entry["times_faster"][rate] = [round(float(x), 2) for x in ratios]
    saved = fast["float32"]["counted"] - row["counted"]
    more = compute[name] - compute["float32"]
    if name != "float32":
      # None: always faster; it saves bytes, and takes no longer.
      entry["crossover_mbit"] = saved * 8e-6 / more if more > 0 else None
    found[name] = entry
  return found


def show(found: dict[str, Any]) -> None:
  """Prints the table."""
  rates = list(found["float32"]["times_faster"])
  heads = "".join(f"  at {float(rate):g}" for rate in rates)
  print(
    f"\n{'':16} MB a step  / wire  ms without network {heads} Mbit/s  crossover"
  )
  for name, row in found.items():
    faster = row["times_faster"]
    columns = "  ".join(f"{faster[rate][0]:6.2f}x" for rate in rates)
    rate = row.get("crossover_mbit", 0)
    print(
      f"{name:16} {row['counted'] / 1e6:9.3f}  {row['counted_by_wire']:6.3f} "
      f"{1e3 * row['seconds_without_network']:12.1f}     {columns}   "
      + ("always" if rate is None else f"{rate:.0f} Mbit/s" if rate else "")
      + (f"  (asked {ASKED[name]:g}x at 100)" if name in ASKED else "")
    )
