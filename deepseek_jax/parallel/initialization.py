"""`initialize`: many processes become one JAX program, or say why not."""

import logging
import math
from collections.abc import Sequence

import jax
from jax._src import distributed, xla_bridge

from deepseek_jax.core.arguments import require_in
from deepseek_jax.parallel import launchers, tether
from deepseek_jax.parallel.launchers import Processes
from deepseek_jax.parallel.roll_call import call_roll
from deepseek_jax.parallel.xla_flags import set_xla_flags

_CONNECT_SECONDS = 60  # Enough for processes that have all come already.


def initialize(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  local_device_ids: Sequence[int] | None = None,
  start_seconds: int | float = 300,
  heartbeat_seconds: int | float = 30,
  shutdown_seconds: int | float = 5,
) -> Processes:
  """Joins this process to the others of its job; does nothing if it is alone.

  Call it before anything touches a device. Who the others are is taken from
  the arguments, else from the variables DEEPSEEK_JAX_COORDINATOR,
  DEEPSEEK_JAX_NUM_PROCESSES and DEEPSEEK_JAX_PROCESS_ID (`deepseek-jax launch`
  sets them), else from SLURM, Open MPI, mpi4py, Cloud TPU or an indexed job of
  Kubernetes. A second call returns what the first did.

  Unlike `jax.distributed.initialize` it finds out who is missing before it
  starts what cannot be interrupted, so that every process ends with one line
  that says so; lets an ended process go after seconds, not minutes; and lets
  only rank 0 log below the level of warnings. It calls `set_xla_flags`; who is
  alone, with many devices, does so before. As there, a SIGTERM to one of them
  is a notice to all, see
  `jax.experimental.multihost_utils.reached_preemption_sync_point`.

  >>> initialize().count
  1

  Args:
    coordinator: "HOST:PORT" of rank 0, as the others reach it; a free port.
    num_processes: How many processes the job has.
    process_id: Rank of this one, in [0, num_processes).
    local_device_ids: Which GPUs of the host this process uses; all, or as the
      launcher says, if None.
    start_seconds: How long to wait for the slowest process.
    heartbeat_seconds: After how long without a sign of life JAX gives up on a
      process, and ends all others. A `Watchdog` says first who it was.
    shutdown_seconds: How long a process that ends waits for the others.

  Returns:
    Which process of how many this is.

  Raises:
    ValueError: If only some of the first three are given, or do not fit.
    StartError: If the processes do not find each other in time; on every one.
    RuntimeError: If a device was used before.

  References:
    JAX, "Introduction to multi-controller JAX", 2025.
    https://docs.jax.dev/en/latest/multi_process.html
  """
  if jax.distributed.is_initialized():
    return _running()
  require_in(
    "(0, inf)",
    start_seconds=start_seconds,
    heartbeat_seconds=heartbeat_seconds,
    shutdown_seconds=shutdown_seconds,
  )
  tether.tie()
  given = (coordinator, num_processes, process_id)
  if any(value is not None for value in given):
    processes = _explicit(coordinator, num_processes, process_id)
  else:
    processes = launchers.detect(start_seconds)
  if processes.count == 1:
    return processes
  if local_device_ids is None:
    local_device_ids = processes.local_device_ids
  _join(
    processes,
    local_device_ids,
    start_seconds,
    heartbeat_seconds,
    shutdown_seconds,
  )
  _log(processes)
  return processes


def _explicit(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Processes:
  """Checks what the caller says about the job."""
  if coordinator is None or num_processes is None or process_id is None:
    raise ValueError(
      "coordinator, num_processes and process_id must be given together, got "
      f"{coordinator=}, {num_processes=}, {process_id=}."
    )
  return Processes(
    index=process_id,
    count=num_processes,
    coordinator=coordinator,
    found_by="arguments",
  )


def _join(
  processes: Processes,
  local_device_ids: Sequence[int] | None,
  start_seconds: int | float,
  heartbeat_seconds: int | float,
  shutdown_seconds: int | float,
) -> None:
  index, count = processes.index, processes.count
  if count < 1 or not 0 <= index < count:
    raise ValueError(
      "process_id must be in [0, num_processes), got "
      f"process_id={index}, num_processes={count}."
    )
  if processes.coordinator is None:
    raise ValueError(f"coordinator must be known, got none for {processes}.")
  if xla_bridge.backends_are_initialized():
    raise RuntimeError(
      "parallel.initialize must be called before anything touches a device, "
      "jax.devices() included."
    )
  set_xla_flags()
  call_roll(processes.coordinator, index, count, start_seconds)
  jax.distributed.initialize(
    processes.coordinator,
    count,
    index,
    # None would leave those of JAX_LOCAL_DEVICE_IDS, or all.
    None if local_device_ids is None else list(local_device_ids),
    cluster_detection_method="deactivate",
    initialization_timeout=_CONNECT_SECONDS,
    heartbeat_timeout_seconds=math.ceil(heartbeat_seconds),
    shutdown_timeout_seconds=math.ceil(shutdown_seconds),
  )


def _running() -> Processes:
  """Returns what an earlier call, of ours or of JAX, has set up."""
  state = distributed.global_state
  return Processes(
    index=state.process_id,
    count=state.num_processes,
    coordinator=state.coordinator_address,
    found_by="an earlier call",
  )


def _log(processes: Processes) -> None:
  """Lets rank 0 speak, and the others only warn."""
  logger = logging.getLogger("deepseek_jax")
  first = processes.index == 0
  logger.setLevel(logging.INFO if first else logging.WARNING)
  logger.info(
    "%d processes, found by %s, meet at %s",
    processes.count,
    processes.found_by,
    processes.coordinator,
  )
