"""The files for other people's launchers parse, and run a real command line.

Each is run as its user runs it, with the launcher (`gcloud`, `srun`) replaced
by a script on PATH that executes the command line it is handed, here.
"""

import json
import os
import pathlib
import string
import subprocess
import sys

import jobs
import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "launch"
FILE = "experiments/digits.py"
WORDS = [FILE, "--workdir", "a place/with $(odd) names", "--train.epochs", "2"]
TRAIN = ["-m", "deepseek_jax.cli", "train"]

RECORD = f"""#!{sys.executable}
import json, os, sys
kept = {{k: v for k, v in os.environ.items() if k.startswith("SLURM_")}}
with open(os.environ["RECORD"], "a") as file:
  print(json.dumps([sys.argv[1:], kept]), file=file)
sys.exit(int(os.environ.get("EXIT", "0")))
"""
REAL = f"""#!/bin/sh
PYTHONPATH={ROOT} exec {sys.executable} "$@"
"""
JOIN = f"""#!/bin/sh
PYTHONPATH={ROOT} exec {sys.executable} -c '
import os
from deepseek_jax import parallel
found = parallel.initialize()
line = f"{{found.index}} of {{found.count}} by {{found.found_by}}\\n"
os.write(1, line.encode())  # At once: the other one writes there, too.
'
"""
# `srun` of one node with two tasks.
SRUN = """#!/bin/bash
echo "$@" > "$TMPDIR/srun"
while [ "${1:0:2}" = -- ]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
pids=()
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""
# Two hosts that are two folders.
GCLOUD = """#!/bin/bash
set -e
echo "$@" >> "$TMPDIR/gcloud"
for word in "$@"; do
  case "$word" in
    --command=*) command=${word#--command=} ;;
    *.tar) bundle=$word ;;
  esac
done
for host in 0 1; do
  mkdir -p "$TMPDIR/host$host"
  cd "$TMPDIR/host$host"
  [ -z "$bundle" ] || cp "$bundle" .
  [ -z "$command" ] || bash -c "$command"
done
"""
# Makes an environment whose programs are the scripts of this test.
VENV = """#!/bin/bash
[ "$1 $2" = "-m venv" ] || exit 3
mkdir -p "$3/bin"
cp "$TMPDIR/bin/python" "$3/bin/python"
printf '#!/bin/sh\\necho "$@" > installed\\n' > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


@pytest.fixture
def run(tmp_path):
  """Runs a command with scripts on PATH; returns it and what they recorded."""
  folder = tmp_path / "bin"
  folder.mkdir()

  def start(command, scripts, **variables):
    for name, text in scripts.items():
      (folder / name).write_text(text)
      (folder / name).chmod(0o755)
    record = tmp_path / "record"
    process = subprocess.run(
      command,
      cwd=ROOT,
      capture_output=True,
      text=True,
      check=False,
      env=jobs.environment(
        PATH=f"{folder}:{os.environ['PATH']}",
        TMPDIR=str(tmp_path),
        RECORD=str(record),
        SLURM_JOB_ID="77",
        **variables,
      ),
    )
    lines = record.read_text().splitlines() if record.exists() else []
    return process, [json.loads(line) for line in lines]

  return start


def slurm(run, words, python=RECORD, **variables):
  scripts = {
    "python": python,
    "srun": SRUN,
    "scontrol": '#!/bin/sh\necho "requeued: $@"\n',
  }
  script = str(FOLDER / "slurm.sbatch")
  return run(["bash", script, *words], scripts, **variables)


def tpu_pod(run, words, **variables):
  scripts = {"gcloud": GCLOUD, "python": RECORD, "python3": VENV}
  told = {"TPU": "slice", "ZONE": "here"} | variables
  return run([str(FOLDER / "tpu_pod.sh"), *words], scripts, **told)


def manifest(**names):
  text = (FOLDER / "gke_jobset.yaml").read_text()
  told = {"NAME": "run-1", "IMAGE": "image:1", "FILE": FILE, "FLAGS": ""}
  # As `envsubst` does it.
  return yaml.safe_load(string.Template(text).safe_substitute(told | names))


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_pod.sh"])
def test_scripts_parse(name):
  subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


