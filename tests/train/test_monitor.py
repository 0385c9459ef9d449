"""What a person sees of a run."""

import pytest

from deepseek_jax.train.monitor import Monitor

RECORD = {
  "step": 20,
  "epoch": 1.0,
  "train/loss": 0.5,
  "train/skipped": 2,
  "validation/accuracy": 0.75,
  "validation/loss": 0.25,
}


@pytest.fixture
def show(tmp_path, capsys):
  def call(record, **options):
    monitor = Monitor(
      tmp_path, total=100, done=0, tensorboard=False, progress=True, **options
    )
    monitor.advance(20)
    monitor.record(record)
    monitor.close()
    return capsys.readouterr().err

  return call


def test_an_evaluation_is_one_line_off_a_terminal(show):
  line = (
    "step  20/100  epoch   1.0  train loss 0.5000"
    "  validation loss 0.2500 accuracy 0.7500  skipped 2\n"
  )
  assert show(RECORD) == line


def test_a_log_line_without_evaluation_shows_nothing(show):
  assert show({"step": 20, "epoch": 1.0, "train/loss": 0.5}) == ""


def test_a_terminal_gets_a_bar(show, monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")  # Rich's word for a terminal.
  monkeypatch.setenv("COLUMNS", "80")
  assert "20/100" in show(RECORD)


def test_silence_is_silent(tmp_path, capsys):
  monitor = Monitor(
    tmp_path, total=9, done=0, tensorboard=False, progress=False
  )
  monitor.record(RECORD)
  monitor.say("going on")
  monitor.close()
  assert capsys.readouterr().err == ""
