"""Laws of the report's parts, without a run."""

import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.train.report import figures, predictions, write_report
from deepseek_jax.train.report.run import Series


def test_decimation_keeps_extremes_ends_and_gaps():
  values = np.sin(np.arange(5_000) / 90)
  values[1_234], values[2_345] = 7.0, -7.0
  values[3_000:3_200] = np.nan
  steps, kept = figures.decimate(Series(np.arange(5_000), values))
  assert (steps[0], steps[-1]) == (0, 4_999)
  assert (np.nanmax(kept), np.nanmin(kept)) == (7.0, -7.0)
  assert np.isnan(kept[(steps >= 3_000) & (steps < 3_200)]).any()
  assert (np.diff(steps) > 0).all()


def test_probabilities_sum_to_one_for_large_logits():
  logits = np.array([[1e4, 1e4, 0.0], [-1e4, 0.0, -1e4]])
  found = predictions.probabilities(logits)
  np.testing.assert_allclose(found, [[0.5, 0.5, 0], [0, 1, 0]])


def test_importing_the_report_loads_no_plotting():
  code = (
    "import sys, deepseek_jax.train.report\n"
    "assert {'matplotlib', 'PIL'}.isdisjoint(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_directory_is_no_run(tmp_path):
  with pytest.raises(ValueError, match="workdir must be a run directory"):
    write_report(tmp_path / "nowhere")
