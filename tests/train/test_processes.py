"""Several real processes give the run of one, and one goes on with theirs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

EXPERIMENT = """
import os, signal, time
from deepseek_jax.train import *

def fail(how):
  if os.environ.get("DEEPSEEK_JAX_PROCESS_ID") != "1":
    return
  if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
  if how == "raises":
    raise ValueError("my data is not there")
  if how == "sleeps":
    time.sleep(1000)

fail(os.environ.get("AT_IMPORT"))

class Fragile(Experiment):
  def run(self):
    fail(self.workdir)
    result = super().run()
    if self.workdir == "late":
      fail("sleeps")
    return result

experiment = Fragile(
  data=Data(batch_size=32),
  model=Classifier(channels=(8,), lstm_features=16, num_heads=2),
  optimizer=Optimizer(name="adamw", learning_rate=3e-3),
  train=Train(epochs=None, steps=120, evaluate_every=40, log_every=10,
              tensorboard=False, progress=False),
)
"""


@pytest.fixture
def job(tmp_path, data_dir):
  """Starts so many processes of `train`; ends those that are left."""
  (tmp_path / "experiment.py").write_text(EXPERIMENT)
  with contextlib.ExitStack() as stack:

    def start(count, workdir, *flags, odd=()):
      with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
      command = [sys.executable, "-m", "deepseek_jax.cli", "train"]
      command += ["experiment.py", "--workdir", workdir, *flags]
      kept = {k: v for k, v in os.environ.items() if "DEEPSEEK_JAX" not in k}
      processes = []
      for rank in range(count):
        told = {
          "JAX_NUM_CPU_DEVICES": str(4 // count),
          "TFDS_DATA_DIR": str(data_dir),
          "DEEPSEEK_JAX_COORDINATOR": f"127.0.0.1:{port}",
          "DEEPSEEK_JAX_NUM_PROCESSES": str(count),
          "DEEPSEEK_JAX_PROCESS_ID": str(rank),
        }
        process = subprocess.Popen(
          [*command, *(odd if rank else ())],
          cwd=tmp_path,
          env=kept | told,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        processes.append(process)
      return processes

    yield start


def ended(processes):
  """Returns codes and what was said on stderr."""
  said = [process.communicate(timeout=240)[1] for process in processes]
  return [process.returncode for process in processes], said


def result(path):
  return json.loads((path / "result.json").read_text())


def assert_close(first, second):
  assert first["complete"]
  assert second["complete"]
  assert first["best_step"] == second["best_step"]
  for name, value in first["metrics"].items():
    np.testing.assert_allclose(second["metrics"][name], value, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_run_goes_on_in_other_processes(job, tmp_path, first, second):
  flags = ["--mesh.fsdp", "2"]
  codes, said = ended(job(3 - first, "whole", *flags))
  assert codes == [0] * (3 - first), said
  started = job(first, "cut", *flags)
  lines = tmp_path / "cut" / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while not (lines.exists() and lines.read_text().count("\n") >= 2):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  # One of them is told, and all stop after the same step.
  started[-1].send_signal(signal.SIGTERM)
  codes, said = ended(started)
  assert codes == [75] * first, said
  assert 20 <= result(tmp_path / "cut")["steps"] < 120
  # On one process with sizes by default, on two with those of before.
  codes, said = ended(job(second, "cut", *(flags if second == 2 else ())))
  assert codes == [0] * second, said
  assert_close(result(tmp_path / "whole"), result(tmp_path / "cut"))


@pytest.mark.slow
def test_processes_that_were_told_different_things_all_end(job, tmp_path):
  codes, said = ended(job(2, "run", odd=("--seed", "1")))
  assert codes == [2, 2]
  for text in said:
    assert "seed is 0 on rank 0 and 1 on rank 1" in text
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("killed", -9), ("raises", 2)])
def test_a_process_that_ends_before_the_first_step_is_named(job, how, code):
  codes, said = ended(job(2, how, "--train.watchdog-seconds", "5"))
  assert codes == [70, code], said
  assert "rank 1 is the culprit" in said[0]
  if how == "raises":
    assert "deepseek-jax: my data is not there" in said[1]
    assert "my data is not there" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("killed", -9), ("raises", 2)])
def test_one_that_ends_while_it_reads_the_file_is_named(
  job, monkeypatch, how, code
):
  monkeypatch.setenv("AT_IMPORT", how)
  codes, said = ended(job(2, "run"))
  # Slow to end by itself, it may be ended by JAX, whose service went first.
  assert codes[0] == 70, said
  assert codes[1] in (code, -signal.SIGABRT), said
  assert "rank 1 is the culprit" in said[0]


@pytest.mark.slow
def test_one_that_hangs_after_the_run_is_named(job):
  flags = ["--train.steps", "2", "--train.watchdog-seconds", "12"]
  codes, said = ended(job(2, "late", *flags))
  assert codes == [70, 70], said
  assert "rank 1 is the culprit" in said[0]
  assert "outside any collective" in said[0]
