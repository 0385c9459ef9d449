"""The worker's half of a paired benchmark: one epoch for each line on stdin.

A worker is a process of its own, in the virtual environment of the library it
measures. It is given the path of a JSON file (the sizes, and under "data" the
path of an `.npz` with the arrays), answers with one JSON line about itself and
then, for every line it reads, trains one epoch and prints its seconds. Between
the lines it sleeps, so that several workers can take turns on one machine.

Needs nothing but NumPy.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np


def read() -> tuple[dict, np.ndarray, np.ndarray]:
  """Returns the sizes, the images (in NHWC) and the labels."""
  with open(sys.argv[1], encoding="utf-8") as file:
    sizes = json.load(file)
  with np.load(sizes["data"]) as arrays:
    return sizes, arrays["images"], arrays["labels"]


def say(answer) -> None:
  print(json.dumps(answer), flush=True)


def wait() -> None:
  """Sleeps until it is this worker's turn; exits at the end of the input."""
  if not sys.stdin.readline():
    sys.exit(0)


def serve(epoch: Callable[[], float], **about) -> None:
  """Answers every line with the seconds that `epoch` takes.

  Args:
    epoch: Trains for one epoch, waits for it, returns the mean training loss.
    **about: What the first answer says: versions, number of parameters.
  """
  say(about)
  while True:
    wait()
    start = time.perf_counter()
    loss = epoch()
    say({"seconds": time.perf_counter() - start, "loss": loss})
