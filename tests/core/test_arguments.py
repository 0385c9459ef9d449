"""Checks of arguments: what passes, and what is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.core import (
  require_floating,
  require_in,
  require_one_of,
  require_static,
  require_whole,
)

INF = float("inf")
INTERVALS = {
  "[0, 1)": lambda x: 0 <= x < 1,
  "(0, 2]": lambda x: 0 < x <= 2,
  "[0, inf)": lambda x: 0 <= x < INF,
  "(-inf, inf)": lambda x: -INF < x < INF,
  "(1, inf]": lambda x: 1 < x <= INF,
}
NO_NUMBERS = [None, "0.5", [0.5], True, np.True_, 0.5j, optax.sgd(0.1), abs]
NUMBERS = st.one_of(
  st.floats(), st.integers(-3, 3), st.floats(-3, 3).map(np.float64)
)


def passes(check, value):
  """Whether a value passes; if not, the message must name it."""
  message = None
  try:
    check(other=value)
  except ValueError as error:
    message = str(error)
  if message is None:
    return True
  assert message.startswith("other must be ")
  assert f"got other={value!r}." in message
  return False


@pytest.mark.parametrize("value", [0, 1, 2, 0.0, 1.0, 2.0, -INF, INF])
@pytest.mark.parametrize("interval", INTERVALS)
def test_the_ends_of_an_interval_are_where_its_brackets_say(interval, value):
  check = functools.partial(require_in, interval)
  assert passes(check, value) == INTERVALS[interval](value)


@given(NUMBERS, st.sampled_from(sorted(INTERVALS)))
def test_an_interval_holds_what_its_notation_says(value, interval):
  check = functools.partial(require_in, interval)
  assert passes(check, value) == INTERVALS[interval](value)


@given(NUMBERS)
def test_whole_numbers_are_whole_and_large_enough(value):
  is_whole = 1 <= value < INF and value == round(value)
  assert passes(functools.partial(require_whole, 1), value) == is_whole
  is_integer = isinstance(value, int) and is_whole
  assert passes(functools.partial(require_static, 1), value) == is_integer


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:9])
def test_what_is_no_number_is_named(value):
  for check in (
    functools.partial(require_in, "(-inf, inf)"),
    functools.partial(require_whole, 0),
    functools.partial(require_static, 0),
  ):
    assert not passes(check, value)


def test_arrays_pass_unless_they_must_be_static():
  def check(value):
    require_in("[0, 1)", value=value)
    require_whole(9, value=value)
    with pytest.raises(ValueError, match=r"value must .* static_args"):
      require_static(0, value=value)
    return value

  jax.jit(check)(2.5)
  check(jnp.float32(2.5))


def test_numpy_integers_are_integers():
  require_static(2, block=np.int64(2))
  with pytest.raises(ValueError, match="block must be an integer, at least 2"):
    require_static(2, block=np.int64(1))


@pytest.mark.parametrize("value", [0, np.int64(0), None, "2", True])
def test_only_what_may_be_injected_hears_of_injection(value):
  with pytest.raises(ValueError, match=r"at least 1, got") as told:
    require_static(1, num_processes=value)
  assert "inject_hyperparams" not in str(told.value)
  with pytest.raises(ValueError, match=r"got rank=2.5\. Under optax\.inject_"):
    require_static(1, rank=2.5)


@pytest.mark.parametrize("bad", ["rows", 1, ["row"], optax.sgd(0.1)])
def test_what_is_no_choice_is_named(bad):
  require_one_of(("row", None), first="row", variance=None)
  with pytest.raises(ValueError, match=r"variance must be one of \('row', No"):
    require_one_of(("row", None), variance=bad)


@pytest.mark.parametrize("dtype", [None, "bfloat16", jnp.float16, np.float32])
def test_floating_dtypes_pass(dtype):
  require_floating(dtype=dtype)


@pytest.mark.parametrize("bad", ["int8", "x", jnp.int8, complex, 0.5, abs])
def test_what_is_no_floating_dtype_is_named(bad):
  with pytest.raises(ValueError, match="dtype must be a floating"):
    require_floating(dtype=bad)
