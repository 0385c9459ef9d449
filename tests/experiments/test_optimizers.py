"""The optimizer benchmark, whole and at tiny size."""

import importlib
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

_FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"
_WORKLOAD = '''
"""A noisy parabola."""

import jax
import jax.numpy as jnp
import numpy as np

from workloads import Workload


def batch(seed, step):
  return np.random.default_rng((seed, step)).normal(1, 0.1, 4).astype("f4")


def loss(params, batch):
  return jnp.mean(jnp.square(params["layer"]["kernel"] - batch))


WORKLOAD = Workload(
  name="parabola",
  steps=40,
  init=lambda s: {"layer": {"kernel": jax.random.normal(jax.random.key(s), 4)}},
  batch=batch,
  loss=loss,
  validation_loss=lambda params: loss(params, np.ones(4, "f4")),
)
'''.replace("jax.random.key(s), 4)", "jax.random.key(s), (4,))")
_CANDIDATES = """
import optax
from optimizer_candidates import Candidate, by_rate

def adamw(setting, total_steps):
  return optax.adam(setting["rate"])

CANDIDATES = {
  "adamw": Candidate(
    make=adamw, grid=({"rate": 0.03}, {"rate": 0.1}), default={"rate": 0.1}
  ),
  "peer": by_rate(optax.sgd, (0.1, 1.0), default=0.1),
  "deepseek": by_rate(optax.adam, (0.1, 0.3), default=0.3, tuned=False),
  "bursting": by_rate(lambda rate: optax.sgd(1e30 * rate), (1.0,), default=1.0),
}
"""


@pytest.fixture
def module(monkeypatch):
  """Finds a module as a benchmark script beside it finds it."""
  monkeypatch.syspath_prepend(_FOLDER)
  return importlib.import_module


@pytest.fixture
def places(module, tmp_path):
  """A folder with one workload, and a file of candidates."""
  folder = tmp_path / "workloads"
  folder.mkdir()
  (folder / "parabola.py").write_text(_WORKLOAD)
  (tmp_path / "candidates.py").write_text(_CANDIDATES)
  return module("optimizer_runs").Places(
    tmp_path / "results" / "optimizers_runs.jsonl",
    folder,
    tmp_path / "candidates.py",
  )


@pytest.fixture
def command(module, places, monkeypatch):
  """Runs a command of the script in this process."""
  script = module("optimizers")
  monkeypatch.setenv("XLA_FLAGS", "")

  def run(name, *flags):
    words = ["optimizers.py", name, "--jobs=0", "--scoring", "100", "101"]
    words += ["--development", "0", "1"]
    words += [f"--workload-folder={places.workloads}"]
    words += [f"--candidate-file={places.candidates}"]
    words += [f"--results={places.runs.parent}", *flags]
    monkeypatch.setattr("sys.argv", words)
    script.main()

  return run


@pytest.fixture
def counted(module, monkeypatch):
  """The keys of the runs that were made, in their order."""
  runs, keys = module("optimizer_runs"), []

  def perform(task, places, perform=runs.perform):
    keys.append(task.key)
    return perform(task, places)

  monkeypatch.setattr(runs, "perform", perform)
  return keys


