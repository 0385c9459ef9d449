"""Learning rates of many parameters as few lines with short names."""

from collections import defaultdict

from deepseek_jax.train.report.run import Series


def group_rates(rates: dict[str, Series]) -> list[tuple[str, Series]]:
  """Joins the parameters whose rates coincide at every logged step.

  Rates count as one when they agree to three digits. A group is named after
  the highest modules that lie wholly inside it.

  Args:
    rates: parameter path to its learning rates.

  Returns:
    Name and rates of each group, in the order of the parameters.

  >>> import numpy as np
  >>> slow, fast = (Series(np.arange(2), np.full(2, r)) for r in (0.1, 0.2))
  >>> rates = {"cell/0/kernel": slow, "cell/0/bias": slow, "head/kernel": fast}
  >>> [name for name, _ in group_rates(rates)]
  ['cell', 'head']
  >>> [name for name, _ in group_rates({"a/b": slow, "c": slow})]
  ['all layers']
  """
  keys = {path: _key(series) for path, series in rates.items()}
  members = defaultdict(list)
  inside = defaultdict(set)  # Prefix of a path -> the groups found below it.
  for path, key in keys.items():
    members[key].append(path)
    for prefix in _prefixes(path):
      inside[prefix].add(key)
  whole = {prefix for prefix, groups in inside.items() if len(groups) == 1}
  if len(members) == 1:
    return [("all layers", next(iter(rates.values())))]
  return [(_name(paths, whole), rates[paths[0]]) for paths in members.values()]


def _key(series: Series) -> tuple[str, ...]:
  pairs = zip(series.steps, series.values, strict=True)
  return tuple(f"{step:g} {rate:.3g}" for step, rate in pairs)


def _prefixes(path: str) -> list[str]:
  """`a/b/c` as a, a/b, a/b/c."""
  parts = path.split("/")
  return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _name(paths: list[str], whole: set[str]) -> str:
  tops = [next(p for p in _prefixes(path) if p in whole) for path in paths]
  first, *others = dict.fromkeys(tops)
  return f"{first} +{len(others)}" if others else first
