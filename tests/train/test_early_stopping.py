import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.train.early_stopping import EarlyStopping

values = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30)


@given(values, st.sampled_from(["min", "max"]))
def test_best_is_the_first_best_finite_value(series, mode):
  stopping = EarlyStopping(mode=mode)
  for step, value in enumerate(series):
    stopping.update(value, step)
  finite = [v for v in series if abs(v) < float("inf")]
  if not finite:
    assert stopping.best_step is None
    return
  best = min(finite) if mode == "min" else max(finite)
  assert stopping.best == best
  assert stopping.best_step == series.index(best)


@given(values, st.integers(1, 5))
def test_stops_exactly_after_patience_evaluations_without_gain(
  series, patience
):
  stopping = EarlyStopping(patience=patience)
  since = 0
  for step, value in enumerate(series):
    since = 0 if stopping.update(value, step) else since + 1
    assert stopping.should_stop == (since >= patience)


@given(values, st.integers(0, 30))
def test_progress_continues_where_it_stopped(series, cut):
  whole = EarlyStopping(patience=3)
  first = EarlyStopping(patience=3)
  for step, value in enumerate(series):
    whole.update(value, step)
    if step < cut:
      first.update(value, step)
  second = EarlyStopping(patience=3)
  second.load(first.progress())
  for step, value in enumerate(series[cut:], start=cut):
    second.update(value, step)
  assert second == whole


def test_min_delta_asks_for_more_than_noise():
  stopping = EarlyStopping(min_delta=0.1)
  assert stopping.update(1.0, 0)
  assert not stopping.update(0.95, 1)
  assert stopping.update(0.85, 2)


def test_mode_follows_the_metric():
  assert EarlyStopping(monitor="validation/accuracy").mode == "max"
  assert EarlyStopping(monitor="validation/loss").mode == "min"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"patience": 0}, "patience must be at least 1"),
    ({"min_delta": -1.0}, "min_delta must be finite and at least 0"),
    ({"min_delta": float("nan")}, "min_delta must be finite and at least 0"),
    ({"mode": "best"}, "mode must be 'min' or 'max'"),
  ],
)
def test_refuses_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    EarlyStopping(**arguments)
