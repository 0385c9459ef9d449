"""What pods would make of a 7B decoder and of a mixture, compiled for them.

Nobody pays for the pod: `parallel.preflight` compiles the trainer's own step
with the TPU's compiler (`pip install deepseek-jax[tpu]`) and reads from the
program what fits, what is computed and what travels.

    python experiments/benchmarks/pod.py --cases meshes
    python experiments/benchmarks/pod.py --cases scaling

* `meshes`: the decoder on v5p, 1,024 chips, on several meshes.
* `scaling`: the decoder from 8 to 1,024 chips, one row a chip.
* `experts`: a mixture of 64 experts on v5e, 256 chips; what its all_to_alls
  send, beside what they should by hand.

Each compilation runs in a process of its own and takes minutes. What other
cases have left in the results stays there. `--small` takes a tiny decoder to
fake CPU devices: to see that the script runs.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import harness_machine as machine
import pod_figure
import pod_model

from deepseek_jax.parallel import MeshSpec, preflight
from deepseek_jax.parallel.chips import CHIPS
from deepseek_jax.parallel.preflight_report import render, render_scaling
from deepseek_jax.parallel.topology import Topology, parse, scales

RESULTS = pathlib.Path(__file__).parents[1] / "results"
SMALL = pod_model.Dense(
  num_layers=2, features=64, num_heads=4, hidden=128, length=64
)
SMALL_MIXTURE = pod_model.Mixture(
  num_layers=2, features=64, num_heads=4, hidden=64, length=64, experts=8
)
_RECOMPUTED = pod_model.Dense(remat=True)
MESHES = {
  "fsdp 16": (pod_model.Dense(), MeshSpec(fsdp=16)),
  "fsdp 64": (pod_model.Dense(), MeshSpec(fsdp=64)),
  "fsdp 16, all recomputed": (_RECOMPUTED, MeshSpec(fsdp=16)),
  "fsdp 16, tensor 4": (pod_model.Dense(), MeshSpec(fsdp=16, tensor=4)),
}


def main() -> None:
  """Runs the cases that the flags name."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  known = {"meshes": meshes, "scaling": scaling, "experts": experts}
  parser.add_argument(
    "--cases", nargs="+", choices=known, default=list(known), help="all"
  )
  parser.add_argument(
    "--small", action="store_true", help="tiny sizes, fake CPU devices"
  )
  parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
  flags = parser.parse_args()
  for name in flags.cases:
    write(flags, name, known[name](flags))


def meshes(flags: argparse.Namespace) -> dict[str, Any]:
  """Returns reports of the decoder on all meshes of one topology."""
  found = {}
  for name, (size, spec) in MESHES.items():
    place = parse("v5p:8x8x16")
    if flags.small:
      size, place, spec = SMALL, parse("v5e:2x2"), MeshSpec(fsdp=2)
    report = compiled(flags, size, place, spec)
    print(f"\n{name}\n{render(report)}", flush=True)
    found[name] = plain(report, size)
  return found


def scaling(flags: argparse.Namespace) -> dict[str, Any]:
  """Returns reports of the decoder on ever more chips."""
  size = SMALL if flags.small else pod_model.Dense()
  chip, most = ("v5e", 8) if flags.small else ("v5p", 1024)
  fewest = 4 if flags.small else 8
  reports = []
  for place in scales(CHIPS[chip], fewest, most):
    # As much of it in parts as two of the torus' dimensions have.
    spec = MeshSpec(fsdp=min(16, place.num_chips // 2))
    reports.append(compiled(flags, size, place, spec))
    print(f"\n{render(reports[-1])}", flush=True)
  print(render_scaling(reports))
  kept = {
    x: preflight.scaling_efficiency(reports, overlapped=x == "overlapped")
    for x in ("overlapped", "apart")
  }
  return {
    f"{report.num_devices}": plain(report, size)
    | {"efficiency": {x: kept[x][report.num_devices] for x in kept}}
    for report in reports
  }


def experts(flags: argparse.Namespace) -> dict[str, Any]:
  """Returns the report of the mixture, and what its experts' tokens send."""
  size, place = pod_model.Mixture(), parse("v5e:16x16")
  spec = MeshSpec(fsdp=16, expert=16)
  if flags.small:
    size, place, spec = SMALL_MIXTURE, parse("v5e:2x2"), MeshSpec(expert=4)
  report = compiled(flags, size, place, spec)
  swapped = {
    "by_hand": size.swapped(spec.resolve(place.num_devices)),
    "in_the_program": sum(
      x.sent
      for x in (report.roofline.collectives if report.roofline else ())
      if x.kind == "all-to-all" and x.place == "expert"
    ),
  }
  print(f"\n{size.num_params:,} parameters\n{render(report)}\n{swapped}")
  name = f"{size.experts} experts"
  return {name: plain(report, size) | {"all_to_all_bytes": swapped}}


def compiled(
  flags: argparse.Namespace,
  size: pod_model.Dense,
  place: Topology,
  spec: MeshSpec,
) -> preflight.Report:
  """Returns a report from a process of its own, which politely waits."""
  spawn = multiprocessing.get_context("spawn")
  compiler = "cpu" if flags.small else "tpu"
  with concurrent.futures.ProcessPoolExecutor(
    1, spawn, initializer=os.nice, initargs=(10,)
  ) as pool:
    return pool.submit(_compiled, size, place, spec, compiler).result()


def _compiled(
  size: pod_model.Dense,
  place: Topology,
  spec: MeshSpec,
  compiler: preflight.Compiler,
) -> preflight.Report:
  return preflight.run(
    pod_model.builder(size),
    place,
    spec,
    model_flops=size.flops,
    compiler=compiler,
  )


def plain(report: preflight.Report, size: pod_model.Dense) -> dict[str, Any]:
  """Returns a report as JSON, with what it adds up to."""
  found = report.roofline
  model = dataclasses.asdict(size) | {"num_params": size.num_params}
  row = {"model": model} | dataclasses.asdict(report)
  row["fits"], row["memory_total"] = report.fits, report.memory.total
  if found is not None:
    row["seconds"] = {"overlapped": found.overlapped, "apart": found.apart}
    row["share_of_peak"] = {
      "overlapped": found.utilization(overlapped=True),
      "apart": found.utilization(overlapped=False),
    }
    row["limit"] = found.limit
  return row


def write(
  flags: argparse.Namespace, name: str, found: Mapping[str, Any]
) -> None:
  """Writes a case beside those that are there."""
  flags.results.mkdir(parents=True, exist_ok=True)
  path = flags.results / "pod.json"
  result = json.loads(path.read_text()) if path.exists() else {"cases": {}}
  result["name"] = "pod"
  result["cases"][name] = {
    "command": machine.command(),
    "date": datetime.date.today().isoformat(),
    "versions": machine.versions(("jax", "flax", "optax", "libtpu")),
    "reports": found,
  }
  path.write_text(json.dumps(result, indent=1) + "\n")
  pod_figure.draw(result["cases"], flags.results / "pod.svg")


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  main()
