"""Every notebook runs from its first cell to its last, at a tiny size.

Two tags of a cell steer that. `skip-execution` marks the cell that installs,
which has nothing to do here. `parameters` marks the cell that sets the sizes;
the values of `TINY` that it names are set again after it.
"""

import ast
import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted(pathlib.Path(__file__).parents[1].glob("colab/*.ipynb"))
TINY = {"epochs": 1, "steps": 4, "seeds": 1, "lengths": (128, 256)}
# Kept as executed, for those who read before they run.
WITH_OUTPUTS = {"03_long_context", "05_sharding", "06_gradient_exchange"}
MOST_BYTES = 400_000


def tags(cell) -> list[str]:
  return cell.metadata.get("tags", [])


def assigned(source: str) -> set[str]:
  """The names that the source of a cell assigns at its top level."""
  targets = [
    target
    for node in ast.parse(source).body
    if isinstance(node, ast.Assign)
    for target in node.targets
  ]
  return {target.id for target in targets if isinstance(target, ast.Name)}


def shrink(notebook: nbformat.NotebookNode) -> None:
  """Sets the sizes of `TINY` after the cells tagged `parameters`."""
  for cell in notebook.cells:
    if "parameters" in tags(cell):
      names = assigned(cell.source) & TINY.keys()
      lines = [f"{name} = {TINY[name]!r}" for name in sorted(names)]
      cell.source = "\n".join([cell.source, *lines])


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
  return nbformat.read(request.param, as_version=4)


@pytest.mark.parametrize(
  "notebook",
  [path for path in NOTEBOOKS if path.stem not in WITH_OUTPUTS],
  ids=lambda path: path.stem,
  indirect=True,
)
def test_notebook_stores_no_output(notebook):
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert cells
  assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.parametrize("name", sorted(WITH_OUTPUTS))
def test_stored_outputs_are_those_of_one_clean_run(name):
  path = next(path for path in NOTEBOOKS if path.stem == name)
  assert path.stat().st_size < MOST_BYTES
  notebook = nbformat.read(path, as_version=4)
  cells = [
    cell
    for cell in notebook.cells
    if cell.cell_type == "code" and "skip-execution" not in tags(cell)
  ]
  counts = [cell.execution_count for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  assert any("image/png" in output.get("data", {}) for output in outputs)
  for output in outputs:
    assert output.output_type != "error"
    assert output.get("name") != "stderr", output.text


def test_only_the_first_code_cell_is_left_out(notebook):
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert not any("skip-execution" in tags(cell) for cell in cells[1:])


@pytest.mark.slow  # Dozens of programs to compile, which no size makes fast.
def test_notebook_runs(notebook, tmp_path, monkeypatch):
  # As in Colab, the kernel sees one device.
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
  shrink(notebook)
  # Not by PYTHONWARNINGS: the kernel itself warns while it starts.
  strict = "import warnings\nwarnings.simplefilter('error')"
  notebook.cells.insert(0, nbformat.v4.new_code_cell(strict))
  nbclient.NotebookClient(
    notebook,
    timeout=280,
    kernel_name="python3",
    resources={"metadata": {"path": str(tmp_path)}},
  ).execute()
