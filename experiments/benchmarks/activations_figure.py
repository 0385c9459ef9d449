"""The figure of the benchmark of activations: score against zeros."""

import pathlib
from collections.abc import Mapping
from typing import Any

from harness_figure import _HUES, _MUTED, _STYLE

PEER, OURS = "ReLU + L1", "target"
_SIZE = (9.6, 4.2)  # Inches.
_LABELS = {
  "accuracy": "accuracy on images not trained on",
  "bits_per_byte": "bits per byte of text not trained on",
}
_PLAIN = ("ReLU", "GELU")
_COLORS = {OURS: _HUES[2], PEER: _HUES[1]}


def draw(
  result: Mapping[str, Any], scores: Mapping[str, str], path: pathlib.Path
) -> None:
  """Draws one panel a task: a dot a method, a line through each curve."""
  import matplotlib
  from matplotlib.figure import Figure

  tasks = result["tasks"]
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    page = Figure(figsize=_SIZE)
    for place, (task, told) in enumerate(tasks.items()):
      width = 0.98 / len(tasks)
      axes = page.add_axes((0.075 + place * width, 0.2, width - 0.095, 0.7))
      _draw_task(axes, task, told["summary"], scores[task])
    page.text(
      0.01, 0.015,
      "medians, bars over quartiles; "
      f"{result['hardware'].get('processor', '')}; {result['date']}",
      color=_MUTED, fontsize=7,
    )  # fmt: skip
    page.savefig(path, format="svg", metadata={"Date": None})


def _draw_task(axes, task: str, rows: Mapping[str, Any], score: str) -> None:
  for curve, color in _COLORS.items():
    names = [name for name in rows if name.startswith(curve)]
    points = sorted(
      (rows[name]["zeros"][0], rows[name][score][0]) for name in names
    )
    if points:
      axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2)
  for name, row in rows.items():
    curve = next((c for c in _COLORS if name.startswith(c)), None)
    color = _COLORS[curve] if curve else _MUTED
    zeros, (middle, low, high) = row["zeros"][0], row[score]
    axes.plot([zeros, zeros], [low, high], color=color, linewidth=2, alpha=0.35)
    axes.plot(zeros, middle, "o", color=color, markersize=4.5)
    label = name.removeprefix(f"{PEER} ") if curve == PEER else name
    axes.annotate(
      label, (zeros, middle), xytext=(5, 4), textcoords="offset points",
      fontsize=7, color=color,
    )  # fmt: skip
  if score == "bits_per_byte":
    axes.invert_yaxis()  # Better is higher in both panels.
  dead = max((row["dead"][0] for row in rows.values()), default=0)
  axes.set_title(f"{task} (dead units: at most {dead:.0%})", fontsize=9)
  axes.set_xlabel("share of zeros")
  axes.set_ylabel(_LABELS[score])
  axes.set_xlim(-0.03, 1.12)
  axes.grid(visible=True)
  axes.set_axisbelow(True)
