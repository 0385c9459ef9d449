"""The benchmark of balanced experts, at tiny size."""

import importlib
import json
import pathlib

import pytest

_FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"
_TINY = ["--steps=4", "--window=2", "--held-out=4", "--seeds=1"]


@pytest.mark.slow
def test_loads_and_bits_are_scored_drawn_and_kept(
  monkeypatch, tmp_path, data_dir, capsys
):
  monkeypatch.syspath_prepend(_FOLDER)
  script = importlib.import_module("experts")
  words = ["experts.py", *_TINY, f"--results={tmp_path}"]
  monkeypatch.setattr("sys.argv", [*words, "--only", "dense", "bias 0.02"])
  script.main()
  told = json.loads((tmp_path / "experts.json").read_text())
  assert sorted(told["summary"]) == ["bias 0.02", "dense"]
  assert "lasting" not in told["summary"]["dense"]
  assert told["summary"]["bias 0.02"]["lasting"][0] >= 1
  assert 2 < told["summary"]["dense"]["bits_per_byte"][0] < 9
  assert (tmp_path / "experts.svg").stat().st_size > 5000
  assert "dense, seed 0" in capsys.readouterr().out
  script.main()  # Everything is there.
  assert "dense, seed 0" not in capsys.readouterr().out
