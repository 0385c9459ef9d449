r"""What dynamic attention finds: needles in noise, and a task of recall.

Needles: among random keys, some queries have one far key at a known cosine;
the hit rate is how often its block is chosen. Recall: a model of one attention
layer reads pairs of a name and a value, far more than its window holds, and
then answers for names drawn again. It is trained with full attention, run
sparse as it is, and trained on for a while as it will run.

  uv run experiments/benchmarks/attention_quality.py
"""

import argparse
import datetime
import functools
import json
import pathlib
from typing import Any

import harness_machine as machine
import jax
import jax.numpy as jnp
import numpy as np
import optax

from deepseek_jax import nn, optim

RESULTS = pathlib.Path(__file__).parents[1] / "results"
# Name to arguments of `choose_blocks`.
SEARCHES: dict[str, dict[str, Any]] = {
  "mean": {"selection": "mean"},
  "R2 b3": {"num_hashes": 2, "hash_bits": 3},
  "R4 b3": {"num_hashes": 4, "hash_bits": 3},
  "R4 b4": {"num_hashes": 4, "hash_bits": 4},
  "R8 b4": {"num_hashes": 8, "hash_bits": 4},
}
REGIONS = {"R4 b3, by region": {"two_level": True}}

# The task of recall.
NAMES, VALUES, ASKED = 128, 32, 32
WIDTH, HEADS = 64, 2
SPARSE: dict[str, Any] = {"block_size": 16, "window": 32, "num_remote": 4}
WAYS: dict[str, dict[str, Any]] = {
  "full": {"num_remote": 1_000},
  "dynamic": {},
  "window alone": {"selection": "none"},
}


def needles(time: int, count: int, cosine: float, seed: int = 0):
  """Returns queries, keys, seeking tokens and what each looks for."""
  rng = np.random.default_rng(seed)
  q, k = rng.normal(size=(2, 1, time, 1, 64)).astype(np.float32)
  seekers = rng.choice(np.arange(time // 4, time), count, replace=False)
  hidden = np.array([rng.integers(0, t - 256) for t in seekers])
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  key, other = unit(k[0, hidden, 0]), rng.normal(size=(count, 64))
  other = unit(other - (other * key).sum(1, keepdims=True) * key)
  q[0, seekers, 0] = 8 * (cosine * key + np.sqrt(1 - cosine**2) * other)
  return jnp.asarray(q), jnp.asarray(k), seekers, hidden


def hit_rate(time: int, count: int, cosine: float, search: dict) -> float:
  """Returns the share of needles whose block is among four chosen."""
  q, k, seekers, hidden = needles(time, count, cosine)
  choose = jax.jit(functools.partial(nn.choose_blocks, **search))
  ids = np.asarray(choose(q, k))[0, seekers, 0]
  return float(np.mean((ids == hidden[:, None] // 64).any(1)))


def sequences(key, batch: int) -> tuple[jax.Array, jax.Array]:
  """Returns tokens, and the values to answer at the last `ASKED` names."""
  names, values, asked = jax.random.split(key, 3)
  order = lambda k: jax.random.permutation(k, NAMES)
  names = jax.vmap(order)(jax.random.split(names, batch))
  values = jax.random.randint(values, names.shape, 0, VALUES)
  told = jnp.stack([names, NAMES + values], -1).reshape(batch, -1)
  pick = jax.vmap(order)(jax.random.split(asked, batch))[:, :ASKED]
  take = lambda x: jnp.take_along_axis(x, pick, 1)
  return jnp.concatenate([told, take(names)], 1), take(values)


def init(key):
  """Returns the parameters of the model."""
  keys = jax.random.split(key, 6)
  normal = jax.nn.initializers.lecun_normal()
  shapes = {
    "embed": (NAMES + VALUES, WIDTH), "q": (2 * WIDTH, WIDTH),
    "k": (2 * WIDTH, WIDTH), "v": (2 * WIDTH, WIDTH), "out": (WIDTH, WIDTH),
    "head": (WIDTH, VALUES),
  }  # fmt: skip
  return {
    name: normal(key, shape)
    for (name, shape), key in zip(shapes.items(), keys, strict=True)
  }


def answers(params, tokens, way: dict[str, Any]):
  """Returns logits of the values at the names that are asked."""
  x = params["embed"][tokens]
  before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  x = jnp.concatenate([x, before], -1)
  q, k, v = (
    (x @ params[name]).reshape(*tokens.shape, HEADS, -1) for name in "qkv"
  )
  read = nn.dynamic_attention(q, k, v, **SPARSE | way)
  read = read.reshape(*tokens.shape, WIDTH)[:, -ASKED:]
  return jax.nn.gelu(read @ params["out"]) @ params["head"]


def train(params, key, steps: int, way: dict[str, Any], rate: float):
  """Returns trained parameters."""
  tx = optim.deepseek(rate)

  def loss(params, tokens, values):
    logits = answers(params, tokens, way)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, values
    ).mean()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, key):
    value, grads = jax.value_and_grad(loss)(params, *sequences(key, 16))
    updates, state = tx.update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state

  params = jax.tree.map(jnp.copy, params)
  state = tx.init(params)
  for number in range(steps):
    params, state = step(params, state, jax.random.fold_in(key, number))
  return optim.averaged_params(state, params)


def accuracy(params, way: dict[str, Any]) -> float:
  """Returns the share of right answers on fresh sequences."""
  tokens, values = sequences(jax.random.key(999), 128)
  read = jax.jit(lambda params, tokens: answers(params, tokens, way))
  right = read(params, tokens).argmax(-1) == values
  return round(float(right.mean()), 4)


def recall(seed: int, steps: int, more: int) -> dict[str, float]:
  """Returns the accuracy of the ways to attend, for one seed."""
  start, first, then = jax.random.split(jax.random.key(seed), 3)
  full = train(init(start), first, steps, WAYS["full"], 1e-2)
  found = {f"{way}, as trained": accuracy(full, WAYS[way]) for way in WAYS}
  for way in ("dynamic", "window alone"):
    tuned = train(full, then, more, WAYS[way], 3e-3)
    found[f"{way}, trained on"] = accuracy(tuned, WAYS[way])
  return found


def main() -> None:
  """Measures all and writes the result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--needles", type=int, default=600, help="(600)")
  parser.add_argument(
    "--lengths", type=int, nargs="+", default=[2048, 8192, 32768]
  )
  parser.add_argument("--seeds", type=int, default=3, help="of recall (3)")
  parser.add_argument("--steps", type=int, default=600, help="(600)")
  parser.add_argument("--more", type=int, default=60, help="trained on (60)")
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
  flags = parser.parse_args()
  hits: dict[str, dict[str, float]] = {}
  for time in flags.lengths:
    for cosine in (0.9, 0.7):
      row = hits[f"{time:,} tokens, cosine {cosine}"] = {}
      for name, search in (SEARCHES | REGIONS).items():
        search = {"two_level": False} | search
        row[name] = round(hit_rate(time, flags.needles, cosine, search), 3)
      print(f"{time:6} tokens, cosine {cosine}: {row}", flush=True)
  found = []
  for seed in range(flags.seeds):
    found.append(recall(seed, flags.steps, flags.more))
    print(f"recall, seed {seed}: {found[-1]}", flush=True)
  result = {
    "name": "attention_quality",
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    "needles": flags.needles,
    "hit_rate": hits,
    "recall": found,
    "hardware": machine.hardware(),
    "versions": machine.versions(),
  }
  flags.results.mkdir(parents=True, exist_ok=True)
  path = flags.results / "attention_quality.json"
  path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
