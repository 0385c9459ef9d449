"""Benchmark results as data and as a figure."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_INK, _MUTED, _LINE = "#1d2430", "#667085", "#e4e7ec"
_HUES = ("#667085", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
_WIDTH = 7.2  # Inches.
_STYLE = {
  "svg.hashsalt": "benchmark",
  "svg.fonttype": "path",  # Shown as an image, which may lack the fonts.
  "text.parse_math": False,
  "font.size": 9,
  "text.color": _INK,
  "axes.edgecolor": _MUTED,
  "axes.labelcolor": _MUTED,
  "axes.linewidth": 0.6,
  "axes.spines.left": False,
  "axes.spines.right": False,
  "axes.spines.top": False,
  "xtick.color": _MUTED,
  "grid.color": _LINE,
  "grid.linewidth": 0.6,
}


@dataclasses.dataclass(frozen=True)
class Spread:
  """The middle half of some measurements."""

  median: float
  lower: float
  upper: float

  @classmethod
  def of(cls, values: Sequence[float]) -> "Spread":
    """The median and the quartiles of `values`."""
    lower, median, upper = np.percentile(values, (25, 50, 75))
    return cls(float(median), float(lower), float(upper))


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Timings of several cases that took turns.

  Attributes:
    label: what was compared, such as a size.
    seconds: case to its timings, one a round; the first case is the baseline.
  """

  label: str
  seconds: dict[str, list[float]]

  @property
  def baseline(self) -> str:
    """The case by which the others are divided."""
    return next(iter(self.seconds))

  def spread(self, case: str) -> Spread:
    """Seconds a call."""
    return Spread.of(self.seconds[case])

  def ratio(self, case: str, other: str | None = None) -> Spread:
    """Time of `case` by that of `other` in the same round.

    Pairs of neighbours in time: what slowed both of them cancels.
    """
    others = self.seconds[other or self.baseline]
    pairs = zip(self.seconds[case], others, strict=True)
    return Spread.of([mine / theirs for mine, theirs in pairs])


def readable(seconds: float) -> str:
  """Seconds with three digits and a unit.

  >>> readable(0.01234), readable(4.5e-5), readable(2.0)
  ('12.3 ms', '45 us', '2 s')
  """
  for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
    if seconds >= size:
      return f"{seconds / size:.3g} {unit}"
  return f"{seconds * 1e9:.3g} ns"


def draw(
  comparisons: Sequence[Comparison],
  result: dict[str, Any],
  path: pathlib.Path,
) -> None:
  """Draws a dot at each median, a bar over the quartiles, and the ratio."""
  import matplotlib
  from matplotlib.figure import Figure

  rows = [(c, name) for c in comparisons for name in c.seconds]
  bottom, top = 0.62, 0.1  # Inches, like all that follows.
  height = bottom + top + 0.24 * (len(rows) + len(comparisons))
  left = 1.7 + 0.075 * max(len(name) for _, name in rows)
  box = (
    left / _WIDTH,
    bottom / height,
    (_WIDTH - left - 0.3) / _WIDTH,
    (height - bottom - top) / height,
  )
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes(box)
    _draw_rows(axes, comparisons)
    _style_axes(axes, rows)
    machine = result["hardware"]
    axes.set_xlabel(
      f"time a call: median and quartiles; x = median ratio to the first\n"
      f"{machine.get('processor', machine['machine'])}, {machine['cores']} "
      f"cores; {result['verdict']}; {result['date']}",
      fontsize=8,
    )
    figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_rows(axes, comparisons: Sequence[Comparison]) -> None:
  height = 0.5
  for comparison in comparisons:
    height -= 1
    axes.text(
      0, height, comparison.label, transform=axes.get_yaxis_transform(),
      weight="bold", va="center",
    )  # fmt: skip
    for i, name in enumerate(comparison.seconds):
      height -= 1
      spread, hue = comparison.spread(name), _HUES[i % len(_HUES)]
      axes.plot(
        [spread.lower, spread.upper], [height] * 2, color=hue, linewidth=3,
        alpha=0.35, solid_capstyle="round",
      )  # fmt: skip
      axes.plot(spread.median, height, "o", color=hue, markersize=5)
      ratio = f"  x{comparison.ratio(name).median:.2f}" if i else ""
      axes.annotate(
        f"{name}   {readable(spread.median)}{ratio}", (0, height),
        xycoords=("axes fraction", "data"), xytext=(-8, 0),
        textcoords="offset points", ha="right", va="center", color=hue,
      )  # fmt: skip


def _style_axes(axes, rows) -> None:
  from matplotlib import ticker

  ends = [comparison.spread(name) for comparison, name in rows]
  low, high = min(e.lower for e in ends), max(e.upper for e in ends)
  if high > 30 * low:
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  else:
    axes.set_xlim(0, 1.06 * high)
  axes.xaxis.set_major_formatter(
    ticker.FuncFormatter(lambda x, _: readable(x) if x else "0")
  )
  axes.set_yticks([])
  labels = len({id(comparison) for comparison, _ in rows})
  axes.set_ylim(-len(rows) - labels, 0)
  axes.grid(visible=True, axis="x")
  axes.set_axisbelow(True)
