"""Every case of the language model benchmark, at tiny size."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import optax
import pytest

from deepseek_jax import optim

_FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"
_TINY = ["--features=16", "--layers=1", "--block-size=8", "--window=16"]


@pytest.fixture
def bench(monkeypatch, tmp_path, data_dir):
  """Runs a case in this process; returns what its JSON file holds."""
  monkeypatch.syspath_prepend(_FOLDER)
  script = importlib.import_module("language_model")

  def run(case, *flags):
    words = ["language_model.py", case, *_TINY, f"--results={tmp_path}"]
    monkeypatch.setattr("sys.argv", [*words, "--force", "--rounds=1", *flags])
    script.main()
    return json.loads((tmp_path / f"language_model_{case}.json").read_text())

  return run


@pytest.fixture
def told(monkeypatch):
  """Stands for training in the case of quality; keeps what was asked."""
  monkeypatch.syspath_prepend(_FOLDER)
  asked = []

  def train(flags, way, seed):
    asked.append((way, seed))
    bits = 2.0 + seed + (way != "full") * 0.01
    return {"bits_per_byte": bits, "bits_per_byte_late": bits - 0.5}

  module = importlib.import_module("language_model_quality")
  monkeypatch.setattr(module, "train", train)
  return asked


def test_runs_of_quality_are_kept_and_compared_by_seed(bench, told, capsys):
  flags = ["--ways", "full", "dynamic"]
  bench("quality", *flags, "--seeds=0")
  both = bench("quality", *flags, "--seeds", "0", "1")
  assert told == [(w, s) for s in (0, 1) for w in ("full", "dynamic")]
  assert both["against_full"]["dynamic"]["seeds"] == [0, 1]
  ratios = both["against_full"]["dynamic"]["bits_per_byte"]
  assert ratios["ratios"] == pytest.approx([2.01 / 2, 3.01 / 3], abs=1e-5)
  other = bench("quality", *flags, "--seeds=0", "--rate=0.001")
  assert len(other["runs"]) == 2
  assert "runs of other settings" in capsys.readouterr().out


@pytest.mark.slow
def test_quality_is_that_of_the_average_on_held_out_rows(bench, monkeypatch):
  adam = lambda rate: optim.anytime_average(optax.adam(rate))
  monkeypatch.setattr(optim, "deepseek", adam)  # Compiles sooner.
  flags = ["--length=64", "--rows=2", "--steps=4", "--held-out=4", "--seeds=0"]
  found = bench("quality", *flags, "--ways", "dynamic, full at first")
  (run,) = found["runs"].values()
  assert 5 < run["bits_per_byte"] < 12
  assert len(run["curve"]) == 4


@pytest.mark.slow
def test_steps_over_length_hold_as_many_tokens(bench):
  lengths = ["--lengths", "32", "64", "--dense-most=32", "--tokens=64"]
  found = bench("step", *lengths)["details"]
  assert {t: row["rows"] for t, row in found["lengths"].items()} == {
    "32": 2,
    "64": 1,
  }
  against = found["dynamic_against"]
  assert against["full, ours"]["ratios"].keys() == {"32", "64"}
  assert against["full, XLA"]["ratios"].keys() == {"32"}
  losses = found["lengths"]["32"]["first_losses"]
  assert losses["full, XLA"] == pytest.approx(losses["full, ours"], rel=1e-4)


@pytest.mark.slow
def test_a_cache_serves_the_same_context_again(bench):
  found = bench("generate", "--widths=16", "--lengths", "32", "64")
  found = found["details"]["widths"]["16"]
  assert found["in_units_of_the_shortest"].keys() == {"full, ours", "dynamic"}
  for seconds in found["seconds_a_token"].values():
    assert seconds.keys() == {"32", "64"}


@pytest.mark.slow
def test_missing_torch_is_skipped_and_losses_agree(bench, capsys):
  flags = ["--lengths=32", "--tokens=64", "--steps=1", "--torch-python=nowhere"]
  found = bench("peers", *flags)["details"]["cases"]
  assert "PyTorch skipped. Make an environment" in capsys.readouterr().out
  assert len(found) == 2
  for told in found.values():
    mine = told["first_losses"].pop("ours")
    assert list(told["first_losses"].values()) == pytest.approx([mine] * 2)


def test_the_case_comes_first(bench):
  with pytest.raises(SystemExit):
    bench("--rounds=1", "step")


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own(tmp_path, data_dir):
  flags = ["--lengths=64", "--tokens=64", f"--results={tmp_path}"]
  script = str(_FOLDER / "language_model.py")
  env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  subprocess.run(
    [sys.executable, script, "memory", *_TINY, *flags], check=True, env=env
  )
  result = json.loads((tmp_path / "language_model_memory.json").read_text())
  for told in result["megabytes"]["64"].values():
    assert told["total_mb"] >= told["temporary_mb"] > 0
