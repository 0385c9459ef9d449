import html.parser
import json
import pathlib
import re

import numpy as np
import pytest

from deepseek_jax.train.report import write_report
from deepseek_jax.train.report.run import read_run

_LAYERS = ("convolution/0/kernel", "convolution/0/bias", "head/kernel")


class _Elements(html.parser.HTMLParser):
  """Elements, attributes and text of a page, as a browser sees them."""

  def __init__(self, page: str):
    super().__init__()
    self.tags, self.attributes, self.text = [], [], ""
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_data(self, data):
    self.text += data + " "


def _rows(steps: int = 12) -> list[dict]:
  rows = []
  for step in range(1, steps + 1):
    rates = dict.fromkeys(_LAYERS, 0.1 / step) | {"head/kernel": 0.2 / step}
    row = {"step": step, "train/loss": 2 / step, "train/accuracy": 1 - 1 / step}
    rows.append(row | {"learning_rate": rates, "steps_per_second": 70.0})
  rows.append({"step": steps, "validation/loss": 0.4})
  return rows


def _write_lines(folder: pathlib.Path, rows: list[dict]) -> None:
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "metrics.jsonl").write_text(lines)


def _write_predictions(folder, *, classes=3, examples=60, **changes) -> None:
  rng = np.random.default_rng(0)
  labels = np.arange(examples) % classes
  logits = rng.normal(size=(examples, classes)).astype(np.float32)
  worst = np.flatnonzero(logits.argmax(1) != labels)[:24]
  arrays = {
    "labels": labels,
    "logits": logits,
    "index": np.arange(examples),
    "worst": worst,
    "worst_images": rng.random((len(worst), 8, 8, 1), np.float32),
  }
  np.savez(folder / "predictions.npz", **(arrays | changes))


@pytest.fixture
def run(tmp_path) -> pathlib.Path:
  """A finished classification run."""
  label = {"kind": "label", "class_names": ["cat", "dog", "newt"]}
  description = {
    "format": 1,
    "versions": {"jax": "1.2.3"},
    "arguments": {"epochs": 3},
    "config": {"model": {"width": [8, 16]}},
    "schema": {"name": "pets", "features": {"label": label}, "target": "label"},
    "parameters": [
      {"path": path, "shape": [3, 4], "dtype": "float32"} for path in _LAYERS
    ],
    "environment": {"cpu_count": 2},
  }
  result = {
    "metrics": {"test/accuracy": 0.8125, "test/loss": 0.4321},
    "best_step": 9,
    "steps": 12,
    "ended_by": "early stopping",
    "wall_seconds": 61.5,
    "peak_memory_bytes": 2**30,
    "complete": True,
  }
  folder = tmp_path / "pets_run"
  folder.mkdir()
  (folder / "run.json").write_text(json.dumps(description))
  (folder / "result.json").write_text(json.dumps(result))
  _write_lines(folder, _rows())
  _write_predictions(folder)
  return folder


def _edit(path: pathlib.Path, change) -> None:
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def _name_classes(run: pathlib.Path, names: list[str]) -> None:
  def change(content):
    content["schema"]["features"]["label"]["class_names"] = names

  _edit(run / "run.json", change)


def _report(run: pathlib.Path) -> str:
  return write_report(run).read_text(encoding="utf-8")


def test_page_tells_the_result(run):
  text = _Elements(_report(run)).text
  for fact in ("81.2", "0.4321", "61.5 s", "1 GiB", "36", "early stopping"):
    assert fact in text
  for part in ("newt", "convolution/0/kernel", "model.width", "jax", "pets"):
    assert part in text


def test_equal_runs_give_equal_bytes(run, tmp_path):
  first = write_report(run).read_bytes()
  assert write_report(run).read_bytes() == first
  twin = tmp_path / "twin" / run.name
  twin.mkdir(parents=True)
  for path in run.iterdir():
    if path.name != "report.html":
      (twin / path.name).write_bytes(path.read_bytes())
  assert write_report(twin).read_bytes() == first


def test_users_matplotlib_settings_do_not_enter(run):
  import matplotlib

  plain = _report(run)
  with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path"}):
    assert _report(run) == plain
    assert matplotlib.rcParams["lines.linewidth"] == 9


