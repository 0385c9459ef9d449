"""What moments in int8 or bfloat16 do to the final loss.

AdamW with a cosine to zero, on workloads of the optimizer benchmark: the same
start and the same batches, only the storage of the moments differs. Prints the
final validation loss and its ratio to float32, seed by seed.

  uv run experiments/benchmarks/compact_loss.py --seeds 5
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
import workloads
from harness_figure import Spread

from deepseek_jax.optim.compact import bytes_per_parameter, compact_moments

RESULTS = pathlib.Path(__file__).parents[1] / "results"
RATES = {"byte_lm": 5e-3, "digits_mlp": 3e-3}
STORAGE = ("float32", "bfloat16", "int8")


def optimizer(storage: Any, rate: float, steps: int) -> Any:
  """AdamW with its moments stored one way."""
  moments = optax.scale_by_adam()
  if storage != "float32":
    moments = compact_moments(moments, storage)
  schedule = optax.cosine_decay_schedule(rate, steps)
  decay = optax.add_decayed_weights(1e-2)
  return optax.chain(moments, decay, optax.scale_by_learning_rate(schedule))


def trainer(workload: workloads.Workload, tx: Any) -> Any:
  """Returns a jitted run from parameters and all batches to a loss."""

  def step(carry, batch):
    params, state = carry
    grads = jax.grad(workload.loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(params, batches):
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
    return workload.validation_loss(params)

  return run


@functools.cache
def batches(workload: workloads.Workload, seed: int, steps: int) -> Any:
  """All batches of a run, stacked."""
  found = [workload.batch(seed, step) for step in range(steps)]
  return jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *found)


def losses(name: str, steps: int | None, seeds: int) -> dict[str, Any]:
  """Trains one workload in every storage; the baseline comes first."""
  workload = workloads.load(name)
  steps = steps or workload.steps
  rows: dict[str, Any] = {}
  for storage in STORAGE:
    tx = optimizer(storage, RATES[name], steps)
    run = trainer(workload, tx)
    found = [
      float(run(workload.init(seed), batches(workload, seed, steps)))
      for seed in range(seeds)
    ]
    base = rows["float32"]["losses"] if rows else found
    ratios = np.divide(found, base)
    params = jax.eval_shape(lambda: workload.init(0))
    held = bytes_per_parameter(jax.eval_shape(tx.init, params), params)
    rows[storage] = {
      "losses": found,
      "mean_ratio": float(np.mean(found) / np.mean(base)),
      "ratio": vars(Spread.of(ratios.tolist())),
      "state_bytes_per_parameter": round(held, 3),
    }
    print(
      f"{name:8} {storage:9} loss {np.mean(found):.4f}  x float32 "
      f"{rows[storage]['mean_ratio']:.4f} (seeds {np.round(ratios, 4)})  "
      f"{held:.2f} bytes / parameter",
      flush=True,
    )
  return rows


def main() -> None:
  """Trains all and writes the result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seeds", type=int, default=5, help="how many (5)")
  parser.add_argument("--steps", type=int, help="rather than the workload's")
  parser.add_argument(
    "--workloads", nargs="+", choices=RATES, default=list(RATES)
  )
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
  flags = parser.parse_args()
  result = {
    "name": "compact_loss",
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    "seeds": list(range(flags.seeds)),
    "rates": RATES,
    "final_validation_loss": {
      name: losses(name, flags.steps, flags.seeds) for name in flags.workloads
    },
    "hardware": machine.hardware(),
    "versions": machine.versions(),
  }
  flags.results.mkdir(parents=True, exist_ok=True)
  path = flags.results / "compact_loss.json"
  path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  main()
