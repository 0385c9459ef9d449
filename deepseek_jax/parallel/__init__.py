"""Meshes, and who keeps what of a model on them."""

from deepseek_jax.parallel.agreement import (
  DisagreementError as DisagreementError,
)
from deepseek_jax.parallel.agreement import agree as agree
from deepseek_jax.parallel.ambient import axis_size as axis_size
from deepseek_jax.parallel.ambient import batch_axes as batch_axes
from deepseek_jax.parallel.ambient import constrain as constrain
from deepseek_jax.parallel.ambient import fitting_axes as fitting_axes
from deepseek_jax.parallel.ambient import free_axes as free_axes
from deepseek_jax.parallel.balance import Cut as Cut
from deepseek_jax.parallel.balance import cut_evenly as cut_evenly
from deepseek_jax.parallel.balance import cut_layers as cut_layers
from deepseek_jax.parallel.fitting import FSDP_MIN_SIZE as FSDP_MIN_SIZE
from deepseek_jax.parallel.initialization import initialize as initialize
from deepseek_jax.parallel.launchers import Processes as Processes
from deepseek_jax.parallel.mesh import AXES as AXES
from deepseek_jax.parallel.mesh import BATCH_AXES as BATCH_AXES
from deepseek_jax.parallel.mesh import MeshSpec as MeshSpec
from deepseek_jax.parallel.mesh import make_mesh as make_mesh
from deepseek_jax.parallel.microbatches import batch_parts as batch_parts
from deepseek_jax.parallel.microbatches import cut_batch as cut_batch
from deepseek_jax.parallel.pipeline import pipeline as pipeline
from deepseek_jax.parallel.pipeline import storage_order as storage_order
from deepseek_jax.parallel.place import describe as describe
from deepseek_jax.parallel.place import device_bytes as device_bytes
from deepseek_jax.parallel.place import local_rows as local_rows
from deepseek_jax.parallel.place import make_sharded as make_sharded
from deepseek_jax.parallel.place import put_batch as put_batch
from deepseek_jax.parallel.rules import Largest as Largest
from deepseek_jax.parallel.rules import Placement as Placement
from deepseek_jax.parallel.rules import Preferred as Preferred
from deepseek_jax.parallel.rules import Rules as Rules
from deepseek_jax.parallel.rules import joint_specs as joint_specs
from deepseek_jax.parallel.rules import merge as merge
from deepseek_jax.parallel.rules import shardings as shardings
from deepseek_jax.parallel.rules import specs as specs
from deepseek_jax.parallel.rules import state_specs as state_specs
from deepseek_jax.parallel.schedule import Schedule as Schedule
from deepseek_jax.parallel.schedule import bubble as bubble
from deepseek_jax.parallel.store import StartError as StartError
from deepseek_jax.parallel.tables import CLASSIFIER as CLASSIFIER
from deepseek_jax.parallel.tables import DEFAULT as DEFAULT
from deepseek_jax.parallel.tables import LANGUAGE_MODEL as LANGUAGE_MODEL
from deepseek_jax.parallel.watchdog import WATCHDOG_EXIT as WATCHDOG_EXIT
from deepseek_jax.parallel.watchdog import Watchdog as Watchdog
from deepseek_jax.parallel.wire import wire_bytes as wire_bytes
from deepseek_jax.parallel.xla_flags import set_xla_flags as set_xla_flags
