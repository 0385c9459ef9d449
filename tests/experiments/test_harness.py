import argparse
import doctest
import importlib
import json
import os
import pathlib

import pytest

_FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def harness(monkeypatch):
  """The module, found as a benchmark script beside it finds it."""
  monkeypatch.syspath_prepend(_FOLDER)
  return importlib.import_module("harness")


@pytest.fixture
def bench(harness, monkeypatch, tmp_path):
  """Makes benchmarks on a machine of two cores with these readings."""

  def make(*, loads=(0.5, 1.5), speeds=(50.0, 51.0), force=False):
    readings, products = iter(loads), iter(speeds)
    monkeypatch.setattr(os, "getloadavg", lambda: (next(readings), 0, 0))
    monkeypatch.setattr(harness.machine, "cores", lambda: 2)
    monkeypatch.setattr(harness.machine, "matmul_speed", lambda: next(products))
    arguments = argparse.Namespace(force=force, rounds=3, results=tmp_path)
    return harness.Benchmark("sample", arguments)

  return make


def test_cases_take_turns_and_warmup_does_not_count(harness):
  calls = []
  cases = {name: lambda name=name: calls.append(name) for name in "ab"}
  seconds = harness.measure(cases, rounds=3, warmup=2, calls=1)
  assert "".join(calls) == "ab" * 5
  assert {name: len(values) for name, values in seconds.items()} == {
    "a": 3,
    "b": 3,
  }


def test_seconds_are_those_of_one_call(harness, monkeypatch):
  clock = [0.0]

  def work():
    clock[0] += 0.25

  monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
  seconds = harness.measure({"work": work}, rounds=2, warmup=0, calls=8)
  assert seconds == {"work": [0.25, 0.25]}


def test_a_slow_minute_of_the_machine_leaves_the_ratio_alone(harness):
  slowness = [1.0, 1.0, 9.0, 30.0, 1.0]
  comparison = harness.Comparison(
    "both", {"plain": slowness, "ours": [0.5 * s for s in slowness]}
  )
  ratio = comparison.ratio("ours")
  assert (ratio.lower, ratio.median, ratio.upper) == (0.5, 0.5, 0.5)
  assert comparison.ratio("plain").median == 1


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"warmup": -1}, {"calls": 0}])
def test_numbers_out_of_range_are_named(harness, wrong):
  (name,) = wrong
  with pytest.raises(ValueError, match=f"{name}={wrong[name]}"):
    harness.measure({"a": lambda: None}, **wrong)


def test_no_case_is_an_error(harness):
  with pytest.raises(ValueError, match="at least one function"):
    harness.measure({})


def test_cases_of_a_comparison_have_equally_many_timings(bench):
  with pytest.raises(ValueError, match=r"lengths=\[1, 2\]"):
    bench().record("uneven", {"a": [1.0], "b": [1.0, 2.0]})


def test_busy_machine_is_refused_before_anything_is_timed(bench):
  with pytest.raises(SystemExit, match=r"load 3\.1 on 2 cores.*--force"):
    bench(loads=(3.1,))


@pytest.mark.parametrize(
  ("readings", "verdict"),
  [
    ({}, "judged"),
    ({"loads": (3.1, 1), "force": True}, "not judged: load 3.1 on 2 cores"),
    ({"loads": (1.0, 5.0)}, "not judged: load 5.0 on 2 cores"),
    ({"speeds": (50.0, 30.0)}, "not judged: matmul went from 50 to 30 GFLOP/s"),
  ],
)
def test_doubt_stands_in_the_result(bench, tmp_path, readings, verdict):
  one = bench(**readings)
  one.compare("nothing", {"a": lambda: None, "b": lambda: None})
  assert one.finish()["verdict"] == verdict
  assert (
    json.loads((tmp_path / "sample.json").read_text())["verdict"] == verdict
  )


def test_files_hold_what_a_reader_needs_and_no_path(
  bench, tmp_path, monkeypatch, capsys
):
  flag = str(tmp_path / "data.npz")
  monkeypatch.setattr("sys.argv", [str(tmp_path / "script.py"), "--data", flag])
  one = bench()
  one.record("size 8", {"plain": [0.02, 0.03], "ours": [0.01, 0.012]})
  one.finish(seeds=[0, 1], details={"parameters": 12})
  text = (tmp_path / "sample.json").read_text()
  result = json.loads(text)
  assert result["command"] == "python script.py --data data.npz"
  assert result["seeds"] == [0, 1]
  assert result["details"] == {"parameters": 12}
  assert result["comparisons"][0]["seconds"]["plain"] == [0.02, 0.03]
  assert result["comparisons"][0]["ratios"]["ours / plain"]["median"] < 0.5
  assert {"cores", "system"} <= result["hardware"].keys()
  assert "numpy" in result["versions"]
  assert os.uname().nodename not in json.dumps(result["hardware"])
  assert str(tmp_path) not in text
  assert "<svg" in (tmp_path / "sample.svg").read_text()
  printed = capsys.readouterr().out
  assert "size 8" in printed
  assert "matmul 50.0 GFLOP/s before, 51.0 after" in printed


def test_crossover_is_absent_without_a_crossing(harness):
  assert harness.crossover([1, 10], [3.0, 2.0]) is None
  assert harness.crossover([1, 10], [0.5, 0.4]) is None


def test_crossover_of_a_power_law_is_exact(harness):
  sizes = [2.0**i for i in range(10)]
  assert harness.crossover(sizes, [50 / s for s in sizes]) == pytest.approx(50)


@pytest.mark.parametrize(
  "name", ["harness", "harness_figure", "harness_machine"]
)
def test_docstrings_say_what_happens(harness, name):
  assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_matmul_speed_is_a_positive_number(harness):
  assert harness.machine.matmul_speed(repeats=1) > 0
