"""The figure of `pod.py`: what a step takes, and what is left on more chips."""

import pathlib
from collections.abc import Mapping
from typing import Any

from harness_figure import _HUES, _STYLE, _WIDTH

_PARTS = ("products", "memory", "network")


def draw(cases: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws the cases that there are.

  Args:
    cases: of `pod.json`.
    path: of the SVG file.
  """
  import matplotlib
  from matplotlib.figure import Figure

  steps = {
    f"{name}\n{row['topology']}": row
    for case in ("meshes", "experts")
    for name, row in cases.get(case, {"reports": {}})["reports"].items()
    if row["roofline"]
  }
  panels = [(_draw_steps, steps)] if steps else []
  if "scaling" in cases:
    panels.append((_draw_scaling, cases["scaling"]["reports"]))
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    figure = Figure(figsize=(_WIDTH, 2.8 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for (panel, reports), ax in zip(panels, axes, strict=True):
      panel(ax, reports)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_scaling(axes, reports: Mapping[str, Any]) -> None:
  chips = [int(n) for n in reports]
  for hue, (bound, said) in zip(
    _HUES[1:],
    {
      "overlapped": "everything overlaps",
      "apart": "nothing overlaps",
    }.items(),
    strict=False,
  ):
    shares = [row["share_of_peak"][bound] for row in reports.values()]
    axes.plot(chips, shares, "o-", color=hue, label=said)
  axes.set_xscale("log", base=2)
  axes.set_xticks(chips, [f"{n:,}" for n in chips])
  axes.set_ylim(0, 1)
  axes.grid(visible=True, axis="y")
  axes.set_xlabel("chips, one row each")
  axes.set_title("share of the peak, by roofline", loc="left", fontsize=9)
  axes.legend(frameon=False)


def _draw_steps(axes, reports: Mapping[str, Any]) -> None:
  names = list(reports)
  for i, (part, hue) in enumerate(zip(_PARTS, _HUES[1:], strict=False)):
    places = [y + 0.25 * (i - 1) for y in range(len(names))]
    widths = [1000 * reports[name]["roofline"][part] for name in names]
    axes.barh(places, widths, height=0.22, color=hue, label=part)
  axes.set_yticks(range(len(names)), names)
  axes.invert_yaxis()
  axes.grid(visible=True, axis="x")
  axes.set_xlabel("milliseconds of a step, each at its peak")
  axes.legend(frameon=False)
