"""Parameter paths, and ordered rules that give every parameter a value.

A path joins dictionary keys, sequence indices and attribute names with "/", as
in "stages/0/kernel". A rule is a pair (regular expression, value). The whole
path must match (`re.fullmatch`), so that "head/.*" can never reach
"overhead/kernel"; the first rule that matches decides. Tables that leave a
parameter uncovered, or hold a rule that decides nothing, are mistakes far more
often than intentions: both are errors that name the paths.
"""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from deepseek_jax.core.typing import Path, PyTree, Rules, Value

_REQUIRED: Any = object()


def leaf_paths(
  tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[Path]:
  """Returns the path of every leaf, in the order of `jax.tree.leaves`.

  Args:
    tree: Any pytree.
    is_leaf: Says of a node that it is a leaf, as in `jax.tree.leaves`.

  Returns:
    One path a leaf; the path of a tree that is itself a leaf is "".

  Raises:
    ValueError: If two leaves have the same path (a key that holds a "/", or
      the keys 0 and "0" in one tree).

  >>> leaf_paths({"stages": [{"kernel": 1.0}], "bias": 2.0})
  ['bias', 'stages/0/kernel']
  """
  entries, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
  paths = [
    jax.tree_util.keystr(keys, simple=True, separator="/")
    for keys, _ in entries
  ]
  if len(set(paths)) < len(paths):
    twice = sorted({path for path in paths if paths.count(path) > 1})
    raise ValueError(f"paths must be unique, got more than one of {twice}.")
  return paths


def map_with_paths(
  function: Callable[..., Any], tree: PyTree, *rest: PyTree
) -> PyTree:
  """Applies `function(path, leaf, ...)` to every leaf.

  Args:
    function: Takes a path and the leaf of each tree.
    tree: Gives the structure and the paths.
    *rest: More trees of the same structure.

  Returns:
    A tree of the results, with the structure of `tree`.

  >>> map_with_paths(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
  {'a': {'b': 'a/b=1'}}
  """
  treedef = jax.tree.structure(tree)
  paths = jax.tree.unflatten(treedef, leaf_paths(tree))
  return jax.tree.map(function, paths, tree, *rest)


def match_rules(
  rules: Rules[Value],
  tree: PyTree,
  *,
  default: Value = _REQUIRED,
  allow_unused: bool = False,
) -> PyTree:
  """Gives every leaf the value of the first rule that matches its whole path.

  Args:
    rules: Ordered (regular expression, value) pairs.
    tree: Any pytree; only its paths are looked at.
    default: The value of leaves that no rule matches. Without it every leaf
      must be matched.
    allow_unused: Whether a rule may decide no leaf at all, as in a table that
      many models share.

  Returns:
    A tree of values, with the structure of `tree`.

  Raises:
    ValueError: If a pattern is not a regular expression, a leaf is uncovered,
      or a rule decides nothing; the message lists every such path or rule with
      its near misses. A tree without leaves has nothing to decide and passes.

  >>> rules = [("head/.*", "fast"), (".*/bias", "none"), (".*", "slow")]
  >>> tree = {"head": {"bias": 0.0}, "trunk": {"bias": 0.0, "kernel": 0.0}}
  >>> match_rules(rules, tree)
  {'head': {'bias': 'fast'}, 'trunk': {'bias': 'none', 'kernel': 'slow'}}
  """
  patterns = [_compile(rule) for rule in _as_pairs(rules)]
  paths = leaf_paths(tree)
  chosen = [_first_match(patterns, path) for path in paths]
  uncovered = [path for path, i in zip(paths, chosen, strict=True) if i is None]
  if uncovered and default is _REQUIRED:
    raise ValueError(_uncovered_message(uncovered, paths, patterns))
  unused = [i for i in range(len(patterns)) if i not in chosen]
  if unused and paths and not allow_unused:
    raise ValueError(_unused_message(unused, paths, patterns))
  values = [default if i is None else rules[i][1] for i in chosen]
  return jax.tree.unflatten(jax.tree.structure(tree), values)


def label_tree(rules: Rules[str], tree: PyTree) -> PyTree:
  """Labels every leaf, for `optax.partition`.

  Args:
    rules: Ordered (regular expression, label) pairs that cover every leaf.
    tree: Any pytree.

  Returns:
    A tree of labels, with the structure of `tree`.

  Raises:
    ValueError: As `match_rules`.

  >>> label_tree([("head/.*", "train"), (".*", "freeze")],
  ...            {"head": {"bias": 0.0}, "trunk": {"bias": 0.0}})
  {'head': {'bias': 'train'}, 'trunk': {'bias': 'freeze'}}
  """
  return match_rules(rules, tree)


def multiplier_tree(rules: Rules[float], tree: PyTree) -> PyTree:
  """Gives every leaf a multiplier, finite and not negative.

  Args:
    rules: Ordered (regular expression, multiplier) pairs that cover every leaf.
    tree: Any pytree.

  Returns:
    A tree of Python floats, with the structure of `tree`.

  Raises:
    ValueError: As `match_rules`, and if a multiplier is negative, infinite or
      NaN.

  >>> multiplier_tree([("head/.*", 1.0), (".*", 0.1)],
  ...                 {"head": {"bias": 0.0}, "trunk": {"bias": 0.0}})
  {'head': {'bias': 1.0}, 'trunk': {'bias': 0.1}}
  """
  for pattern, multiplier in _as_pairs(rules):
    if not (math.isfinite(multiplier) and multiplier >= 0):
      raise ValueError(
        "a multiplier must be finite and not negative, got "
        f"{multiplier=} for {pattern!r}."
      )
  return jax.tree.map(float, match_rules(rules, tree))


def mask_tree(patterns: Sequence[str], tree: PyTree) -> PyTree:
  """Says of every leaf whether any pattern matches its whole path.

  Args:
    patterns: Regular expressions, each of which must decide a leaf.
    tree: Any pytree.

  Returns:
    A tree of Python booleans, with the structure of `tree`.

  Raises:
    ValueError: As `match_rules`, and if `patterns` is a single string.

  >>> mask_tree([".*/kernel"], {"conv": {"bias": 0.0, "kernel": 0.0}})
  {'conv': {'bias': False, 'kernel': True}}
  """
  if isinstance(patterns, str):
    raise ValueError(f"patterns must be a sequence of strings, got {patterns=}")
  rules = [(pattern, True) for pattern in patterns]
  return match_rules(rules, tree, default=False)


def _as_pairs(rules: Rules[Any]) -> Rules[Any]:
  """Returns the rules, or says which of them is no pair."""
  for rule in rules:
    if not (isinstance(rule, tuple | list) and len(rule) == 2):
      raise ValueError(f"a rule must be a pair (pattern, value), got {rule=}.")
  return rules


def _compile(rule: tuple[str, Any]) -> re.Pattern[str]:
  try:
    return re.compile(rule[0])
  except (re.error, TypeError) as error:
    raise ValueError(
      f"a rule's pattern must be a regular expression, got {rule[0]!r}: {error}"
    ) from error


def _first_match(patterns: list[re.Pattern[str]], path: Path) -> int | None:
  matches = (i for i, p in enumerate(patterns) if p.fullmatch(path))
  return next(matches, None)


def _uncovered_message(
  uncovered: list[Path], paths: list[Path], patterns: list[re.Pattern[str]]
) -> str:
  """Lists the leaves that no rule matches, each with the nearest rule."""
  texts = [pattern.pattern for pattern in patterns]
  lines = []
  for path in uncovered:
    near = [p.pattern for p in patterns if p.search(path)]
    near = near or difflib.get_close_matches(path, texts, n=1, cutoff=0.5)
    hint = f"  (near miss: {near[0]!r})" if near else ""
    lines.append(f"  {path!r}{hint}")
  return (
    f"rules must cover every leaf, got {len(uncovered)} of {len(paths)} "
    "uncovered. A pattern must match the whole path; a last rule "
    "('.*', value) covers the rest.\n" + "\n".join(lines)
  )


def _unused_message(
  unused: list[int], paths: list[Path], patterns: list[re.Pattern[str]]
) -> str:
  """Lists the rules that decide no leaf, each with the reason."""
  lines = [f"  {_why_unused(i, paths, patterns)}" for i in unused]
  return (
    f"every rule must decide a leaf, got {len(unused)} of {len(patterns)} that "
    "do not.\n" + "\n".join(lines)
  )


def _why_unused(
  i: int, paths: list[Path], patterns: list[re.Pattern[str]]
) -> str:
  """Says whether earlier rules took the leaves, or what nearly matched."""
  text = patterns[i].pattern
  for path in paths:
    if patterns[i].fullmatch(path):
      first = _first_match(patterns, path)
      taken_by = patterns[first if first is not None else i].pattern
      return f"{text!r}: an earlier rule {taken_by!r} takes {path!r}"
  near = [path for path in paths if patterns[i].search(path)]
  near = near or difflib.get_close_matches(text, paths, n=1, cutoff=0.5)
  return f"{text!r}" + (f"  (near miss: {near[0]!r})" if near else "")
