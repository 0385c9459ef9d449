"""The figure of `experts.py`: loads as training goes on, and what they cost."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from harness_figure import _HUES, _MUTED, _STYLE, _WIDTH

LOADS = ("lasting", "a_step")
TARGET = 1.25  # Of the busiest expert's load, in units of the mean.


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws loads of the worst layer over steps, and bits against loads."""
  import matplotlib
  from matplotlib.figure import Figure

  names = [name for name in result["runs"] if name != "dense"]
  hues = dict(zip(names, _HUES[1:] + _HUES[:1], strict=False))
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    page = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    left, right = page.subplots(1, 2)
    _draw_loads(left, result, hues)
    _draw_bits(right, result["summary"], hues)
    page.savefig(path, format="svg", metadata={"Date": None})


def _draw_loads(axes, result, hues: Mapping[str, str]) -> None:
  window = result["settings"]["window"]
  for name, hue in hues.items():
    rows = list(result["runs"][name].values())
    worst = np.median([np.max(row["lasting"], axis=1) for row in rows], axis=0)
    steps = window * (1 + np.arange(len(worst)))
    axes.plot(steps, worst, color=hue, linewidth=1.2, label=name)
  axes.axhline(TARGET, color=_MUTED, linewidth=0.8, linestyle=":")
  axes.set_xlabel("steps")
  axes.set_title(
    f"busiest expert of {window} steps / mean, worst layer",
    loc="left", fontsize=8,
  )  # fmt: skip
  axes.grid(visible=True, axis="y")
  axes.legend(frameon=False, fontsize=7)


def _draw_bits(axes, summary, hues: Mapping[str, str]) -> None:
  for name, hue in hues.items():
    row = summary[name]
    load, (middle, low, high) = row["lasting"][0], row["bits_per_byte"]
    axes.plot([load, load], [low, high], color=hue, linewidth=2, alpha=0.35)
    axes.plot(load, middle, "o", color=hue, markersize=4.5)
  if "dense" in summary:
    axes.axhline(summary["dense"]["bits_per_byte"][0], color=_MUTED)
  axes.set_xlabel("busiest / mean at the end")
  axes.set_title(
    "bits per byte not trained on; line: dense", loc="left", fontsize=8
  )
  axes.grid(visible=True)
