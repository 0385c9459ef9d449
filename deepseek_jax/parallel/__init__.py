"""Meshes, and who keeps what of a model on them."""

from deepseek_jax.parallel.ambient import axis_size, batch_axes, constrain
from deepseek_jax.parallel.mesh import AXES, BATCH_AXES, MeshSpec, make_mesh
from deepseek_jax.parallel.wire import wire_bytes

__all__ = [
  "AXES",
  "BATCH_AXES",
  "MeshSpec",
  "axis_size",
  "batch_axes",
  "constrain",
  "make_mesh",
  "wire_bytes",
]
