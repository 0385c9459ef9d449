"""Who started this process, and as which of how many.

Every launcher leaves signs in the environment of the processes that it starts.
The signs of SLURM, Open MPI, mpi4py, Cloud TPU and Kubernetes are read by
`jax.distributed`'s own detection; here is decided when to trust them.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from jax._src import clusters  # Public only as a whole, inside `initialize`.

COORDINATOR = "DEEPSEEK_JAX_COORDINATOR"
NUM_PROCESSES = "DEEPSEEK_JAX_NUM_PROCESSES"
PROCESS_ID = "DEEPSEEK_JAX_PROCESS_ID"

_OURS = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
  """Which of how many processes this one is.

  Attributes:
    index: Rank of this process, from 0.
    count: How many processes there are.
    coordinator: Where rank 0 listens, "HOST:PORT"; None for one process.
    local_device_ids: Which of the host's GPUs are for this process; None: all.
    found_by: Who said so.
  """

  index: int = 0
  count: int = 1
  coordinator: str | None = None
  local_device_ids: tuple[int, ...] | None = None
  found_by: str = "nothing"


def detect(
  seconds: int | float, environment: Mapping[str, str] = os.environ
) -> Processes:
  """Returns what the launcher of this process said; one process if none did.

  Args:
    seconds: How long to wait until the name of rank 0's host is known.
    environment: The variables to read those of our own from.

  Raises:
    ValueError: If some of our own variables are set and some are not, or one
      is no number; if the launcher is known but cannot be asked.
  """
  if any(name in environment for name in _OURS):
    return _from_variables(environment)
  for found_by, cluster in _clusters(environment):
    count = cluster.get_process_count()
    if count == 1:
      return Processes(found_by=found_by)
    return Processes(
      index=cluster.get_process_id(),
      count=count,
      coordinator=cluster.get_coordinator_address(
        timeout_secs=int(seconds),
        override_coordinator_port=environment.get("JAX_COORDINATOR_PORT"),
      ),
      local_device_ids=_local_devices(cluster, environment),
      found_by=found_by,
    )
  return Processes()


def _from_variables(environment: Mapping[str, str]) -> Processes:
  missing = [name for name in _OURS if name not in environment]
  if missing:
    raise ValueError(
      f"{', '.join(_OURS)} must be set together, got no {', '.join(missing)}."
    )
  numbers = {}
  for name in (PROCESS_ID, NUM_PROCESSES):
    if not environment[name].isdecimal():
      raise ValueError(
        f"{name} must be a whole number, got {environment[name]!r}."
      )
    numbers[name] = int(environment[name])
  return Processes(
    index=numbers[PROCESS_ID],
    count=numbers[NUM_PROCESSES],
    coordinator=environment[COORDINATOR],
    found_by="environment variables",
  )


def _clusters(environment: Mapping[str, str]):
  """Yields the launchers whose signs there are, the surest first."""
  if clusters.SlurmCluster.is_env_present():
    yield "SLURM", clusters.SlurmCluster
  if clusters.OmpiCluster.is_env_present():
    yield "Open MPI", clusters.OmpiCluster
  if any(name in environment for name in _MPI) and _installed("mpi4py"):
    yield "mpi4py", clusters.Mpi4pyCluster
  for cluster in (clusters.GkeTpuCluster, clusters.GceTpuCluster):
    if cluster.is_env_present():
      yield "Cloud TPU", cluster
  # Every notebook in a cluster is a pod; only indexed jobs have many processes.
  if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment):
    if not _installed("kubernetes"):
      raise ValueError(
        "kubernetes must be installed to ask the cluster who the other "
        f"processes are; or set {', '.join(_OURS)} in the job's manifest."
      )
    if clusters.K8sCluster.is_env_present():
      yield "Kubernetes", clusters.K8sCluster


def _local_devices(
  cluster: Any, environment: Mapping[str, str]
) -> tuple[int, ...] | None:
  """Returns the one GPU of this process; None if it has the host for itself."""
  on_host = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
  nodes = environment.get("SLURM_STEP_NUM_NODES")
  tasks = environment.get("SLURM_STEP_NUM_TASKS")
  alone = on_host == "1" or (nodes is not None and nodes == tasks)
  local = cluster.get_local_process_id()
  return None if alone or local is None else (local,)


def _installed(package: str) -> bool:
  return importlib.util.find_spec(package) is not None