def test_from_tuning_to_the_figure(command, places, counted, capsys):
  folder = places.runs.parent
  command("tune", "--keep", "1")
  frozen = json.loads((folder / "optimizers_targets.json").read_text())
  targets = frozen["targets"]["parabola"]
  assert targets["tight"]["loss"] < targets["middle"]["loss"]
  assert targets["middle"]["setting"] == {"rate": pytest.approx(0.1)}
  command("tune", "--candidates", "peer")
  command("run", "--candidates", "deepseek")
  command("run", "--candidates", "peer", "--settings=best")
  command("run", "--candidates=deepseek", "--settings=grid", "--seeds=0")
  made = len(counted)
  command("compare", "--candidates", "deepseek", "peer", "--seeds", "0")
  assert "deepseek rate=0.3" in capsys.readouterr().out
  command("time", "--candidates", "deepseek", "--scales", "1")
  command("report")
  result = json.loads((folder / "optimizers.json").read_text())
  ratio = {
    name: result["candidates"][name]["cells"]["parabola/middle"]["ratio"]
    for name in ("adamw", "deepseek", "peer")
  }
  assert ratio["adamw"] == 1
  assert ratio["deepseek"] < 1
  assert result["settings_tried"] == {"adamw": 2, "deepseek": 2, "peer": 2}
  assert result["times"]["parabola"]["scales"]["1"]["adamw"]["ratio"] == 1
  assert result["wall"]["parabola"]["adamw"]["middle"] == 1
  assert result["rates"]["deepseek"]["parabola"]["rates"] == [0.1, 0.3]
  assert (folder / "optimizers.svg").read_text().count("<svg") == 1
  assert str(folder) not in (folder / "optimizers.json").read_text()
  assert len(counted) == made == len(set(counted))  # The rest only read.


def test_a_killed_benchmark_goes_on_where_it_was(module, places, counted):
  runs = module("optimizer_runs")
  tasks = [
    runs.Task.of("parabola", "adamw", {"rate": rate}, seed)
    for rate in (0.1, 0.2)
    for seed in (0, 1)
  ]
  before = runs.ensure(tasks, places, jobs=0)
  assert counted == [task.key for task in tasks]
  lines = places.runs.read_text().splitlines()
  torn = [*lines[:2], lines[2][:40]]
  places.runs.write_text("\n".join(torn))
  after = runs.ensure(tasks, places, jobs=0)
  assert counted[4:] == [task.key for task in tasks[2:]]
  for key, record in before.items():
    assert after[key]["losses"] == record["losses"]
  assert runs.read(places.runs) == after


def test_one_compilation_serves_all_settings_and_seeds(module, places):
  trainer = module("optimizer_runs").trainer("parabola", "adamw", places)
  losses = [
    trainer.run({"rate": rate}, seed)["losses"]
    for rate in (0.1, 0.2)
    for seed in (0, 1)
  ]
  assert all(a != b for a, b in itertools.combinations(losses, 2))
  assert trainer._step._cache_size() == 1


def test_what_diverges_ends_and_reaches_nothing(module, places):
  runs, scores = module("optimizer_runs"), module("optimizer_scores")
  task = runs.Task.of("parabola", "bursting", {"rate": 1.0}, 0)
  record = runs.ensure([task], places, jobs=0)[task.key]
  assert not record["finite"]
  assert math.isinf(scores.steps_to(record, 1.0))
  assert runs.read(places.runs)[task.key] == record


@pytest.mark.slow
def test_a_worker_process_finds_the_same_losses(module, places):
  runs = module("optimizer_runs")
  task = runs.Task.of("parabola", "adamw", {"rate": 0.1}, 0)
  here = runs.perform(task, places)
  there = runs.ensure([task], places, jobs=2)[task.key]
  np.testing.assert_allclose(there["losses"], here["losses"], rtol=1e-5)


def test_unknown_names_are_told_those_there_are(module, places):
  with pytest.raises(ValueError, match="one of parabola, got name='nothing'"):
    module("workloads").load("nothing", places.workloads)
  with pytest.raises(ValueError, match=r"muon.*got name='nothing'"):
    module("optimizer_candidates").find("nothing")


def _record(losses, seed=0, name="adamw", rate=0.1):
  return {
    "workload": "w",
    "candidate": name,
    "setting": {"rate": rate},
    "seed": seed,
    "losses": losses,
    "steps": 10 * len(losses),
  }


