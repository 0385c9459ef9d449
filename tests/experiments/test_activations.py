"""The benchmark of activations, at tiny size."""

import importlib
import json
import pathlib

import pytest

_FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"
_TINY = ["--digits-steps=5", "--digits-seeds=2", "--text-steps=2"]


@pytest.fixture
def bench(monkeypatch, tmp_path, data_dir):
  """Runs the benchmark in this process; returns what its JSON file holds."""
  monkeypatch.syspath_prepend(_FOLDER)
  script = importlib.import_module("activations")

  def run(*flags):
    words = ["activations.py", *_TINY, f"--results={tmp_path}", *flags]
    monkeypatch.setattr("sys.argv", words)
    script.main()
    return json.loads((tmp_path / "activations.json").read_text())["tasks"]

  return run


@pytest.mark.slow
def test_methods_of_digits_are_scored_drawn_and_kept(bench, tmp_path, capsys):
  only = ["--tasks", "digits", "--only", "GELU", "target 0.95"]
  told = bench(*only)["digits"]["summary"]
  assert sorted(told) == ["GELU", "target 0.95"]
  assert told["GELU"]["zeros"][0] == 0
  assert told["target 0.95"]["zeros"][0] > 0.5
  assert told["target 0.95"]["seeds"] == 2
  assert (tmp_path / "activations.svg").stat().st_size > 5000
  assert "digits, GELU" in capsys.readouterr().out
  again = bench(*only)["digits"]["summary"]
  assert again == told
  assert "digits, GELU" not in capsys.readouterr().out


@pytest.mark.slow
def test_methods_of_text_are_scored(bench):
  told = bench("--tasks", "text", "--text-seeds=1", "--only", "GELU", "0.95")
  summary = told["text"]["summary"]
  assert summary["GELU"]["zeros"][0] == 0
  for row in summary.values():
    assert 2 < row["bits_per_byte"][0] < 9
  assert summary["target 0.95"]["zeros"][0] > 0.4
