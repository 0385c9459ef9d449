"""The command line as a person meets it: one process a test, few tests."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from deepseek_jax import cli
from deepseek_jax.parallel import xla_flags

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = str(ROOT / "experiments" / "digits.py")
TINY = ("--train.epochs", "2", "--model.channels", "4", "--train.no-progress")


def run(*words):
  """Runs the command in a process of its own, as a person does."""
  environment = {
    k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"
  }
  return subprocess.run(
    [sys.executable, "-m", "deepseek_jax.cli", *map(str, words)],
    capture_output=True,
    text=True,
    check=False,
    env=environment,
  )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
  workdir = tmp_path_factory.mktemp("runs") / "digits"
  return workdir, run("train", DIGITS, "--workdir", workdir, *TINY)


def test_train_gives_a_result_and_a_report(trained):
  workdir, process = trained
  assert process.returncode == cli.OK, process.stderr
  result = json.loads((workdir / "result.json").read_text())
  assert f"{result['metrics']['test/accuracy']:.4f}" in process.stdout
  assert (workdir / "report.html").read_text().startswith("<!doctype html>")


def test_evaluate_repeats_the_metrics_of_the_run(trained, capsys):
  workdir, _ = trained
  metrics = json.loads((workdir / "result.json").read_text())["metrics"]
  for split in ("test", "validation"):
    assert cli.main(["evaluate", str(workdir), "--split", split]) == cli.OK
    got = json.loads(capsys.readouterr().out)
    want = {k: v for k, v in metrics.items() if k.startswith(split)}
    assert got == pytest.approx(want, rel=1e-6)


def test_evaluate_reads_the_data_set_from_where_it_is_told(trained, tmp_path):
  workdir, _ = trained
  words = ["evaluate", str(workdir), "--data-dir", str(tmp_path / "elsewhere")]
  assert cli.main(words) == cli.OK
  assert (tmp_path / "elsewhere" / "digits").is_dir()


@pytest.mark.slow
def test_the_same_command_again_trains_nothing(trained):
  workdir, _ = trained
  before = (workdir / "metrics.jsonl").stat().st_mtime_ns
  process = run("train", DIGITS, "--workdir", workdir, *TINY)
  assert process.returncode == cli.OK
  assert (workdir / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_other_settings_in_the_same_workdir_are_refused(trained):
  workdir, _ = trained
  process = run("train", DIGITS, "--workdir", workdir, *TINY, "--seed", "1")
  assert process.returncode == cli.BAD_INPUT
  assert "config.seed was 0, now 1" in process.stderr
  assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_and_exits_75(tmp_path, data_dir):
  workdir = tmp_path / "run"
  words = ("train", DIGITS, "--workdir", str(workdir), "--train.epochs", "400")
  process = subprocess.Popen(
    [sys.executable, "-m", "deepseek_jax.cli", *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  for _ in range(1200):
    if (workdir / "metrics.jsonl").exists():
      break
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == cli.STOPPED, errors
  assert re.search(r"stopped by SIGTERM at step \d+", errors)
  result = json.loads((workdir / "result.json").read_text())
  assert (workdir / "checkpoints" / str(result["steps"])).is_dir()


def test_help_lists_flags_with_their_defaults(capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main(["train", DIGITS, "--help"])
  assert ended.value.code == 0
  text = capsys.readouterr().out
  assert "--train.epochs" in text
  assert "default: 40" in text
  assert "exit codes" in text
  assert "prepares it if missing" in " ".join(text.replace("│", "").split())


def test_a_single_process_gets_the_compilers_flags_before_its_file_is_read(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(xla_flags, "_used", lambda platform: platform == "tpu")
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine=1")
  file = tmp_path / "flags.py"
  file.write_text(
    "import os, pathlib\n"
    "told = pathlib.Path(__file__).with_suffix('.txt')\n"
    "told.write_text(os.environ['LIBTPU_INIT_ARGS'])\n"
  )
  assert cli.main(["train", str(file)]) == cli.BAD_INPUT
  words = file.with_suffix(".txt").read_text().split()
  assert words == ["--mine=1", *xla_flags.flags("tpu").split()]


def test_top_help_lists_commands(capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main(["--help"])
  assert ended.value.code == 0
  text = capsys.readouterr().out
  for command in ("train", "evaluate", "report"):
    assert command in text


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["trian"], "Did you mean 'train'?"),
    (["train", "absent.py"], "no experiment file 'absent.py'"),
    (["evaluate", "absent"], "run.json cannot be read"),
    (["report", "absent"], "absent"),
    (["train", "--dry-run", "absent.py"], "no experiment file 'absent.py'"),
    (["train", "--seed", "1", DIGITS], "FILE must come before its flags"),
    (["launch", DIGITS, "-n", "2"], "-n must come before FILE"),
    (["launch", DIGITS, "--num-processes=2"], "must come before FILE"),
    (["launch", "-n", "0", DIGITS], "at least 1, got num_processes=0.\n"),
    (["preflight", DIGITS, "--topolgy", "x"], "did you mean '--topology'?"),
    (
      ["train", DIGITS, "--data.name", "digit", "--workdir", "unused"],
      "did you mean 'digits'",
    ),
  ],
)
def test_bad_input_is_one_clear_line(
  words, message, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  try:
    code = cli.main(words)
  except SystemExit as ended:
    code = ended.code
  assert code == cli.BAD_INPUT
  errors = capsys.readouterr().err
  assert message in errors
  assert errors.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_a_typo_in_a_flag_names_the_nearest(capsys):
  with pytest.raises(SystemExit) as ended:
    cli.main(["train", DIGITS, "--train.epoch", "3"])
  assert ended.value.code == 2
  assert "--train.epochs" in capsys.readouterr().err


def test_an_unprepared_data_set_says_what_to_run(tmp_path, capsys):
  words = ["--data.name", "tfds:cifar10", "--data.data-dir", str(tmp_path)]
  code = cli.main(["train", DIGITS, *words, "--workdir", str(tmp_path / "run")])
  assert code == cli.BAD_INPUT
  assert "cifar10" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_file_shows_its_line(tmp_path, capsys):
  file = tmp_path / "broken.py"
  file.write_text("import math\nx = math.sqrt(-1)\n")
  with pytest.raises(SystemExit) as ended:
    cli.main(["train", str(file)])
  assert ended.value.code == cli.BAD_INPUT
  assert "line 2" in capsys.readouterr().err


def test_a_run_of_another_kind_asks_for_its_file(trained, capsys, monkeypatch):
  workdir, _ = trained
  asked = json.loads((workdir / "run.json").read_text())
  asked["config"]["kind"] = "Mine"
  copy = workdir.with_name("copy")
  shutil.copytree(workdir, copy)
  (copy / "run.json").write_text(json.dumps(asked))
  assert cli.main(["evaluate", str(copy)]) == cli.BAD_INPUT
  assert "--file" in capsys.readouterr().err


def test_a_file_without_an_experiment_is_told(tmp_path, capsys):
  file = tmp_path / "empty.py"
  file.write_text("x = 1\n")
  assert cli.main(["train", str(file)]) == cli.BAD_INPUT
  assert "must define `experiment`" in capsys.readouterr().err
