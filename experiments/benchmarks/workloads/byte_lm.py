"""A causal Transformer over the bytes of Python's standard library.

Trained and validated on disjoint files; 512 bytes a step. Their text comes
with the interpreter, so losses are comparable within one version of Python.
"""

import functools
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np

from workloads import Workload, _digits

_TRAIN = """
  argparse ast bdb calendar cmd codecs configparser contextlib csv
  dataclasses difflib dis doctest enum fractions ftplib functools gettext
  gzip heapq imaplib inspect ipaddress locale mailbox mimetypes optparse os
  pdb pickle pickletools platform plistlib posixpath pydoc random
  shutil smtplib socket socketserver ssl statistics string subprocess
  tarfile tempfile textwrap threading tokenize traceback turtle typing uuid
  warnings weakref zipapp zipimport
"""
_VALIDATION = "bisect copy glob netrc queue sched shelve timeit trace wave"
_LENGTH, _BATCH, _CHECKED = 64, 8, 32  # Bytes, sequences a step, validated.
_LAYERS, _WIDTH, _HEADS = 2, 96, 4


@functools.cache
def text(validation=False):
  """The bytes of a list of modules, one after another."""
  folder = pathlib.Path(sysconfig.get_path("stdlib"))
  chosen = (_VALIDATION if validation else _TRAIN).split()
  files = [folder / f"{name}.py" for name in chosen]
  found = b"".join(path.read_bytes() for path in files)
  return np.frombuffer(found, np.uint8)


def batch(seed, step):
  starts = np.random.default_rng((seed, step)).integers(
    0, len(text()) - _LENGTH - 1, _BATCH
  )
  return text()[starts[:, None] + np.arange(_LENGTH + 1)].astype(np.int32)


def validation_batch():
  starts = np.linspace(0, len(text(True)) - _LENGTH - 1, _CHECKED).astype(int)
  return text(True)[starts[:, None] + np.arange(_LENGTH + 1)].astype(np.int32)


def init(seed):
  keys = iter(jax.random.split(jax.random.key(seed), 3 + 6 * _LAYERS))

  def normal(*shape, scale):
    return jax.random.normal(next(keys), shape) * scale

  def linear(rows, columns, gain=1.0):
    return {"kernel": normal(rows, columns, scale=gain / rows**0.5)}

  deep = (2 * _LAYERS) ** -0.5  # What every branch adds to the residual.
  layers = {
    str(i): {
      "attention_norm": {"scale": jnp.ones(_WIDTH)},
      "attention": {
        **{n: linear(_WIDTH, _WIDTH) for n in ("query", "key", "value")},
        "out": linear(_WIDTH, _WIDTH, deep),
      },
      "mlp_norm": {"scale": jnp.ones(_WIDTH)},
      "mlp": {
        "up": linear(_WIDTH, 4 * _WIDTH),
        "down": linear(4 * _WIDTH, _WIDTH, deep),
      },
    }
    for i in range(_LAYERS)
  }
  return {
    "embed": {"table": normal(256, _WIDTH, scale=0.02)},
    "positions": {"table": normal(_LENGTH, _WIDTH, scale=0.02)},
    "layers": layers,
    "norm": {"scale": jnp.ones(_WIDTH)},
    "head": linear(_WIDTH, 256),
  }


def rms_norm(params, x):
  mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean + 1e-6) * params["scale"][None, None]


def attention(params, x):
  size, length, width = x.shape
  query, key, value = (
    (x @ params[name]["kernel"]).reshape(size, length, _HEADS, -1)
    for name in ("query", "key", "value")
  )
  read = jax.nn.dot_product_attention(query, key, value, is_causal=True)
  return read.reshape(size, length, width) @ params["out"]["kernel"]


def loss(params, batch):
  seen, following = batch[:, :-1], batch[:, 1:]
  x = params["embed"]["table"][seen] + params["positions"]["table"][None]
  for layer in params["layers"].values():
    x += attention(layer["attention"], rms_norm(layer["attention_norm"], x))
    hidden = rms_norm(layer["mlp_norm"], x) @ layer["mlp"]["up"]["kernel"]
    x += jax.nn.gelu(hidden) @ layer["mlp"]["down"]["kernel"]
  logits = rms_norm(params["norm"], x) @ params["head"]["kernel"]
  return _digits.cross_entropy(logits, following)


WORKLOAD = Workload(
  name="byte_lm",
  steps=400,
  init=init,
  batch=batch,
  loss=loss,
  validation_loss=lambda params: loss(params, validation_batch()),
)
