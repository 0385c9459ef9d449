"""The report's figures: arrays in, inline SVG out."""

import itertools
from collections.abc import Sequence

import numpy as np

from deepseek_jax.train.report import svg
from deepseek_jax.train.report.html import printable
from deepseek_jax.train.report.run import Series
from deepseek_jax.train.report.svg import BLUE, HUES, MUTED, ORANGE, SURFACE

_MAX_POINTS = 600  # More than the pixels a curve is shown on.
_NAMED_CLASSES = 30  # Above it the ticks of a confusion matrix are numbers.
_LABELLED_LINES = 12


def curves(
  name: str, series: dict[str, Series], best_step: int | float | None = None
) -> str:
  """Draws one quantity over the steps, a labelled line for each series.

  Args:
    name: what is drawn, for readers who cannot see it.
    series: label to values, in the order of their colours.
    best_step: marked by a vertical line when given.

  Returns:
    An `<svg>` element.
  """
  with svg.canvas(name) as (figure, axes):
    ends = []
    for hue, (label, line) in zip(HUES, series.items(), strict=False):
      steps, values = decimate(line)
      dense = len(line.steps) > 150
      axes.plot(
        steps, values, color=hue, linewidth=0.9 if dense else 1.4, clip_on=False
      )
      if len(steps) == 1:
        axes.plot(steps, values, "o", color=hue, markersize=4)
      ends.append((label, hue, line.values))
    svg.scale(
      axes,
      [line.values for line in series.values()],
      may_log=not name.lower().endswith("accuracy"),
    )
    svg.step_axis(axes)
    if best_step is not None:
      _mark_best(axes, best_step, series)
    _label_ends(axes, ends)
    return svg.to_svg(figure, name)


def learning_rates(groups: Sequence[tuple[str, Series]]) -> str:
  """Draws one line for each group of parameters that share a rate.

  Up to six lines have colours of their own; more are shaded from the first
  to the last, and the labels are those of the lines that end farthest apart.
  """
  name = "Learning rate"
  with svg.canvas(name, right=116) as (figure, axes):
    hues = HUES if len(groups) <= len(HUES) else svg.shades(len(groups))
    ends = []
    for hue, (label, line) in zip(hues, groups, strict=False):
      axes.plot(*decimate(line), color=hue, linewidth=1.1, clip_on=False)
      ends.append((label, hue, line.values))
    svg.scale(axes, [line.values for _, line in groups])
    svg.step_axis(axes)
    _label_ends(axes, ends)
    return svg.to_svg(figure, name)


def confusion(counts: np.ndarray, names: Sequence[str]) -> str:
  """Draws a confusion matrix, rows true and columns predicted.

  Right answers are blue and wrong ones orange, both by their share of the row;
  the square root lets a single mistake among hundreds be seen.
  """
  classes = len(counts)
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  named = classes <= _NAMED_CLASSES
  labels = [_shorten(name) for name in names] if named else []
  margin = 14 + round(4.6 * max(map(len, labels), default=4))
  height = svg.WIDTH - margin + 18
  with svg.canvas(
    "Confusion matrix", height=height, left=margin, bottom=18, top=4, right=4
  ) as (figure, axes):
    colours = np.zeros((classes, classes, 4), np.float32)
    colours[..., :3] = svg.rgb(ORANGE)
    colours[np.diag_indices(classes)] = (*svg.rgb(BLUE), 0)
    colours[..., 3] = (counts > 0) * (0.15 + 0.7 * np.sqrt(share))
    axes.imshow(colours, interpolation="none", aspect="auto")
    if classes <= 15:
      for row, column in zip(*np.nonzero(counts), strict=True):
        axes.text(
          column,
          row,
          str(counts[row, column]),
          ha="center",
          va="center_baseline",
          fontsize=9,
        )
    axes.grid(visible=False)
    _class_ticks(axes, labels, classes)
    return svg.to_svg(figure, "Confusion matrix")


def calibration(confidence: np.ndarray, is_right: np.ndarray) -> str:
  """Draws accuracy against confidence in ten bins; a dot's area is its size."""
  name = "Calibration"
  rows = calibration_bins(confidence, is_right)
  with svg.canvas(name, left=38, bottom=34) as (figure, axes):
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, dashes=(3, 3))
    axes.text(0.32, 0.24, "perfect", color=MUTED, fontsize=8)
    axes.plot(rows[:, 0], rows[:, 1], color=BLUE, linewidth=1.0, alpha=0.5)
    axes.scatter(
      rows[:, 0],
      rows[:, 1],
      s=14 + 220 * rows[:, 2] / rows[:, 2].sum(),
      color=BLUE,
      edgecolor=SURFACE,
      linewidth=0.8,
      zorder=3,
      clip_on=False,
    )
    axes.set(xlim=(0, 1.02), ylim=(0, 1.04), ylabel="share right")
    axes.set_xlabel("confidence", loc="right")
    return svg.to_svg(figure, name)


def calibration_bins(
  confidence: np.ndarray, is_right: np.ndarray
) -> np.ndarray:
  """Returns rows of (mean confidence, share right, count), one a used bin."""
  bins = np.minimum((confidence * 10).astype(int), 9)
  members = [bins == i for i in range(10)]
  return np.array(
    [
      (confidence[m].mean(), is_right[m].mean(), m.sum())
      for m in members
      if m.any()
    ]
  )


