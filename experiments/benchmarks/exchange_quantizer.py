"""What encoding and decoding cost, against one pass over the gradient."""

import concurrent.futures
import multiprocessing
import os
import time
from typing import Any

import numpy as np

_ROUNDS = 25
ASKED = 1.3  # Passes that encoding and decoding may take.


def measure(tiny: bool) -> dict[str, Any]:
  """Returns seconds on one core, from a process of its own."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    1, spawn, initializer=_one_core
  ) as pool:
    return pool.submit(_measure, tiny).result()


def _one_core() -> None:
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _measure(tiny: bool) -> dict[str, Any]:
  """Times, in turns, a pass, and every codec with its error feedback."""
  import exchange_methods as methods
  import jax
  import jax.numpy as jnp

  from deepseek_jax.comm import codecs

  size = 65_536 if tiny else methods.size_of_mlp() // 2048 * 2048
  rng = np.random.default_rng(0)
  gradient = jnp.asarray(rng.normal(size=size).astype(np.float32))
  error = 0.1 * gradient[::-1]
  kinds = {
    "bf16": codecs.Halved(256),
    "int8": codecs.Rounded(8, 256),
    "int4": codecs.Rounded(4, 128),
    "1 bit": codecs.Signs(1024),
    "top-k 1 %": codecs.Largest(10, 1024),
  }
  jobs: dict[str, Any] = {"pass": lambda: double(gradient)}
  double = jax.jit(lambda x: 2 * x)
  for name, codec in kinds.items():
    blocks = gradient.reshape(-1, codec.block)
    encode = jax.jit(lambda x, c=codec: c.encode(x, None))
    decode = jax.jit(lambda x, c=codec: c.decode(x, None))
    codes = encode(blocks)

    @jax.jit
    def both(x, e, c=codec):
      wanted = x + e
      codes = c.encode(wanted, None)
      return codes, wanted - c.decode(codes, None)

    own = error.reshape(blocks.shape)
    jobs[f"{name} encode"] = lambda f=encode, x=blocks: f(x)
    jobs[f"{name} decode"] = lambda f=decode, x=codes: f(x)
    jobs[f"{name} feedback"] = lambda f=both, x=blocks, e=own: f(x, e)
  seconds: dict[str, list[float]] = {name: [] for name in jobs}
  for number in range(_ROUNDS + 2):
    for name, job in jobs.items():
      start = time.perf_counter()
      jax.block_until_ready(job())
      if number > 1:
        seconds[name].append(time.perf_counter() - start)
  # The least: others use the core, too.
  least = {name: min(times) for name, times in seconds.items()}
  return {"elements": size, "seconds": least}


def show(found: dict[str, Any]) -> None:
  """Prints passes over the gradient that codecs take."""
  seconds = found["seconds"]
  one = seconds["pass"]
  print(
    f"\n{found['elements']:,} numbers, a pass {1e3 * one:.1f} ms; in passes: "
    f"encode, decode, both (asked {ASKED:g}), encode with error feedback"
  )
  for name in dict.fromkeys(x.rsplit(" ", 1)[0] for x in seconds):
    if name != "pass":
      take = lambda what, name=name: seconds[f"{name} {what}"] / one
      both = take("encode") + take("decode")
      print(
        f"{name:12} {take('encode'):6.2f} {take('decode'):6.2f} {both:6.2f} "
        f"{take('feedback'):6.2f}"
      )