@pytest.mark.parametrize(
  "hostile",
  [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</svg></style><b>",
    "$\\frac$ & \x00\x1b\ud800 \U0001f98e",
  ],
)
def test_no_text_becomes_markup(run, hostile):
  plain = _Elements(_report(run))

  def change(content):
    content["schema"]["name"] = hostile
    content["config"] = {hostile: hostile}
    content["parameters"][0]["path"] = hostile
    content["parameters"][0]["dtype"] = hostile

  _edit(run / "run.json", change)
  _name_classes(run, [hostile, "dog", "newt"])
  rows = [{hostile: 1.0, f"train/{hostile}": 1.0, **row} for row in _rows()]
  for row in rows:
    row["learning_rate"] = {hostile: 0.1, "b": 0.2}
  _write_lines(run, rows)
  _edit(run / "result.json", lambda c: c.update(ended_by=hostile))
  found = _Elements(_report(run))
  assert set(found.tags) == set(plain.tags)
  known = {key for key, _ in plain.attributes}
  assert {key for key, _ in found.attributes} <= known


def test_page_loads_nothing_from_elsewhere(run):
  page = _report(run)
  found = _Elements(page)
  assert {"script", "link", "iframe", "object"}.isdisjoint(found.tags)
  loads = [v for k, v in found.attributes if k in ("src", "href", "xlink:href")]
  assert all(
    value.startswith(("data:image/png;base64,", "#")) for value in loads
  )
  assert not re.search(r"https?://|@import|url\((?!#)", page)


def test_ids_are_unique_and_every_reference_resolves(run):
  found = _Elements(_report(run)).attributes
  ids = [value for key, value in found if key == "id"]
  assert len(set(ids)) == len(ids)
  links = [value for key, value in found if key == "href"]
  used = [link[1:] for link in links if link.startswith("#")]
  used += [value[5:-1] for key, value in found if key == "clip-path"]
  assert set(used) <= set(ids)
  assert used


@pytest.mark.parametrize(
  ("absent", "told"),
  [
    ("result.json", "has not ended"),
    ("metrics.jsonl", "Nothing was logged"),
    ("predictions.npz", "81.2"),
  ],
)
def test_each_file_but_run_json_may_be_absent(run, absent, told):
  (run / absent).unlink()
  assert told in _report(run)


def test_run_that_just_began_has_a_report(tmp_path):
  (tmp_path / "run.json").write_text('{"format": 1}')
  assert "unfinished" in _report(tmp_path)


def test_cut_run_says_so(run):
  cut = {"ended_by": "signal SIGTERM", "complete": False}
  _edit(run / "result.json", lambda content: content.update(cut))
  assert "start it again" in _report(run)


def test_torn_last_line_is_left_out(run):
  whole = _report(run)
  with (run / "metrics.jsonl").open("a") as file:
    file.write('{"step": 13, "train/lo')
  assert _report(run) == whole


def test_lines_logged_again_after_a_resume_replace_the_earlier(run):
  whole = read_run(run).metrics
  again = [row | {"train/loss": 9.0} for row in _rows()[4:9]]
  _write_lines(run, [*_rows()[:4], *again, *_rows()[4:]])
  for key, series in read_run(run).metrics.items():
    np.testing.assert_array_equal(series.steps, whole[key].steps)
    np.testing.assert_array_equal(series.values, whole[key].values)


def test_non_finite_values_are_gaps_and_are_counted(run):
  rows = _rows()
  rows[3]["train/loss"] = rows[4]["train/loss"] = None
  _write_lines(run, rows)
  assert "2 not finite" in _report(run)
  for row in rows:
    row["train/loss"] = None
  _write_lines(run, rows)
  assert "12 not finite" in _report(run)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_confusion_matrix_of_few_and_many_classes(run, classes):
  names = [f"species {i}" for i in range(classes)]
  _name_classes(run, names)
  _write_predictions(run, classes=classes, examples=4 * classes)
  page = _report(run)
  assert all(f">{name}<" in page for name in names)
  assert len(page) < 300_000


def test_class_measures_are_those_of_scikit_learn(run):
  from sklearn import metrics

  answers = read_run(run).predictions
  expected = metrics.precision_recall_fscore_support(
    answers.labels, answers.logits.argmax(1)
  )
  text = re.sub(r"<[^>]*>", " ", _report(run))
  for name, row in zip(
    ("cat", "dog", "newt"), zip(*expected, strict=True), strict=True
  ):
    *shares, count = row
    cells = r"\s+".join([name, str(count), *(f"{s:.3f}" for s in shares)])
    assert re.search(cells, text)


