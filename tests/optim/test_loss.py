"""`scale_by_loss_ratio` against its formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.optim import scale_by_loss_ratio

LOSSES = [2.0, 1.7, math.nan, 1.9, 1.1, math.inf, 0.6, 0.3, 1.2, 0.2, 0.05]
SETTINGS = [
  {"power": 0.5, "decay": 0.9},
  {"power": 2.0, "decay": 0.0, "min_scale": 0.01},
  {"power": -0.5, "decay": 0.5, "max_scale": 3.0},
  {"power": -1.0, "decay": 0.9, "reference": "best"},
  {"power": -2.0, "decay": 0.0, "reference": "best", "min_scale": 0.0},
  {"power": 1.0, "decay": 0.8, "reference": "best", "max_scale": 4.0},
  {"power": 0.0},
]


def transcription(
  losses, power, decay=0.95, reference="initial", min_scale=0.1, max_scale=1.0
):
  """The formula in NumPy and float64, one scale for each loss."""
  scales, seen, means, scale = [], [], [], 1.0
  for loss in losses:
    if np.isfinite(loss):
      seen.append(loss)
      weights = decay ** np.arange(len(seen) - 1, -1, -1, dtype=np.float64)
      means.append(np.dot(weights, seen) / weights.sum())
      level = means[0] if reference == "initial" else min(means)
      ratio = max(means[-1], 0.0) / level if level > 0 else 1.0
      with np.errstate(divide="ignore"):
        scale = np.clip(np.float64(ratio) ** power, min_scale, max_scale)
    scales.append(scale)
  return np.asarray(scales)


def scales_of(losses, **settings):
  """The scales that the transform applies to an update of ones."""
  tx = scale_by_loss_ratio(**settings)
  ones = jnp.ones(2)

  def step(state, loss):
    updates, state = tx.update(ones, state, value=loss)
    return state, updates[0]

  run = jax.jit(lambda losses: jax.lax.scan(step, tx.init(ones), losses)[1])
  return np.asarray(run(jnp.asarray(losses, jnp.float32)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_its_transcription(settings):
  expected = transcription(LOSSES, **settings)
  np.testing.assert_allclose(scales_of(LOSSES, **settings), expected, rtol=1e-5)
  if settings["power"]:
    assert len(np.unique(expected)) > 2


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("unit", [1e-6, 1e3, 1e12])
def test_does_not_depend_on_the_unit_of_the_loss(settings, unit):
  np.testing.assert_allclose(
    scales_of([unit * loss for loss in LOSSES], **settings),
    scales_of(LOSSES, **settings),
    rtol=1e-4,
  )


@pytest.mark.parametrize("losses", [[-1.0, -2.0], [0.0, 1.0], [-3.0, 5.0]])
@pytest.mark.parametrize("settings", SETTINGS)
def test_rests_where_the_reference_is_not_positive(losses, settings):
  scales = scales_of(losses, **settings)
  np.testing.assert_allclose(scales, transcription(losses, **settings))
  if settings.get("reference") != "best":
    np.testing.assert_array_equal(scales, 1.0)


def test_a_loss_that_falls_below_zero_counts_as_zero():
  scales = scales_of([4.0, 1e-9, -1e-9, -7.0], power=0.5, decay=0.0)
  np.testing.assert_allclose(scales, [1.0, 0.1, 0.1, 0.1], rtol=1e-6)


def test_a_lower_loss_calms_and_a_rising_loss_never_speeds_up():
  scales = scales_of([3.0, 2.0, 1.0, 9.0, 27.0], power=0.5, decay=0.0)
  assert scales[0] == scales[3] == scales[4] == 1.0
  assert scales[0] > scales[1] > scales[2]


def test_the_missing_loss_is_named():
  tx = scale_by_loss_ratio()
  with pytest.raises(TypeError, match=r"value=loss"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_a_loss_per_example_is_named():
  tx = scale_by_loss_ratio()
  with pytest.raises(ValueError, match=r"scalar, got .*\(3,\)"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=jnp.ones(3))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"power": math.nan}, r"power must be in \(-inf, inf\)"),
    ({"decay": 1.0}, r"decay must be in \[0, 1\), got decay=1.0"),
    ({"decay": -0.1}, "decay must"),
    ({"min_scale": 1.1}, "min_scale must"),
    ({"max_scale": 0.9}, "max_scale must"),
    ({"max_scale": math.inf}, "max_scale must"),
    ({"power": 1.0, "reference": "best"}, "power must be negative"),
  ],
)
def test_arguments_out_of_range_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    scale_by_loss_ratio(**settings)
