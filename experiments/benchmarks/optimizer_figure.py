"""The figure of the optimizer benchmark: steps to a target, and bad rates."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import optimizer_scores as scores
from harness_figure import _HUES, _INK, _MUTED, _STYLE

OURS = "deepseek"
_MISSED = 2.6  # Where a ratio is drawn that is infinite, or off the axis.
_OFFSETS = {"middle": 0.18, "tight": -0.18}  # Of a row's two lines.
_SIZE = (9.6, 5.0)  # Inches.


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws ratios of steps on the left, losses over rates on the right."""
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE)
    figure = Figure(figsize=_SIZE)
    left = figure.add_axes((0.165, 0.19, 0.45, 0.675))
    right = figure.add_axes((0.69, 0.19, 0.295, 0.675))
    _draw_ratios(left, result)
    _draw_rates(right, result)
    figure.text(
      0.01, 0.015,
      f"median of seeds {', '.join(map(str, result['scoring_seeds']))}; "
      f"{result['hardware'].get('processor', '')}; {result['date']}",
      color=_MUTED, fontsize=7,
    )  # fmt: skip
    figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_ratios(axes, result: Mapping[str, Any]) -> None:
  """A row a candidate: a dot a workload, a bar at the geometric mean."""
  shown = _rows(result)
  workloads = list(dict.fromkeys(k.split("/")[0] for k in result["targets"]))
  for height, name in enumerate(reversed(shown)):
    _draw_row(axes, height, result["candidates"][name], workloads)
  for kind, offset in _OFFSETS.items():
    axes.annotate(
      kind, (1, len(shown) - 1 + offset), xytext=(-4, 0), ha="right",
      va="center", xycoords=("axes fraction", "data"), fontsize=8,
      textcoords="offset points", color=_MUTED,
    )  # fmt: skip
  axes.axvline(1.0, color=_INK, linewidth=0.9, zorder=0)
  axes.set_xscale("log")
  axes.set_xlim(0.28, 3.1)
  ticks = (0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0)
  axes.set_xticks(
    [*ticks, _MISSED], [*map("{:g}".format, ticks), "later or\nmissed"]
  )
  axes.minorticks_off()
  axes.set_yticks(range(len(shown)), list(reversed(shown)))
  for label, name in zip(axes.get_yticklabels(), reversed(shown), strict=True):
    label.set(color=_INK, weight="bold" if name == OURS else "normal")
  axes.tick_params(axis="y", length=0)
  axes.set_ylim(-0.6, len(shown) - 0.4)
  axes.grid(visible=True, axis="x")
  axes.set_axisbelow(True)
  axes.set_title(
    "Steps to the target, as a share of AdamW's best\n", loc="left",
    fontsize=10, weight="bold",
  )  # fmt: skip
  axes.set_xlabel(
    "faster  <   1 = AdamW, tuned for each workload and target   >  slower\n"
    f"bar: geometric mean; {OURS}: one setting for all; others tuned for each"
  )
  for i, name in enumerate(workloads):
    axes.plot([], [], "o", color=_hue(i), markersize=5, label=name)
  axes.legend(
    loc="lower left", bbox_to_anchor=(-0.01, 0.985), ncols=len(workloads),
    frameon=False, fontsize=8, handletextpad=0.1, columnspacing=1.0,
  )  # fmt: skip


def _rows(result: Mapping[str, Any]) -> list[str]:
  """Ours, then the others by their score; no ablation, nor the 1 itself."""
  profile = result["profile"]["scores"]
  others = [
    name
    for name in result["candidates"]
    if name not in (scores.BASELINE, OURS, *result["ablations"])
  ]
  others.sort(key=lambda name: (-profile.get(name, 0.0), name))
  return [name for name in (OURS, *others) if name in result["candidates"]]


def _draw_row(axes, height: int, found, workloads: Sequence[str]) -> None:
  for kind, offset in _OFFSETS.items():
    y = height + offset
    for i, workload in enumerate(workloads):
      cell = found["cells"].get(f"{workload}/{kind}")
      if cell is not None:
        x = _MISSED if cell["ratio"] is None else min(cell["ratio"], _MISSED)
        hollow = x == _MISSED
        # Side by side where several miss.
        x *= 1 + (0.035 * (i - len(workloads) / 2) if hollow else 0.0)
        axes.plot(
          x, y, "o", markersize=5, alpha=0.9, color=_hue(i),
          markerfacecolor="white" if hollow else _hue(i),
        )  # fmt: skip
    mean = found[kind]["geometric_mean"]
    if mean is not None and mean < _MISSED:
      axes.plot([mean, mean], [y - 0.14, y + 0.14], color=_INK, linewidth=1.8)


def _draw_rates(axes, result: Mapping[str, Any]) -> None:
  """Best loss over rate, as a multiple of the middle target."""
  names = [n for n in (scores.BASELINE, OURS) if result["rates"].get(n)]
  for name in names:
    hue = _HUES[2] if name == OURS else _MUTED
    curves = _relative_losses(result, name)
    for curve in curves:
      axes.plot(*zip(*curve, strict=True), color=hue, linewidth=0.7, alpha=0.4)
    label = f"{name}, cosine" if name == scores.BASELINE else name
    mean = _mean_curve(curves)
    axes.plot(
      *zip(*mean, strict=True), "-o", color=hue, linewidth=2.2, markersize=4,
      label=label,
    )  # fmt: skip
  axes.set_xscale("log")
  axes.set_yscale("log")
  axes.set_ylim(0.12, 40)
  ticks = (0.2, 0.5, 1, 2, 5, 10, 30)
  axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
  axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
  axes.minorticks_off()
  axes.axhline(1.0, color=_INK, linewidth=0.9, zorder=0)
  axes.grid(visible=True)
  axes.set_axisbelow(True)
  axes.set_title(
    "Best loss over the learning rate\n", loc="left", fontsize=10, weight="bold"
  )
  axes.set_xlabel("learning rate\nthin: a workload; thick: geometric mean")
  axes.set_ylabel("best validation loss / middle target", labelpad=1)
  if names:
    axes.legend(
      loc="lower left", bbox_to_anchor=(-0.02, 0.985), ncols=2, frameon=False,
      fontsize=8,
    )  # fmt: skip


def _relative_losses(result, name: str) -> list[list[tuple[float, float]]]:
  found = []
  for workload, curve in result["rates"][name].items():
    target = result["targets"][f"{workload}/middle"]["loss"]
    found.append(
      [
        (rate, loss / target)
        for rate, loss in zip(curve["rates"], curve["losses"], strict=True)
        if loss is not None
      ]
    )
  return found


def _mean_curve(curves) -> list[tuple[float, float]]:
  """The geometric mean at the rates that every workload has."""
  tables = [dict(curve) for curve in curves]
  rates = sorted(set.intersection(*map(set, tables))) if tables else []
  return [
    (rate, math.exp(sum(math.log(t[rate]) for t in tables) / len(tables)))
    for rate in rates
  ]


def _hue(i: int) -> str:
  return _HUES[1 + i % (len(_HUES) - 1)]
