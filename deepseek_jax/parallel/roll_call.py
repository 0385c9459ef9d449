"""Who has come, before anything that cannot be interrupted begins.

JAX's own start aborts the process when a peer is missing, and does not say
which. So rank 0 listens at the coordinator's address first, every other rank
says there who it is, and all of them learn whether the job is complete. Only
then does JAX's coordinator take over the address.
"""

import errno
import json
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

from deepseek_jax.parallel.store import StartError, name_ranks

_GREETING = "deepseek-jax roll call"
_PATIENCE = 3.0  # Seconds that others wait longer than rank 0, to hear it.
_LINGER = 10.0  # Seconds that the rest have to come and hear of an error.
_LONGEST = 65536  # Bytes of a message, far more than any has.


def call_roll(
  coordinator: str, rank: int, count: int, seconds: int | float
) -> None:
  """Returns when all processes have come; every process calls it.

  Args:
    coordinator: "HOST:PORT" of rank 0; nothing else may listen there yet.
    rank: Of this process.
    count: How many processes this one was told of.
    seconds: How long to wait for the slowest, positive.

  Raises:
    StartError: On every process: which ranks are missing, came twice, or were
      told of another number of processes; or that rank 0 was not reached.
  """
  host, port = _split(coordinator)
  if rank == 0:
    error = _Host(port, count, seconds).run()
  else:
    hello = {
      "greeting": _GREETING,
      "rank": rank,
      "count": count,
      "host": socket.gethostname(),
      "token": secrets.token_hex(8),
    }
    error = _Guest((host, port), hello, seconds).run()
  if error:
    raise StartError(f"rank {rank} of {count} cannot start: {error}")


class _Host:
  """Rank 0's side."""

  def __init__(self, port: int, count: int, seconds: int | float):
    self._port, self._count, self._seconds = port, count, seconds
    self._came: dict[int, tuple[dict, socket.socket]] = {}
    self._odd: list[socket.socket] = []  # Of those who are told the error too.

  def run(self) -> str | None:
    """Returns what is wrong with the job, None if all came."""
    try:
      server = _listen(self._port)
    except OSError as error:
      return (
        f"port {self._port} of this host is not free ({error.strerror}); "
        "choose another port, or end the process that holds it."
      )
    with server:
      error = self._wait(server)
    # The port is free for JAX before anyone hears that it may go on.
    self._answer(error)
    return error

  def _wait(self, server: socket.socket) -> str | None:
    end = time.monotonic() + self._seconds
    error = None
    while len(self._came) + len(self._odd) < self._count - 1:
      server.settimeout(max(end - time.monotonic(), 0.001))
      try:
        guest, _ = server.accept()
      except TimeoutError:
        return error or self._missing()
      if (wrong := self._welcome(guest)) and not error:
        error = wrong
        end = min(end, time.monotonic() + _LINGER)
    return error

  def _welcome(self, guest: socket.socket) -> str | None:
    guest.settimeout(2.0)
    hello = _read(guest)
    if hello is None or hello.get("greeting") != _GREETING:
      guest.close()  # A port scan, or a process that ended meanwhile.
      return None
    rank, count = hello["rank"], hello["count"]
    before = self._came.get(rank)
    if before is not None and before[0]["token"] == hello["token"]:
      before[1].close()  # The same process again, over a new connection.
    elif before is not None or not 0 < rank < self._count:
      self._odd.append(guest)
      hosts = {hello["host"], *([before[0]["host"]] if before else [])}
      return (
        f"two processes say that they are rank {rank} of {self._count}, on "
        f"{' and '.join(sorted(hosts))}; every process needs its own number."
      )
    self._came[rank] = (hello, guest)
    if count != self._count:
      return (
        f"rank {rank} was told of {count} processes and rank 0 of "
        f"{self._count}; all must be started with the same number."
      )
    return None

  def _missing(self) -> str:
    absent = [r for r in range(1, self._count) if r not in self._came]
    return (
      f"{name_ranks(absent)} never came to rank 0 within {self._seconds:g} s; "
      "look at the log of its host, or whether it reaches this one."
    )

  def _answer(self, error: str | None) -> None:
    guests = [guest for _, guest in self._came.values()]
    for guest in (*guests, *self._odd):
      _try(lambda guest=guest: _write(guest, {"error": error}))
    for guest in (*guests, *self._odd):
      # Whoever closes last keeps no trace of the connection on this port.
      _try(lambda guest=guest: guest.recv(1))
      guest.close()


class _Guest:
  """The side of every other rank."""

  def __init__(
    self, address: tuple[str, int], hello: dict, seconds: int | float
  ):
    self._address, self._hello, self._seconds = address, hello, seconds
    self._end = time.monotonic() + seconds
    self._why = "no answer"

  def run(self) -> str | None:
    """Returns what rank 0 says is wrong; itself, if rank 0 was not reached."""
    while (left := self._end - time.monotonic()) > 0:
      try:
        with socket.create_connection(self._address, min(left, 5.0)) as host:
          _write(host, self._hello)
          host.settimeout(max(self._end - time.monotonic(), 0) + _PATIENCE)
          answer = _read(host)
      except OSError as error:
        self._why = error.strerror or str(error) or type(error).__name__
        answer = None
      if answer is not None and "error" in answer:
        return answer["error"]
      time.sleep(min(0.2, max(self._end - time.monotonic(), 0)))
    host, port = self._address
    return (
      f"rank 0 was not reached at {host}:{port} within {self._seconds:g} s "
      f"({self._why}); check that it runs, that the address is its own, and "
      "that no firewall closes the port."
    )


def _listen(port: int) -> socket.socket:
  if socket.has_dualstack_ipv6():
    try:
      return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
      )
    except OSError as error:
      # A kernel that knows IPv6 on a host where it is switched off.
      if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        raise
  return socket.create_server(("", port), backlog=1024)


def _split(coordinator: str) -> tuple[str, int]:
  host, _, port = coordinator.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")
  if not (host and port.isdecimal() and 0 < int(port) < 65536):
    raise ValueError(
      f"coordinator must be HOST:PORT, got coordinator={coordinator!r}."
    )
  return host, int(port)


def _write(connection: socket.socket, message: dict[str, Any]) -> None:
  connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket) -> dict[str, Any] | None:
  """Returns one message; None if there was none, or something else."""
  data = b""
  try:
    while not data.endswith(b"\n") and len(data) < _LONGEST:
      part = connection.recv(4096)
      if not part:
        return None
      data += part
    message = json.loads(data)
  except (OSError, ValueError):
    return None
  return message if isinstance(message, dict) else None


def _try(action: Callable[[], object]) -> None:
  """Acts on a connection whose other end may be gone."""
  try:
    action()
  except OSError:
    return
