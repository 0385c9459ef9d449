"""The report's pages on the test split: what the model gets right and wrong."""

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np

from deepseek_jax.train.report import figures
from deepseek_jax.train.report import html as page
from deepseek_jax.train.report.run import Predictions, Run

_ALL_CLASSES = 25  # More are sorted by difficulty, and all but these folded:
_HARDEST_CLASSES = 15
_SHOWN_PAIRS = 10
_PICTURE = 96  # Pixels of the longer side: two dozen stay below a megabyte.


def sections(run: Run) -> str:
  """All that `predictions.npz` tells, as HTML; nothing without one."""
  if run.predictions is None:
    return ""
  if run.predictions.is_regression:
    return _regression(run.predictions)
  return _classification(run.predictions, run.class_names)


def probabilities(logits: np.ndarray) -> np.ndarray:
  """Softmax over the last axis."""
  shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return shifted / shifted.sum(axis=-1, keepdims=True)


def _classification(answers: Predictions, names: list[str]) -> str:
  classes = answers.logits.shape[1]
  names = names[:classes] + [str(i) for i in range(len(names), classes)]
  predicted = answers.logits.argmax(axis=1)
  is_right = predicted == answers.labels
  confidence = probabilities(answers.logits).max(axis=1)
  counts = np.bincount(
    answers.labels * classes + predicted, minlength=classes**2
  ).reshape(classes, classes)
  gap = _calibration_error(confidence, is_right)
  wrong = f"{(~is_right).sum():,} of {len(is_right):,} wrong"
  left = (
    page.figure(
      "Confusion matrix",
      figures.confusion(counts, names),
      [f"<span>{wrong}</span><small>rows true, columns predicted</small>"],
    ),
    page.figure(
      "Calibration",
      figures.calibration(confidence, is_right),
      [f"<span>expected error {gap:.3f}</span>"],
    ),
  )
  right = (_class_table(counts, names), _confused_pairs(counts, names))
  return (
    f"<h2>Test split</h2>{page.grid((page.stack(left), page.stack(right)))}"
    + _non_finite(answers)
    + _worst(answers, names, predicted, confidence)
  )


def _calibration_error(confidence: np.ndarray, is_right: np.ndarray) -> float:
  """Mean gap between confidence and accuracy, weighted by examples."""
  bins = figures.calibration_bins(confidence, is_right)
  return float(np.average(abs(bins[:, 0] - bins[:, 1]), weights=bins[:, 2]))


def _class_table(counts: np.ndarray, names: Sequence[str]) -> str:
  right = np.diag(counts)
  precision = right / np.maximum(counts.sum(axis=0), 1)
  recall = right / np.maximum(counts.sum(axis=1), 1)
  f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
  head = ("class", "examples", "precision", "recall", "F1")
  is_long = len(names) > _ALL_CLASSES
  order = np.argsort(f1, kind="stable").tolist() if is_long else range(len(f1))
  rows = [
    (
      page.text(names[i]),
      f"{counts[i].sum():,}",
      *(f"{measure[i]:.3f}" for measure in (precision, recall, f1)),
    )
    for i in order
  ]
  title = "Hardest classes" if is_long else "Classes"
  cut = _HARDEST_CLASSES if is_long else len(rows)
  shown = page.table(head, rows[:cut], numeric=4)
  rest = rows[cut:]
  if rest:
    hidden = page.table(head, rest, numeric=4)
    shown += page.folded(f"{len(rest)} more classes", hidden)
  return f'<div class="card"><h3>{title}</h3>{shown}</div>'


def _confused_pairs(counts: np.ndarray, names: Sequence[str]) -> str:
  """The largest entries off the diagonal."""
  wrong = counts * ~np.eye(len(counts), dtype=bool)
  flat = np.argsort(-wrong, axis=None, kind="stable")[:_SHOWN_PAIRS]
  pairs = [np.unravel_index(i, wrong.shape) for i in flat if wrong.flat[i]]
  if not pairs:
    return ""
  rows = [
    (
      page.text(names[true]),
      page.text(names[predicted]),
      f"{wrong[true, predicted]:,}",
      page.percent(wrong[true, predicted] / counts[true].sum()),
    )
    for true, predicted in pairs
  ]
  head = ("true", "taken for", "times", "of the class")
  return (
    '<div class="card"><h3>Most frequent confusions</h3>'
    f"{page.table(head, rows, numeric=2)}</div>"
  )


