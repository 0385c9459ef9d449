"""Laws of starting: who is there, who is missing, and one line that says so."""

import socket
import threading
import time

import jobs
import pytest
from jax._src.clusters import cloud_tpu_cluster

from deepseek_jax import parallel
from deepseek_jax.parallel import launchers, roll_call, xla_flags

SLURM = {
  "SLURM_JOB_ID": "4100",
  "SLURM_STEP_NODELIST": "node[007-010]",
  "SLURM_NTASKS": "8",
  "SLURM_PROCID": "5",
  "SLURM_LOCALID": "1",
  "SLURM_STEP_NUM_NODES": "4",
  "SLURM_STEP_NUM_TASKS": "8",
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "3",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
OURS = {
  launchers.COORDINATOR: "host:1234",
  launchers.NUM_PROCESSES: "3",
  launchers.PROCESS_ID: "2",
}
CLOUD_TPU = {
  "TPU_WORKER_HOSTNAMES": "localhost,other",
  "TPU_WORKER_ID": "1",
  "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
  "MEGASCALE_NUM_SLICES": "2",
  "MEGASCALE_SLICE_ID": "1",
}


def detect(monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  return launchers.detect(5)


@pytest.mark.parametrize(
  ("variables", "index", "count", "coordinator", "devices"),
  [
    (OURS, 2, 3, "host:1234", None),
    (SLURM, 5, 8, "node007:65540", (1,)),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, 5, 8, "node007:65540", None),
    (OPEN_MPI, 3, 4, "10.96.0.1:", None),
    # What we were told by `launch` counts, inside a SLURM allocation too.
    (SLURM | OURS, 2, 3, "host:1234", None),
  ],
  ids=["ours", "slurm", "slurm, a task a node", "open mpi", "ours in slurm"],
)
def test_every_launcher_says_who_we_are(
  monkeypatch, variables, index, count, coordinator, devices
):
  found = detect(monkeypatch, variables)
  assert (found.index, found.count) == (index, count)
  assert found.local_device_ids == devices
  host, _, port = found.coordinator.rpartition(":")
  assert host == coordinator.rpartition(":")[0]
  assert 0 < int(port) < 65536


def test_cloud_tpus_are_counted_over_their_slices(monkeypatch):
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  found = detect(monkeypatch, CLOUD_TPU)
  assert (found.index, found.count, found.found_by) == (3, 4, "Cloud TPU")
  assert found.coordinator == "localhost:8482"


def test_other_mpi_launchers_are_asked_through_mpi4py(monkeypatch, tmp_path):
  # A world of three, as mpi4py shows it.
  package = tmp_path / "mpi4py"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "MPI.py").write_text(
    "COMM_TYPE_SHARED = 0\n"
    "class COMM_WORLD:\n"
    "  Get_size = staticmethod(lambda: 3)\n"
    "  Get_rank = staticmethod(lambda: 2)\n"
    "  bcast = staticmethod(lambda x, root: 'first:7777')\n"
    "  Split_type = staticmethod(lambda kind: COMM_WORLD)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  found = detect(monkeypatch, {"PMI_SIZE": "3"})
  assert (found.index, found.count, found.found_by) == (2, 3, "mpi4py")
  assert found.coordinator == "first:7777"


def test_one_task_is_alone_whatever_launched_it(monkeypatch):
  assert detect(monkeypatch, SLURM | {"SLURM_NTASKS": "1"}).count == 1
  assert parallel.initialize().count == 1


def test_a_pod_of_a_notebook_is_alone_and_one_of_a_job_is_not(monkeypatch):
  assert detect(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).count == 1
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
  with pytest.raises(ValueError, match="kubernetes must be installed"):
    launchers.detect(5)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({launchers.PROCESS_ID: None}, "must be set together, got no .*PROCESS_ID"),
    ({launchers.NUM_PROCESSES: "two"}, "NUM_PROCESSES must be a whole.*'two'"),
    ({launchers.PROCESS_ID: "3"}, r"process_id must be in.*process_id=3"),
    ({launchers.COORDINATOR: "host"}, "coordinator must be HOST:PORT.*'host'"),
  ],
)
def test_wrong_variables_are_named(change, said):
  variables = {k: v for k, v in (OURS | change).items() if v is not None}
  with pytest.raises(ValueError, match=said):
    _initialize_with(variables)


def _initialize_with(variables):
  """Starts as `initialize` does with these variables."""
  found = launchers.detect(5, variables)
  if not 0 <= found.index < found.count:
    parallel.initialize(
      coordinator=found.coordinator,
      num_processes=found.count,
      process_id=found.index,
    )
  roll_call.call_roll(found.coordinator, found.index, found.count, 0.1)


def test_arguments_come_together_or_not_at_all():
  with pytest.raises(ValueError, match=r"given together.*process_id=None"):
    parallel.initialize(coordinator="host:1", num_processes=2)


