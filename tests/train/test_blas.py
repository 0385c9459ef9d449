"""BLAS runs on one thread while a model trains, and as before after it."""

import scipy.linalg
import threadpoolctl

from deepseek_jax.train.blas import one_blas_thread


def threads() -> set[int]:
  scipy.linalg.lapack.dgeqrf([[1.0]])
  found = threadpoolctl.threadpool_info()
  return {one["num_threads"] for one in found if one["user_api"] == "blas"}


def test_one_thread_inside_and_as_before_outside():
  with threadpoolctl.threadpool_limits(2, user_api="blas"):
    before = threads()
    with one_blas_thread():
      assert threads() == {1}
    assert threads() == before
