"""A matplotlib figure drawn as inline SVG, in the manner of the report.

Figures are drawn on matplotlib's object-oriented `Figure` under settings of
their own, so that neither a user's style nor pyplot's state enters, and equal
data gives equal bytes. Colours are written as CSS variables: the page decides
what they are in daylight, in the dark and on paper.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

import numpy as np

# What matplotlib draws with, and the variable it becomes. The hues are those
# of Okabe and Ito, which stay apart for colour-blind readers.
INK, MUTED, LINE, SURFACE = "#1d2430", "#667085", "#e4e7ec", "#fefefe"
HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BLUE, ORANGE = HUES[:2]
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", SURFACE: "surface"}
_VARIABLES |= {hue: f"hue-{i}" for i, hue in enumerate(HUES)}

WIDTH, _HEIGHT, _DPI = 400, 232, 72  # In points; the page scales them.
_LOG_RANGE = 30.0  # Beyond this ratio a linear axis hides the small values.

_STYLE = {
  "figure.dpi": _DPI,
  "savefig.dpi": _DPI,
  "svg.fonttype": "none",
  "text.parse_math": False,  # A class may be called "$100".
  "font.size": 8.5,
  "text.color": INK,
  "axes.edgecolor": MUTED,
  "axes.labelcolor": MUTED,
  "axes.linewidth": 0.6,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.spines.left": False,
  "axes.grid": True,
  "axes.grid.axis": "y",
  "axes.axisbelow": True,
  "axes.xmargin": 0.0,
  "axes.formatter.useoffset": False,
  "grid.color": LINE,
  "grid.linewidth": 0.6,
  "xtick.color": MUTED,
  "ytick.color": MUTED,
  "xtick.major.size": 3,
  "xtick.major.width": 0.6,
  "ytick.major.size": 0,
  "ytick.minor.size": 0,
  "lines.linewidth": 1.4,
  "lines.solid_joinstyle": "round",
}


@contextlib.contextmanager
def canvas(
  name: str,
  *,
  height: int = _HEIGHT,
  left: int = 40,
  right: int = 58,
  bottom: int = 24,
  top: int = 14,
) -> Iterator:
  """A figure with one axes and these margins, in points."""
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context(), warnings.catch_warnings():
    # The page's own fonts have the letters that matplotlib's lacks.
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(_STYLE, **{"svg.hashsalt": name})
    figure = Figure(figsize=(WIDTH / _DPI, height / _DPI))
    figure.patch.set_visible(False)
    box = (
      left / WIDTH,
      bottom / height,
      (WIDTH - left - right) / WIDTH,
      (height - bottom - top) / height,
    )
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    yield figure, axes


def scale(axes, values: Sequence[np.ndarray], *, may_log: bool = True) -> None:
  """Ticks for `values`; a log axis if they are positive and span decades."""
  from matplotlib import ticker

  everything = np.concatenate([*values, [np.nan]])
  everything = everything[np.isfinite(everything)]
  if not len(everything):
    axes.set_yticks([])
    axes.text(0.5, 0.5, "no finite value", color=MUTED, ha="center")
    return
  low, high = everything.min(), everything.max()
  if may_log and low > 0 and high / low > _LOG_RANGE:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
  else:
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(_tick))


def step_axis(axes) -> None:
  """Puts a few whole steps below the axes, and the word at their end."""
  from matplotlib import ticker

  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tick))
  axes.set_xlabel("step")
  axes.xaxis.set_label_coords(1 + 15 / axes.bbox.width, -6.5 / axes.bbox.height)
  axes.xaxis.label.set(ha="left", va="top")


def _tick(value: int | float, _position: int | None = None) -> str:
  """Short text of a tick: 0.0005, 12, 20k, 3M, 2e-05."""
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
    if abs(value) >= size:
      return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
  return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"


def shades(count: int) -> list[str]:
  """Colours from dark blue to light green, legible on white and on black."""
  from matplotlib import colormaps, colors

  return [
    colors.to_hex(c)
    for c in colormaps["viridis"](np.linspace(0.3, 0.75, count))
  ]


def rgb(colour: str) -> tuple[float, ...]:
  """Red, green and blue in 0..1."""
  from matplotlib import colors

  return colors.to_rgb(colour)


def to_svg(figure, name: str) -> str:
  """Saves a figure as an element that can stand inside a page.

  Ids that nothing refers to go, since two figures would share them; so do the
  fonts and the fixed size, which are the page's to choose.
  """
  buffer = io.StringIO()
  metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
  figure.savefig(buffer, format="svg", metadata=metadata)
  root = ElementTree.fromstring(buffer.getvalue())
  for child in list(root):  # Metadata and a style for the whole page.
    if not child.tag.endswith("}g") and child.find("{*}clipPath") is None:
      root.remove(child)
  for element in root.iter():
    element.tag = element.tag.partition("}")[2]
    _clean(element)
  box = root.attrib["viewBox"]
  root.attrib.clear()
  root.attrib.update({"viewBox": box, "role": "img", "aria-label": name})
  return ElementTree.tostring(
    root, encoding="unicode", short_empty_elements=True
  )


def _clean(element: ElementTree.Element) -> None:
  attributes = dict(element.attrib)
  element.attrib.clear()
  for key, value in attributes.items():
    key = key.partition("}")[2] or key
    if key == "id" and re.search(r"_\d+$", value):
      continue
    if key == "transform" and value.startswith("rotate(-0 "):
      continue
    if key == "style":
      value = re.sub(r"font-family: [^;]*;? ?", "", value)
      value = re.sub(r"#[0-9a-f]{6}", _as_variable, value)
    if key == "d":
      value = re.sub(r"(\.\d\d)\d+", r"\1", value).replace("\n", "")
    element.set(key, value)
  element.tail = None
  if element.tag != "text":
    element.text = None


def _as_variable(colour: re.Match) -> str:
  variable = _VARIABLES.get(colour[0])
  return f"var(--{variable})" if variable else colour[0]