def test_a_target_is_what_the_best_median_reaches_in_time(module):
  scores = module("optimizer_scores")
  curves = {
    0.1: [[9, 4, 3, 2.0], [9, 5, 3, 1.0], [9, 9, 3, 3.0]],  # Medians 5 and 3.
    0.2: [[9, 3, 3, 3.5], [9, 7, 3, 3.5], [9, 7, 3, 3.5]],  # 7 and 3.
  }
  runs = {
    f"{rate}@{seed}": _record(losses, seed, rate=rate)
    for rate, rows in curves.items()
    for seed, losses in enumerate(rows)
  }
  targets = scores.targets_of(runs, "w", 40, (0, 1, 2))
  assert targets["middle"].loss == 5
  assert targets["middle"].setting == {"rate": 0.1}
  assert targets["tight"].loss == 3
  records = [runs[f"0.1@{seed}"] for seed in (0, 1, 2)]
  assert scores.median_steps(records, 5) == 20
  with pytest.raises(ValueError, match="tune it first, got none"):
    scores.targets_of(runs, "w", 40, (0, 7))


def test_the_profile_is_one_for_the_fastest_and_falls_with_steps(module):
  summary, scores = module("optimizer_summary"), module("optimizer_scores")
  target = scores.Target(1.0, {}, 40)
  targets = {"a": {"middle": target}, "b": {"middle": target}}
  steps = {"first": 10, "twice": 20, "never": None}
  cells = {
    name: {f"{w}/middle": {"median_steps": count} for w in targets}
    for name, count in steps.items()
  }
  found = summary.profile(cells, targets)["scores"]
  assert found["first"] == 1
  assert found["twice"] == pytest.approx(2 / 3, abs=0.01)
  assert found["never"] == 0


def test_decades_end_at_the_first_bad_rate(module):
  summary = module("optimizer_summary")
  steps = [50, 400, 90, 50, 100, 101, math.inf]
  rates = [10.0**-i for i in range(7, 0, -1)]
  curve = [(r, s, 0.0) for r, s in zip(rates, steps, strict=True)]
  # From the first 50 on its own, as the better of two equals.
  assert summary.decades(curve) == 0
  assert summary.decades(curve[1:]) == pytest.approx(2)
  assert summary.decades([(0.1, math.inf, 0.0)]) == 0


@pytest.mark.parametrize(
  "name", sorted(path.stem for path in (_FOLDER / "workloads").glob("[!_]*.py"))
)
def test_workloads_are_fixed_by_the_seed(module, name):
  workload = module("workloads").load(name)
  params = jax.eval_shape(lambda: workload.init(0))
  paths = jax.tree_util.tree_leaves_with_path(params)
  assert all(
    isinstance(key, jax.tree_util.DictKey) for path, _ in paths for key in path
  )
  batch = workload.batch(0, 3)
  assert _equal(batch, workload.batch(0, 3))
  assert not _equal(batch, workload.batch(1, 3))
  assert not _equal(batch, workload.batch(0, 4))
  assert jax.eval_shape(workload.loss, params, batch).shape == ()
  assert jax.eval_shape(workload.validation_loss, params).shape == ()


def _equal(one, other):
  return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_text_validated_on_is_not_trained_on(module):
  text = module("workloads").imported(_FOLDER / "workloads" / "byte_lm.py")
  assert not set(text._TRAIN.split()) & set(text._VALIDATION.split())


def test_candidates_take_traced_settings(module):
  params = {
    "layers": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    "head": {"kernel": jnp.ones((3, 2))},
  }

  for name, candidate in module("optimizer_candidates").CANDIDATES.items():
    assert all(set(s) == set(candidate.default) for s in candidate.grid), name

    def step(setting, candidate=candidate):
      tx = optax.with_extra_args_support(candidate.make(setting, 40))
      state, value = tx.init(params), jnp.float32(1.0)
      updates, state = tx.update(params, state, params, value=value)
      return updates, candidate.evaluate_at(state, params)

    numbers = {k: np.float32(v) for k, v in candidate.default.items()}
    updates, evaluated = jax.eval_shape(step, numbers)
    for tree in (updates, evaluated):
      assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, params)