def call_all(
  count, *, absent=(), told=None, ranks=None, seconds=3.0, port=None
):
  """Calls the roll from threads; returns by rank what each heard."""
  address = f"127.0.0.1:{port or jobs.free_port()}"
  heard = []

  def come(rank):
    try:
      number = (told or {}).get(rank, count)
      roll_call.call_roll(address, rank, number, seconds)
      heard.append((rank, None))
    except roll_call.StartError as error:
      heard.append((rank, str(error)))

  coming = [r for r in (ranks or range(count)) if r not in absent]
  threads = [threading.Thread(target=come, args=(r,)) for r in coming]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return sorted(heard, key=lambda pair: pair[0])


def test_a_complete_roll_lets_everyone_go_on_and_frees_the_port():
  port = jobs.free_port()
  for _ in range(3):
    assert call_all(4, port=port) == [(rank, None) for rank in range(4)]


def test_everyone_hears_who_is_missing():
  heard = call_all(5, absent=(2, 3), seconds=0.5)
  assert [rank for rank, _ in heard] == [0, 1, 4]
  for rank, said in heard:
    assert f"rank {rank} of 5 cannot start: ranks 2, 3 never came" in said
    assert "\n" not in said


def test_everyone_names_the_address_that_rank_0_is_not_at():
  for rank, said in call_all(3, absent=(0,), seconds=0.5):
    assert f"rank {rank} of 3 cannot start: rank 0 was not reached at" in said
    assert "127.0.0.1:" in said
    assert "Connection refused" in said


def test_two_of_one_rank_and_two_counts_are_refused():
  for _, said in call_all(3, ranks=(0, 1, 1)):
    assert "two processes say that they are rank 1 of 3" in said
  for _, said in call_all(3, told={2: 4}):
    assert "rank 2 was told of 4 processes and rank 0 of 3" in said


def test_a_port_that_is_taken_is_said_at_once():
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(roll_call.StartError, match=rf"port {port} .*not free"):
      roll_call.call_roll(f"localhost:{port}", 0, 2, 30)


def test_a_stranger_at_the_port_is_not_counted():
  port = jobs.free_port()
  heard = []

  def host():
    try:
      roll_call.call_roll(f"127.0.0.1:{port}", 0, 2, 1.0)
    except roll_call.StartError as error:
      heard.append(str(error))

  thread = threading.Thread(target=host)
  thread.start()
  time.sleep(0.2)
  with socket.create_connection(("127.0.0.1", port)) as stranger:
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    thread.join()
  assert "rank 1 never came" in heard[0]


def test_flags_of_the_user_are_left_alone(monkeypatch):
  monkeypatch.setattr(xla_flags, "_used", lambda platform: platform == "gpu")
  name = "xla_gpu_enable_latency_hiding_scheduler"
  variables = {"XLA_FLAGS": f"--{name}=false --xla_dump_to=here"}
  xla_flags.set_xla_flags(variables)
  words = variables["XLA_FLAGS"].split()
  assert words[:2] == [f"--{name}=false", "--xla_dump_to=here"]
  assert set(words[2:]) == set(xla_flags.flags("gpu").split()) - {
    f"--{name}=true"
  }
  before = dict(variables)
  xla_flags.set_xla_flags(variables)
  assert variables == before
  assert "LIBTPU_INIT_ARGS" not in variables


def test_a_run_on_the_cpu_gets_no_flags():
  variables = {}
  xla_flags.set_xla_flags(variables)
  assert variables == {}


@pytest.mark.slow
def test_processes_join_once_compute_together_and_end_when_they_disagree():
  ended = jobs.run(
    """
    import logging
    logging.basicConfig()
    found = join()
    assert join() == parallel.initialize()
    assert (found.index, found.count) == (RANK, COUNT)
    step, x = make_step()
    assert float(jax.jit(jnp.sum)(step(x))) == 6.0
    parallel.agree({"seed": 0})
    try:
      parallel.agree({"seed": RANK // 2})
    except parallel.DisagreementError as error:
      raise SystemExit(str(error))
    """,
    3,
  )
  for rank, process in ended.items():
    assert process.code == 1, process.err
    assert "seed is 0 on ranks 0, 1 and 1 on rank 2" in process.err
    assert ("3 processes, found by arguments" in process.err) == (rank == 0)


@pytest.mark.slow
def test_without_one_of_them_all_end_with_one_line():
  ended = jobs.run(
    """
    try:
      join(start_seconds=3)
    except parallel.StartError as error:
      raise SystemExit(str(error))
    """,
    3,
    ranks=(0, 2),
  )
  for process in ended.values():
    assert process.code == 1
    assert "rank 1 never came to rank 0 within 3 s" in process.err
    assert len(process.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_compilers_know_their_flags(platform):
  """An unknown flag would end the process."""
  if platform == "tpu":
    pytest.importorskip("libtpu")
  script = """
    os.environ["XLA_FLAGS"] = sys.argv[4]
    os.environ["LIBTPU_INIT_ARGS"] = sys.argv[5]
    from jax.experimental import topologies
    if sys.argv[5]:
      topologies.get_topology_desc("v5e:2x2", "tpu")
    print(jnp.ones(3).sum())
  """
  flags = xla_flags.flags(platform)
  words = (flags, "") if platform == "gpu" else ("", flags)
  ended = jobs.run(script, 1, *words)[0]
  assert (ended.code, ended.out.strip()) == (0, "3.0"), ended.err
