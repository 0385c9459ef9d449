"""A stack of layers as plain arrays, and meshes to put it on."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import parallel

ROWS, TIME, FEATURES, HIDDEN, LAYERS = 16, 2, 8, 4, 4
MESHES = {
  "one device": {"data": 1},
  "stage 2, data 2, tensor 2": {"stage": 2, "data": 2, "tensor": 2},
  "stage 4, fsdp 2": {"stage": 4, "data": 1, "fsdp": 2},
  "stage 2, replica 2, sequence 2": {
    "stage": 2, "data": 1, "replica": 2, "sequence": 2,
  },
}  # fmt: skip


def make_mesh(name):
  sizes = MESHES[name]
  count = 1 if name == "one device" else 8
  spec = parallel.MeshSpec(**sizes)
  return parallel.make_mesh(spec, jax.devices()[:count])


def normal(*shape, seed=0, scale=1.0):
  rng = np.random.default_rng([seed, *shape])
  return (scale * rng.normal(size=shape)).astype(np.float32)


def arguments():
  """Parameters by layer, activations, an array of rows, and one without."""
  params = {
    "inward": normal(LAYERS, FEATURES, HIDDEN, scale=0.4),
    "outward": normal(LAYERS, HIDDEN, FEATURES, scale=0.4),
  }
  x = normal(ROWS, TIME, FEATURES)
  return params, x, normal(ROWS, 1, 1, seed=1), normal(1, 1, FEATURES)


def layer(params, state, x, factor, shift):
  y = jnp.tanh(x @ params["inward"]) @ params["outward"]
  return x + factor * y + shift, state


def placed(mesh, params, x, factor, shift):
  """The same, as a trainer lays it over the mesh."""
  put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))
  params = {
    "inward": put(params["inward"], "stage", "fsdp", "tensor"),
    "outward": put(params["outward"], "stage", "tensor", "fsdp"),
  }
  rows = parallel.BATCH_AXES
  return params, put(x, rows, "sequence"), put(factor, rows), put(shift)


def compiled(mesh, function, *args):
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(function).lower(*args).compile()