def scatter(true: np.ndarray, predicted: np.ndarray) -> str:
  """Draws predicted against true values, at most 2,000 of them."""
  name = "Predicted against true values"
  kept = np.linspace(0, len(true) - 1, min(len(true), 2000)).astype(int)
  low = float(min(true.min(), predicted.min()))
  high = float(max(true.max(), predicted.max()))
  with svg.canvas(name, height=340, left=44, bottom=34) as (
    figure,
    axes,
  ):
    axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8)
    axes.scatter(
      true[kept], predicted[kept], s=7, color=BLUE, alpha=0.35, linewidth=0
    )
    axes.margins(0.02)
    axes.set_ylabel("predicted")
    axes.set_xlabel("true", loc="right")
    return svg.to_svg(figure, name)


def decimate(line: Series) -> tuple[np.ndarray, np.ndarray]:
  """Keeps the lowest and the highest value of each stretch of steps.

  So a spike of one step in a long run is still drawn; a mean would hide it.

  >>> steps = np.arange(10_000)
  >>> spike = Series(steps, np.where(steps == 5_001, 9.0, 1.0))
  >>> kept, values = decimate(spike)
  >>> len(kept) <= 602, float(values.max())
  (True, 9.0)
  """
  steps, values = line.steps, line.values
  if len(steps) <= _MAX_POINTS:
    return steps, values
  edges = np.linspace(0, len(steps), _MAX_POINTS // 2 + 1).astype(int)
  kept = {0, len(steps) - 1}
  for start, stop in itertools.pairwise(edges):
    part = values[start:stop]
    if np.isfinite(part).any():
      kept |= {start + np.nanargmin(part), start + np.nanargmax(part)}
    else:
      kept.add(start)  # The gap stays a gap.
  order = np.array(sorted(kept))
  return steps[order], values[order]


def _mark_best(axes, step: int | float, series: dict[str, Series]) -> None:
  axes.axvline(step, color=MUTED, linewidth=0.8, dashes=(2, 2), zorder=1)
  # Beside the line, on the side where there is room.
  low, high = axes.get_xlim()
  is_late = step > (low + high) / 2
  axes.annotate(
    f"best {step:,.0f}",
    (step, 1),
    xycoords=("data", "axes fraction"),
    xytext=(-3 if is_late else 3, 3),
    textcoords="offset points",
    ha="right" if is_late else "left",
    color=MUTED,
    fontsize=8,
  )
  last = list(series.values())[-1]
  at = np.flatnonzero(last.steps == step)
  if len(at) and np.isfinite(last.values[at[0]]):
    axes.plot(
      step,
      last.values[at[0]],
      "o",
      color=HUES[len(series) - 1],
      markeredgecolor=SURFACE,
      markersize=6,
      clip_on=False,
    )


def _label_ends(axes, ends: Sequence[tuple[str, str, np.ndarray]]) -> None:
  """Names each line at its right end, moved apart where they would collide."""
  placed = []
  for label, hue, values in ends:
    finite = values[np.isfinite(values)]
    if len(finite):
      x, y = axes.transData.transform((axes.get_xlim()[1], finite[-1]))
      placed.append((float(y), x, label, hue))
  placed.sort()
  if len(placed) > _LABELLED_LINES:
    kept = np.linspace(0, len(placed) - 1, _LABELLED_LINES).astype(int)
    placed = [placed[i] for i in kept]
  heights = spread([y for y, *_ in placed], 10.5, axes.bbox.y1 + 4)
  for height, (_, x, label, hue) in zip(heights, placed, strict=True):
    axes.annotate(
      _shorten(label, 24),
      (x + 5, height),
      xycoords="figure pixels",
      va="center",
      color=hue,
      fontsize=8.5 if len(ends) <= 3 else 7.5,
    )


def spread(heights: Sequence[float], gap: float, ceiling: float) -> list[float]:
  """Moves ascending heights at least `gap` apart, the top below `ceiling`.

  >>> spread([1.0, 2.0, 50.0], gap=10.0, ceiling=55.0)
  [1.0, 11.0, 50.0]
  >>> spread([48.0, 50.0], gap=10.0, ceiling=55.0)
  [45.0, 55.0]
  """
  placed: list[float] = []
  for height in heights:
    placed.append(max(height, placed[-1] + gap if placed else height))
  for i in reversed(range(len(placed))):
    placed[i] = min(placed[i], ceiling)
    ceiling = placed[i] - gap
  return placed


def _class_ticks(axes, labels: Sequence[str], classes: int) -> None:
  for spine in axes.spines.values():
    spine.set(visible=True, color=svg.LINE)
  axes.tick_params(length=0)
  if not labels:
    every = range(0, classes, 10 if classes <= 120 else classes // 10)
    axes.set_xticks(every)
    axes.set_yticks(every)
    return
  axes.set_yticks(range(classes), labels)
  # Names below fit when they are short; else the rows alone are named.
  fits = max(map(len, labels)) * 4.6 * classes < axes.bbox.width
  axes.set_xticks(range(classes), labels if fits else [""] * classes)


def _shorten(text: str, width: int = 16) -> str:
  """Printable text of at most `width` characters."""
  text = printable(text)
  return text if len(text) <= width else text[: width - 1] + "…"
