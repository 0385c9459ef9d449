"""Small pieces of HTML; every text passes through `text`."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


def printable(value: Any) -> str:
  """`value` without control codes, which neither XML nor UTF-8 can hold."""
  return "".join(c if c.isprintable() else "\ufffd" for c in str(value))


def text(value: Any) -> str:
  """`value` as escaped, printable text.

  >>> text("<script>")
  '&lt;script&gt;'
  """
  return html.escape(printable(value))


def number(value: Any) -> str:
  """A short number; a value that was not finite was stored as null.

  >>> number(0.98612), number(12), number(None)
  ('0.9861', '12', 'not finite')
  """
  if isinstance(value, bool) or not isinstance(value, int | float | None):
    return text(value)
  if value is None or value != value:
    return "not finite"
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def percent(share: float) -> str:
  """A share as percent with one decimal."""
  return f"{100 * share:.1f}\u202f%"


def duration(seconds: int | float) -> str:
  """Seconds as a person would say them.

  >>> duration(38.42), duration(754), duration(7388)
  ('38.4 s', '12 min 34 s', '2 h 3 min')
  """
  if seconds < 100:
    return f"{seconds:.1f} s"
  minutes, seconds = divmod(round(seconds), 60)
  if minutes < 100:
    return f"{minutes} min {seconds} s"
  return f"{minutes // 60:,} h {minutes % 60} min"


def size(count: int | float) -> str:
  """Bytes with a binary unit.

  >>> size(734003200)
  '700 MiB'
  """
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.3g} {unit}" if count < 999 else f"{count:.0f} {unit}"
    count /= 1024
  return f"{count:.3g} TiB"


def figure(title: str, svg: str, notes: Sequence[str] = ()) -> str:
  """A titled figure; `notes` are HTML, shown beside the title."""
  return (
    f"<figure><figcaption><b>{text(title)}</b>{''.join(notes)}</figcaption>"
    f"{svg}</figure>"
  )


def grid(cells: Iterable[str]) -> str:
  """Cells beside each other where there is room."""
  return f'<div class="grid">{"".join(cells)}</div>'


def stack(cells: Iterable[str]) -> str:
  """Cells below each other, the last as tall as the neighbours ask."""
  return f'<div class="stack">{"".join(cells)}</div>'


def table(
  head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int = 0
) -> str:
  """A table of cells that are HTML already, the last `numeric` to the right."""
  first = len(head) - numeric

  def cells(tag: str, row: Sequence[str]) -> str:
    return "".join(
      f"<{tag}{' class=n' if i >= first else ''}>{cell}</{tag}>"
      for i, cell in enumerate(row)
    )

  body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
  return (
    f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>"
  )


def folded(summary: str, content: str) -> str:
  """Content shown on a click."""
  return f"<details><summary>{text(summary)}</summary>{content}</details>"


def bar(share: float) -> str:
  """A bar of `share` of its cell."""
  width = 100 * min(max(share, 0), 1)
  return f'<div class="bar"><i style="width:{width:.1f}%"></i></div>'


def settings(title: str, content: Any) -> str:
  """A card of nested settings, one line a leaf, named by its dotted path."""
  rows = [
    (f"<code>{text(path)}</code>", f"<code>{text(value)}</code>")
    for path, value in _leaves(content)
  ]
  if not rows:
    return ""
  return (
    f'<div class="card settings"><h3>{text(title)}</h3>'
    f"{table(('setting', 'value'), rows)}</div>"
  )


def _leaves(content: Any, path: str = "") -> Iterable[tuple[str, Any]]:
  if not isinstance(content, dict):
    if content is not None or path:
      yield path, content
    return
  for key, value in content.items():
    yield from _leaves(value, f"{path}.{key}" if path else str(key))