def test_slurm_starts_train_in_every_task(run, tmp_path):
  process, seen = slurm(run, WORDS)
  assert process.returncode == 0, process.stderr
  assert [words for words, _ in seen] == [[*TRAIN, *WORDS]] * 2
  assert {kept["SLURM_PROCID"] for _, kept in seen} == {"0", "1"}
  assert "--kill-on-bad-exit=1" in (tmp_path / "srun").read_text()
  assert "requeued" not in process.stdout


def test_slurm_queues_a_job_again_that_was_stopped(run):
  process, _ = slurm(run, WORDS, EXIT="75")
  assert process.returncode == 75
  assert process.stdout == "requeued: requeue 77\n"
  process, _ = slurm(run, WORDS, EXIT="2")
  assert (process.returncode, process.stdout) == (2, "")


def test_slurm_asks_for_a_process_a_gpu():
  asked = dict(
    line.removeprefix("#SBATCH --").partition("=")[::2]
    for line in (FOLDER / "slurm.sbatch").read_text().splitlines()
    if line.startswith("#SBATCH")
  )
  assert asked["ntasks-per-node"] == asked["gpus-per-node"]
  assert asked["signal"].startswith("TERM@")


def test_a_tpu_pod_is_installed_and_trains_on_every_host(run, tmp_path):
  process, seen = tpu_pod(run, WORDS, PROJECT="mine")
  assert process.returncode == 0, process.stderr
  assert [words for words, _ in seen] == [[*TRAIN, *WORDS]] * 2
  for host in ("host0", "host1"):
    copied = tmp_path / host / "deepseek-jax"
    assert (copied / FILE).is_file()
    assert (copied / "installed").read_text() == "install --quiet .[tpu]\n"
  for line in (tmp_path / "gcloud").read_text().splitlines():
    assert line.startswith("compute tpus tpu-vm")
    for flag in ("--zone=here", "--worker=all", "--project=mine"):
      assert flag in line


def test_a_tpu_pod_goes_on_with_what_is_installed(run, tmp_path):
  tpu_pod(run, WORDS)
  (tmp_path / "gcloud").unlink()
  process, seen = tpu_pod(run, WORDS, INSTALL="0")
  assert process.returncode == 0
  assert len(seen) == 4
  assert len((tmp_path / "gcloud").read_text().splitlines()) == 1


@pytest.mark.parametrize(
  ("words", "told"),
  [([], {}), (WORDS, {"TPU": ""}), (["absent.py"], {})],
)
def test_a_tpu_pod_without_what_it_needs_says_so(run, words, told):
  process, _ = tpu_pod(run, words, **told)
  assert process.returncode == 2
  assert "experiment" in process.stderr


def test_a_job_of_kubernetes_has_one_pod_a_host_of_its_slice():
  found = manifest()
  assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert (found["kind"], found["metadata"]["name"]) == ("JobSet", "run-1")
  (workers,) = found["spec"]["replicatedJobs"]
  job = workers["template"]["spec"]
  assert job["parallelism"] == job["completions"]
  assert job["completionMode"] == "Indexed"
  pod = job["template"]["spec"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  sides = [int(side) for side in topology.split("x")]
  (container,) = pod["containers"]
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert sides[0] * sides[1] * sides[2] == chips * job["parallelism"]
  assert container["image"] == "image:1"


def container_command(**names):
  job = manifest(**names)["spec"]["replicatedJobs"][0]["template"]["spec"]
  return job["template"]["spec"]["containers"][0]["command"]


def test_a_pod_of_kubernetes_trains(run):
  command = container_command(FLAGS="--workdir gs://b/run-1 --mesh.fsdp 16")
  process, seen = run(command, {"python": RECORD})
  assert process.returncode == 0, process.stderr
  want = [*TRAIN, FILE, *["--workdir", "gs://b/run-1", "--mesh.fsdp", "16"]]
  assert [words for words, _ in seen] == [want]


@pytest.mark.slow
def test_processes_that_slurm_starts_find_each_other(run):
  process, _ = slurm(run, WORDS, python=JOIN)
  assert process.returncode == 0, process.stderr
  assert sorted(process.stdout.splitlines()) == [
    "0 of 2 by SLURM",
    "1 of 2 by SLURM",
  ]


@pytest.mark.slow
def test_the_command_of_a_pod_is_understood_by_train(run):
  command = container_command(FLAGS="--dry-run --model.channels 4")
  process, _ = run(command, {"python": REAL})
  assert process.returncode == 0, process.stderr
  assert "parameters" in process.stdout
