"""What the package promises as a whole: imports, names, files, README."""

import importlib
import importlib.metadata
import inspect
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

import deepseek_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "deepseek_jax"
README = (ROOT / "README.md").read_text()
HEAVY = ["flax", "grain", "matplotlib", "orbax", "sklearn", "torch"]
HEAVY += ["tensorflow", "tensorflow_datasets", "tokenizers"]


def tracked_files() -> list[pathlib.Path]:
  """The files git knows; outside a checkout there is nothing to check."""
  git = ["git", "-C", str(ROOT), "ls-files", "-z"]
  listing = subprocess.run(git, capture_output=True, text=True, check=False)
  paths = [ROOT / name for name in listing.stdout.split("\0") if name]
  return [path for path in paths if path.is_file()]


def loaded_by(code: str) -> set[str]:
  """The top-level modules that a fresh interpreter holds after `code`."""
  code += "\nimport sys; print(*sys.modules)"
  run = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  return {name.split(".")[0] for name in run.stdout.split()}


def public_objects() -> list[tuple[str, object]]:
  objects = []
  for namespace in deepseek_jax.__all__:
    module = importlib.import_module(f"deepseek_jax.{namespace}")
    for name, value in vars(module).items():
      if not name.startswith("_") and not isinstance(value, types.ModuleType):
        objects.append((f"{namespace}.{name}", value))
  return objects


def test_import_loads_no_heavy_library():
  assert loaded_by("import deepseek_jax").isdisjoint(HEAVY)


def test_optim_loads_neither_flax_nor_the_trainers_libraries():
  loaded = loaded_by("import deepseek_jax; deepseek_jax.optim")
  assert loaded.isdisjoint(HEAVY)


def test_training_loads_no_deep_learning_framework_but_jax():
  code = "import deepseek_jax as dj; dj.data.load; dj.train.fit"
  assert loaded_by(code).isdisjoint({"tensorflow", "torch", "keras"})


def test_version_is_that_of_the_metadata():
  installed = importlib.metadata.version("deepseek-jax")
  assert deepseek_jax.__version__ == installed


def test_unknown_namespace_is_an_attribute_error():
  with pytest.raises(AttributeError, match="has no attribute 'optimisers'"):
    deepseek_jax.optimisers  # noqa: B018


def test_every_namespace_and_public_name_has_a_docstring():
  def documented(value: object) -> bool:
    text = inspect.getdoc(value) or ""
    # Dataclasses and named tuples without one are given their signature.
    is_made_up = text.startswith(f"{getattr(value, '__name__', '')}(")
    return len(text) > len(".") and not is_made_up

  described = [
    (name, value)
    for name, value in public_objects()
    if inspect.isclass(value) or inspect.isroutine(value)
  ]
  missing = [name for name, value in described if not documented(value)]
  assert not missing
  for namespace in deepseek_jax.__all__:
    module = importlib.import_module(f"deepseek_jax.{namespace}")
    assert documented(module), namespace


def test_no_file_of_the_package_is_above_400_lines():
  lengths = {
    str(path.relative_to(ROOT)): len(path.read_text().splitlines())
    for path in PACKAGE.rglob("*.py")
  }
  assert {path: n for path, n in lengths.items() if n > 400} == {}


def test_no_machine_path_or_package_host_is_tracked():
  # Spelled so that this file does not match itself.
  machine_path = r"""(?<![\w.$}])/(?:[t]mp|[w]ork|[r]oot|[h]ome/\w+)/"""
  host = r"pythonhoste[d]|p[y]pi\.org|registry\.n[p]mjs|deb\.debia[n]"
  pattern = re.compile(f"{machine_path}|{host}".encode())
  found = {
    str(path.relative_to(ROOT)): match.group().decode()
    for path in tracked_files()
    if (match := pattern.search(path.read_bytes()))
  }
  assert found == {}


def test_lock_file_is_not_tracked():
  # It names package hosts; requirements.txt holds the tested pins.
  assert "uv.lock" not in {path.name for path in tracked_files()}


def test_pins_are_hashed_and_cover_what_is_declared():
  text = (ROOT / "requirements.txt").read_text()
  pins = re.findall(r"^([\w.-]+)==\S+(.*(?:\n .*)*)", text, re.MULTILINE)
  assert all("--hash=sha256:" in rest for _, rest in pins)
  pinned = {re.sub(r"[-_.]+", "-", name).lower() for name, _ in pins}
  declared = importlib.metadata.requires("deepseek-jax") or []
  needed = {
    re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower()
    for line in declared
    if "extra ==" not in line
  }
  assert needed <= pinned


def test_ci_runs_the_test_command_of_the_readme():
  command = "uv run pytest"
  assert command in README
  assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def python_blocks() -> list[str]:
  return re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_first_python_block_of_the_readme_has_at_most_12_lines():
  lines = [line for line in python_blocks()[0].splitlines() if line.strip()]
  assert len(lines) <= 12


@pytest.mark.parametrize(
  "epochs",
  [
    pytest.param(r"\g<0>", id="as_printed", marks=pytest.mark.slow),
    pytest.param("epochs=1", id="one_epoch"),
  ],
)
@pytest.mark.parametrize(
  "index",
  [
    pytest.param(i, marks=() if i < 2 else pytest.mark.slow)
    for i in range(len(python_blocks()))
  ],
)
def test_python_block_of_the_readme_runs(index, epochs, tmp_path):
  code = re.sub(r"\bepochs=\d+", epochs, python_blocks()[index])
  fake_devices = {"JAX_NUM_CPU_DEVICES"}  # A reader has none.
  subprocess.run(
    [sys.executable, "-W", "error", "-c", code],
    cwd=tmp_path,
    env={k: v for k, v in os.environ.items() if k not in fake_devices},
    check=True,
  )


def test_tests_that_are_left_to_ci_exist():
  root = pathlib.Path(__file__).parents[1]
  lines = (root / "tests" / "slow.txt").read_text().splitlines()[1:]
  assert lines == sorted(set(lines))
  for line in lines:
    path, _, rest = line.partition("::")
    name = rest.partition("[")[0].rpartition("::")[2]
    assert f"def {name}(" in (root / path).read_text(), line
