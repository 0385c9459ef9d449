"""The benchmark of gradient exchanges runs at tiny size, and adds up."""

import json
import os
import pathlib
import shutil
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "experiments/benchmarks"


@pytest.fixture
def exchange(monkeypatch):
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  import exchange

  return exchange


def run(exchange, monkeypatch, folder, *words):
  command = ["exchange.py", "--results", str(folder), *words]
  monkeypatch.setattr(sys, "argv", command)
  exchange.main()
  return json.loads((folder / "exchange.json").read_text())["cases"]


def test_losses_are_paired_by_seed(exchange):
  rows = {
    "float32": {"0": {"loss": 1.0, "held_out": 2.0}},
    "int8": {
      "0": {"loss": 1.01, "held_out": 2.0},
      "1": {"loss": 9.0, "held_out": 9.0},
    },
  }
  assert exchange.summary({"a": rows}) == {
    "a": {"int8": {"loss": [1.0, 1.0, 1.0], "held_out": [0.0, 0.0, 0.0]}}
  }


def test_the_mlp_has_the_size_it_is_named_for(exchange):
  import exchange_methods

  assert exchange_methods.size_of_mlp() == 5_266_452


def test_a_crossover_is_where_bytes_and_compute_tie(exchange):
  import exchange_link as link

  # 10 MB and 0.1 s, against 2 MB and 0.2 s: 64 Mbit in 0.1 s.
  make = lambda name, seconds, sent: {
    name: {"wire_bytes": sent, "counted": sent, "seconds": [seconds] * 3}
  }
  fast = lambda compute, sent: compute + sent * 8e-6 / link.FAST
  rows = make("float32", fast(0.1, 10e6), 10e6) | make(
    "int8", fast(0.2, 2e6), 2e6
  )
  found = link.summary({f"{link.FAST:g}": {"methods": rows}})
  assert found["int8"]["crossover_mbit"] == pytest.approx(640)


@pytest.mark.slow
def test_a_small_run_is_written_and_found_again(
  exchange, tmp_path, monkeypatch
):
  words = ["--cases", "bytes", "loss", "--tiny", "--tasks", "mlp"]
  words += ["--optimizers", "adam", "--steps", "20", "--only", "int8"]
  words += ["DiLoCo 10", "float32"]
  once = run(exchange, monkeypatch, tmp_path, *words, "--seeds", "1")
  row = once["bytes"]["sent"]["8"]["int8"]
  assert row["program"] == pytest.approx(row["state"], rel=0.01)
  assert once["bytes"]["sent"]["2"]["DiLoCo 10"]["saved"] > 9
  (losses,) = once["loss"]["summary"].values()
  assert abs(losses["int8"]["loss"][0]) < 2
  assert "<svg" in (tmp_path / "exchange.svg").read_text()
  twice = run(exchange, monkeypatch, tmp_path, *words, "--seeds", "2")
  (before,), (after,) = (x["loss"]["runs"].values() for x in (once, twice))
  assert after["int8"]["0"] == before["int8"]["0"]
  assert set(after["int8"]) == {"0", "1"}


@pytest.mark.slow
@pytest.mark.skipif(
  shutil.which("tc") is None or not hasattr(os, "geteuid") or os.geteuid() != 0,
  reason="a throttled link needs Linux, root, ip and tc",
)
def test_two_processes_talk_over_a_throttled_link(
  exchange, tmp_path, monkeypatch
):
  words = ["--cases", "link", "--tiny", "--rounds", "1", "--rates", "100"]
  found = run(
    exchange, monkeypatch, tmp_path, *words, "--only", "int8", "DiLoCo 10"
  )["link"]
  if "failed" in found:
    pytest.skip(found["failed"])
  assert set(found["summary"]) == {"float32", "int8", "DiLoCo 10"}
  assert set(found["sessions"]) == {"10000", "100"}