def _worst(
  answers: Predictions,
  names: Sequence[str],
  predicted: np.ndarray,
  confidence: np.ndarray,
) -> str:
  def caption(i: int) -> str:
    true, guess = (
      page.text(names[x]) for x in (answers.labels[i], predicted[i])
    )
    sure = page.percent(float(confidence[i]))
    if answers.labels[i] == predicted[i]:
      return f'<b class="good">{guess}</b> {sure}<br>right, but unsure'
    return f'<b class="bad">{guess}</b> {sure}<br>is <b>{true}</b>'

  is_wrong = (predicted != answers.labels)[answers.worst]
  all_right = not is_wrong.any()
  return _pictures(
    "Least sure answers" if all_right else "Worst mistakes",
    "No mistake on the test split; these were the closest."
    if all_right
    else "Wrong answers the model was most sure of.",
    answers,
    caption,
    places=np.flatnonzero(is_wrong | all_right),
  )


def _pictures(
  title: str,
  lead: str,
  answers: Predictions,
  caption: Callable[[int], str],
  places: np.ndarray,
) -> str:
  """The pictures at `places` among the worst, each with its caption."""
  faces = []
  for place in places.tolist():
    i = int(answers.worst[place])
    image = "" if answers.images is None else _image(answers.images[place])
    faces.append(
      f"<figure>{image}{caption(i)}<br>"
      f'<small class="muted">example {answers.index[i]}</small></figure>'
    )
  if not faces:
    return ""
  return (
    f'<h2>{title}</h2><p class="lead">{lead}</p>'
    f'<div class="faces">{"".join(faces)}</div>'
  )


def _image(pixels: np.ndarray) -> str:
  """An `<img>` that holds its own pixels."""
  from PIL import Image

  pixels = pixels.reshape(*pixels.shape[:2], -1)
  if pixels.shape[2] not in (1, 3, 4):
    pixels = pixels.mean(axis=2, keepdims=True)
  scaled = np.clip(np.nan_to_num(pixels), 0, 1) * 255
  picture = Image.fromarray(np.uint8(scaled.round()).squeeze())
  if max(picture.size) > _PICTURE:
    picture.thumbnail((_PICTURE, _PICTURE), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  picture.save(buffer, "PNG", optimize=True)
  data = base64.b64encode(buffer.getvalue()).decode()
  return f'<img alt="" src="data:image/png;base64,{data}">'


def _regression(answers: Predictions) -> str:
  true, predicted = answers.labels, answers.logits.astype(np.float64)
  error = predicted - true
  spread = ((true - true.mean(axis=0)) ** 2).sum()
  rows = [
    ("R²", f"{1 - (error**2).sum() / spread:.4f}" if spread else "undefined"),
    ("root mean square error", f"{np.sqrt((error**2).mean()):.4g}"),
    ("mean absolute error", f"{abs(error).mean():.4g}"),
    ("largest error", f"{abs(error).max():.4g}"),
    ("mean error", f"{error.mean():.4g}"),
  ]

  def values(row: np.ndarray) -> str:
    more = ", \u2026" if len(row) > 3 else ""
    return ", ".join(f"{value:.4g}" for value in row[:3]) + more

  def caption(i: int) -> str:
    return f"<b>{values(predicted[i])}</b><br>is <b>{values(true[i])}</b>"

  cards = [
    page.figure(
      "Predicted against true", figures.scatter(true.ravel(), predicted.ravel())
    ),
    '<div class="card"><h3>Errors</h3>'
    f"{page.table(('measure', 'value'), rows, numeric=1)}</div>",
  ]
  return (
    f"<h2>Test split</h2>{page.grid(cards)}{_non_finite(answers)}"
    + _pictures(
      "Largest errors", "", answers, caption, np.arange(len(answers.worst))
    )
  )


def _non_finite(answers: Predictions) -> str:
  if not answers.non_finite:
    return ""
  return (
    f'<p class="bad">{answers.non_finite:,} predictions were not finite; '
    "those logits count as zero above.</p>"
  )