def test_without_mistakes_the_least_sure_are_shown(run):
  labels = np.arange(60) % 3
  _write_predictions(
    run,
    logits=np.eye(3, dtype=np.float32)[labels],
    worst=np.arange(2),
    worst_images=np.zeros((2, 8, 8, 3), np.float32),
  )
  page = _report(run)
  assert "Least sure" in page
  assert "Worst mistakes" not in page


def test_a_count_that_stayed_zero_has_no_curve(run):
  rows = [row | {"train/skipped": 0} for row in _rows()]
  _write_lines(run, rows)
  assert "Skipped" not in _report(run)
  rows[3]["train/skipped"] = 1
  _write_lines(run, rows)
  assert "Skipped" in _report(run)


def test_right_answers_are_no_worst_mistakes(run):
  labels = np.arange(60) % 3
  guesses = labels.copy()
  guesses[7] = 0  # The only mistake: 7 % 3 is 1.
  _write_predictions(
    run,
    logits=np.eye(3, dtype=np.float32)[guesses],
    worst=np.array([7, 4]),
    worst_images=np.zeros((2, 8, 8, 1), np.float32),
  )
  page = _report(run)
  assert "example 7" in page
  assert "example 4" not in page


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 2)])
def test_regression_shows_values_and_no_classes(run, shape):
  true = np.linspace(0, 9, np.prod(shape)).reshape(shape).astype(np.float32)
  worst = np.arange(3)
  images = np.zeros((3, 300, 200, 3), np.float32)
  arrays = {"labels": true, "logits": true, "worst": worst}
  _write_predictions(run, examples=50, worst_images=images, **arrays)
  page = _report(run)
  assert "Predicted against true" in page
  assert "Confusion" not in page
  assert "1.0000" in page  # R²


def test_non_finite_logits_are_told(run):
  logits = np.full((60, 3), np.nan, np.float32)
  _write_predictions(run, logits=logits)
  assert "60 predictions were not finite" in _report(run)


def _not_json(run):
  (run / "result.json").write_text("{")


def _damaged_line(run):
  lines = (run / "metrics.jsonl").read_text().split("\n")
  lines[4] = lines[4][:20]
  (run / "metrics.jsonl").write_text("\n".join(lines))


def _line_without_step(run):
  _write_lines(run, [{"train/loss": 1.0}])


def _newer_format(run):
  _edit(run / "run.json", lambda content: content.update(format=2))


def _no_shape(run):
  _edit(run / "run.json", lambda content: content["parameters"][1].pop("shape"))


def _torn_archive(run):
  content = (run / "predictions.npz").read_bytes()
  (run / "predictions.npz").write_bytes(content[:300])


def _pickled(run):
  _write_predictions(run, labels=np.array([{}] * 60, dtype=object))


def _label_out_of_range(run):
  _write_predictions(run, labels=np.full(60, 3))


def _no_run(run):
  (run / "run.json").unlink()


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (_no_run, "workdir must be a run directory"),
    (_not_json, r"result\.json must be readable JSON"),
    (_damaged_line, r"metrics\.jsonl line 5 must"),
    (_line_without_step, r"metrics\.jsonl line 1 must"),
    (_newer_format, "format=2.* newer"),
    (_no_shape, r"parameters\[1\]"),
    (_torn_archive, r"predictions\.npz must be readable"),
    (_pickled, r"predictions\.npz.*allow_pickle=False"),
    (_label_out_of_range, r"labels must be in \[0, 3\), got 3\.\.3"),
  ],
)
def test_damage_is_named_and_the_old_report_kept(run, damage, message):
  before = write_report(run).read_bytes()
  damage(run)
  with pytest.raises(ValueError, match=message):
    write_report(run)
  assert (run / "report.html").read_bytes() == before
  assert not list(run.glob(".report*"))


def test_long_runs_give_small_pages(run):
  rng = np.random.default_rng(0)
  rows = [
    {
      "step": step,
      "train/loss": rng.random(),
      "learning_rate": {f"blocks/{i}": (i + 1) / step for i in range(20)},
    }
    for step in range(1, 10_001)
  ]
  _write_lines(run, rows)
  page = _report(run)
  assert len(page) < 500_000
