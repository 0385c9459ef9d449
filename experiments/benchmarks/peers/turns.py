"""The other half of a paired benchmark: workers that take turns.

See `worker.py` for what a worker answers.
"""

import json
import pathlib
import subprocess
from typing import IO, Any, cast

import numpy as np

HERE = pathlib.Path(__file__).parent


class Worker:
  """A training process that runs one epoch when it is told to.

  Args:
    python: Interpreter of the virtual environment to run in.
    script: File name of the worker, beside this file.
    sizes: What it reads; plain JSON. "data" holds the path of the arrays.
    workdir: Where to put its `sizes` and what it writes to stderr.
    name: Name of both files.

  Raises:
    RuntimeError: If the process ends before it says what it is.
  """

  def __init__(
    self,
    python: str,
    script: str,
    sizes: dict[str, Any],
    workdir: pathlib.Path,
    name: str,
  ):
    """Starts the process and waits until it has introduced itself."""
    path = workdir / f"{name}.json"
    path.write_text(json.dumps(sizes))
    self._log = workdir / f"{name}.log"
    with self._log.open("w") as log:
      self._process = subprocess.Popen(
        [python, str(HERE / script), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
      )
    self._stdin = cast(IO[str], self._process.stdin)
    self._stdout = cast(IO[str], self._process.stdout)
    self.losses: list[float] = []
    self.about = self._answer()

  def epoch(self) -> float:
    """Trains one epoch; returns its seconds."""
    self._stdin.write("epoch\n")
    self._stdin.flush()
    answer = self._answer()
    self.losses.append(answer["loss"])
    return answer["seconds"]

  def close(self) -> None:
    """Ends the process."""
    self._process.kill()
    self._process.communicate()  # Waits, and closes the pipes.

  def _answer(self) -> dict[str, Any]:
    """Returns the next line of JSON; libraries print lines of their own."""
    for line in self._stdout:
      if line.startswith("{"):
        return json.loads(line)
    status = self._process.wait()
    raise RuntimeError(
      f"{self._process.args} ended with exit status {status}:\n"
      f"{self._log.read_text()[-2000:]}"
    )


def save_arrays(path: pathlib.Path, images: Any, labels: Any) -> None:
  """Writes what `worker.read` reads."""
  np.savez(path, images=np.asarray(images), labels=np.asarray(labels))
