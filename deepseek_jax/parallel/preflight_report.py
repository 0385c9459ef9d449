"""Preflight reports as text, for people."""

from collections.abc import Sequence

from deepseek_jax.parallel.preflight import Report, scaling_efficiency
from deepseek_jax.parallel.roofline import Roofline

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def render(report: Report) -> str:
  """Returns a report as some twenty lines of text.

  Args:
    report: of `preflight.run`.
  """
  lines = [
    f"{report.topology}: {report.num_devices:,} devices, mesh {_mesh(report)}",
    f"compiled by {_compiler(report.compiler)}",
    "",
    "memory of a device",
    *_memory(report),
  ]
  if report.roofline is not None:
    lines += ["", "time of a step, at best", *_times(report.roofline)]
    lines += ["", "sent by a device in a step", *_sent(report.roofline)]
    lines += _caveats(report.roofline)
  return "\n".join(lines)


def render_scaling(reports: Sequence[Report]) -> str:
  """Returns a table of the same work a device on more and more devices.

  Args:
    reports: of `preflight.weak_scaling`.

  Raises:
    ValueError: if one of them does not fit.
  """
  best = scaling_efficiency(reports, overlapped=True)
  worst = scaling_efficiency(reports, overlapped=False)
  rows = [("devices", "mesh", "memory", "step", "of the peak", "efficiency")]
  for report in reports:
    n, found = report.num_devices, report.roofline
    if found is not None:
      rows.append(
        (
          f"{n:,}",
          _mesh(report),
          _size(report.memory.total),
          f"{_time(found.overlapped)} .. {_time(found.apart)}",
          _shares(found),
          f"{best[n]:.1%} .. {worst[n]:.1%}",
        )
      )
  note = "First with everything overlapped, then with nothing overlapped."
  return "\n".join([*_table(rows), note])


def _memory(report: Report) -> list[str]:
  memory = report.memory
  rows = [
    ("arguments", _size(memory.arguments)),
    ("results", _size(memory.outputs)),
    ("temporary", _size(memory.temporary)),
    ("program", _size(memory.code)),
    ("all", f"{_size(memory.total)} of {_size(report.room)}"),
  ]
  said = report.advice or f"fits, with {_size(report.spare)} to spare"
  return [*_table(rows), f"  {said}"]


def _times(found: Roofline) -> list[str]:
  rows = [
    ("products", _time(found.products), f"{found.flops / 1e12:,.1f} TFLOP"),
    ("memory", _time(found.memory), _size(found.bytes)),
    ("network", _time(found.network), _size(_bytes_sent(found))),
    ("overlapped", _time(found.overlapped), f"limited by {found.limit}"),
    ("apart", _time(found.apart), "nothing overlapped"),
  ]
  lines = _table(rows)
  if found.model_flops is not None:
    lines.append(
      f"  {_shares(found)} of the peak for the model's own "
      f"{found.model_flops / 1e12:,.1f} TFLOP"
    )
  return lines


def _sent(found: Roofline) -> list[str]:
  if not found.collectives:
    return ["  nothing"]
  rows = [("collective", "axes", "calls", "bytes", "time")]
  rows += [
    (x.kind, x.place, f"{x.calls:,}", _size(x.sent), _time(x.seconds))
    for x in found.collectives
  ]
  return _table(rows)


def _caveats(found: Roofline) -> list[str]:
  lines = []
  if found.unknown:
    names = ", ".join(found.unknown[:3])
    lines.append(f"Products not told, and not counted: {names}.")
  if found.open_loops:
    names = ", ".join(found.open_loops[:3])
    lines.append(f"Loops that depend on data, counted once: {names}.")
  return ["", *lines] if lines else []


def _bytes_sent(found: Roofline) -> float:
  return sum(x.sent for x in found.collectives)


def _compiler(name: str) -> str:
  fake = name == "fake CPU devices"
  return f"{name}: not the TPU compiler, so a guess" if fake else name


def _mesh(report: Report) -> str:
  return " ".join(f"{k}={n}" for k, n in report.mesh.items()) or "of one"


def _shares(found: Roofline) -> str:
  shares = [found.utilization(overlapped=x) for x in (True, False)]
  return " .. ".join("-" if x is None else f"{x:.1%}" for x in shares)


def _size(count: int | float) -> str:
  power = 0
  while abs(count) >= 1024 and power < len(_SIZES) - 1:
    count, power = count / 1024, power + 1
  return f"{count:.{1 if power else 0}f} {_SIZES[power]}"


def _time(seconds: float) -> str:
  for unit, name in _TIMES:
    if seconds >= unit:
      return f"{seconds / unit:.3g} {name}"
  return f"{seconds / 1e-6:.2g} us"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
  """Returns rows as lines, their first column left and the others right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for first, *rest in rows:
    cells = [first.ljust(widths[0])]
    cells += [x.rjust(n) for x, n in zip(rest, widths[1:], strict=True)]
    lines.append("  " + "  ".join(cells).rstrip())
  return lines
