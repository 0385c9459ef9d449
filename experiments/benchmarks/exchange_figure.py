"""The figure of `exchange.py`: bytes, loss, and time over slow links."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from harness_figure import _HUES, _MUTED, _STYLE, _WIDTH


def draw(cases: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws a panel for each case that there is."""
  import matplotlib
  from matplotlib.figure import Figure

  panels = [
    (draw_one, cases[name])
    for name, key, draw_one in (
      ("bytes", "sent", _draw_bytes),
      ("loss", "summary", _draw_loss),
      ("link", "summary", _draw_link),
    )
    if key in cases.get(name, {})
  ]
  if not panels:
    return
  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    figure = Figure(figsize=(_WIDTH, 3.1 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (draw_one, case) in zip(rows, panels, strict=True):
      draw_one(axes, case)
      axes.set_axisbelow(True)
    figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_bytes(axes: Any, case: Mapping[str, Any]) -> None:
  counts = list(case["sent"])
  for i, count in enumerate(counts):
    rows = {k: v["saved"] for k, v in case["sent"][count].items()}
    places = np.arange(len(rows)) + 0.4 * (i - 0.5)
    axes.barh(places, rows.values(), 0.36, color=_HUES[i], label=f"{count}")
    for place, value in zip(places, rows.values(), strict=True):
      axes.text(value * 1.04, place, f"{value:.3g}", va="center", fontsize=6)
    axes.set_yticks(np.arange(len(rows)), rows)
  axes.set_xscale("log")
  axes.invert_yaxis()
  axes.legend(title="devices", frameon=False, fontsize=7, title_fontsize=7)
  _title(axes, "bytes of float32 / bytes sent a step")


def _draw_loss(axes: Any, case: Mapping[str, Any]) -> None:
  groups = case["summary"]
  names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
  for i, (key, rows) in enumerate(groups.items()):
    for name, kinds in rows.items():
      middle, low, high = kinds["loss"]
      place = names.index(name) + 0.18 * (i - (len(groups) - 1) / 2)
      hue = _HUES[(i + 1) % len(_HUES)]
      axes.plot([low, high], [place] * 2, color=hue, linewidth=2, alpha=0.35)
      first = name == next(iter(rows))
      axes.plot(
        middle, place, "o", color=hue, markersize=3.5,
        label=key if first else None,
      )  # fmt: skip
  axes.set_yticks(range(len(names)), names)
  axes.set_xscale("symlog", linthresh=1)
  axes.axvline(0, color=_MUTED, linewidth=0.8)
  axes.invert_yaxis()
  axes.grid(visible=True, axis="x")
  axes.legend(frameon=False, fontsize=7)
  _title(axes, "loss after equal steps above float32's, %: median, spread")


def _draw_link(axes: Any, case: Mapping[str, Any]) -> None:
  rates = np.geomspace(10, 10_000, 100)
  rows = case["summary"]
  plain = _seconds(rows["float32"], rates)
  names = [name for name in rows if name != "float32"]
  for i, name in enumerate(names):
    style = "-" if i < len(_HUES) else "--"
    hue = _HUES[i % len(_HUES)]
    modelled = plain / _seconds(rows[name], rates)
    axes.plot(rates, modelled, style, color=hue, linewidth=1.2, label=name)
    for rate, (middle, *_) in rows[name]["times_faster"].items():
      axes.plot(float(rate), middle, "o", color=hue, markersize=3)
  axes.axhline(1, color=_MUTED, linewidth=0.8)
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.grid(visible=True)
  axes.legend(frameon=False, fontsize=6, ncols=2)
  axes.set_xlabel("Mbit/s of the link between two processes")
  _title(axes, "step of float32 / step; dots: measured, lines: bytes + compute")


def _seconds(row: Mapping[str, Any], rates: np.ndarray) -> np.ndarray:
  return row["seconds_without_network"] + row["counted"] * 8e-6 / rates


def _title(axes: Any, text: str) -> None:
  for axis in (axes.xaxis, axes.yaxis):
    if axis.get_scale() != "linear":
      axis.set_major_formatter(lambda x, _: f"{x:g}")
  axes.set_title(text, loc="left", fontsize=8)
