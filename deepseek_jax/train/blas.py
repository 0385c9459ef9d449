"""Keeps the threads of BLAS out of the way of XLA's."""

import contextlib
from collections.abc import Iterator

import jax
import threadpoolctl


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
  """Lets LAPACK use one thread inside the block, if JAX runs on a CPU.

  XLA calls LAPACK for decompositions, several at a time from threads of its
  own. OpenBLAS then wakes as many threads again for each call, and they wait
  for each other by spinning. With one thread, 28 QR decompositions of 344 by
  344 took 40 instead of 190 ms on two idle cores, and 0.27 instead of 4 s where
  another process kept one of them busy.
  """
  if jax.default_backend() != "cpu":
    yield
    return
  import scipy.linalg  # noqa: F401  Only a library that is loaded is limited.

  with threadpoolctl.threadpool_limits(1, user_api="blas"):
    yield
