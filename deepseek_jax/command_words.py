"""Words of a command line: which are a command's own, and which of the file.

`train`, `launch` and `preflight` take flags that only FILE knows. What may be
mistaken for them is found here, before anything is read.
"""

import difflib
from collections.abc import Mapping, Sequence

_OF_LAUNCH = ("-n", "--num-processes", "--devices-per-process")
_OF_LAUNCH += ("--grace-seconds",)


def check_command(args: Sequence[str], commands: Mapping[str, object]) -> None:
  """Refuses a first word that is no command; names the nearest.

  Args:
    args: All words.
    commands: By name.

  Raises:
    ValueError: If it is none; flags and no word at all pass.
  """
  if not args or args[0].startswith("-") or args[0] in commands:
    return
  near = difflib.get_close_matches(args[0], commands, n=1)
  hint = f" Did you mean {near[0]!r}?" if near else ""
  raise ValueError(
    f"unknown command {args[0]!r}, known are {', '.join(commands)}.{hint}"
  )


def of_train(words: Sequence[str]) -> list[str]:
  """Returns the words of `train` with FILE in front.

  >>> of_train(["--dry-run", "digits.py", "--seed", "1"])
  ['digits.py', '--dry-run', '--seed', '1']

  Args:
    words: Behind `train`.

  Raises:
    ValueError: If another flag comes before FILE: nobody can tell yet whether
      the word behind it is its value.
  """
  early = [word for word in words[:1] if word == "--dry-run"]
  words = [*words[len(early) :]]
  if not words or words[0] in ("-h", "--help"):
    return words
  if words[0].startswith("-"):
    raise ValueError(
      "FILE must come before its flags, as in `train FILE --train.epochs 5`, "
      f"got {words[0]!r} before it."
    )
  return [words[0], *early, *words[1:]]


def of_launch(words: Sequence[str]) -> tuple[list[str], list[str]]:
  """Cuts the words of `launch` behind FILE: the rest are flags of `train`.

  >>> of_launch(["-n", "2", "digits.py", "--seed", "1"])
  (['-n', '2', 'digits.py'], ['--seed', '1'])

  Args:
    words: Behind `launch`.

  Raises:
    ValueError: If a flag of `launch` comes behind FILE.
  """
  end = len(words)
  for i, word in enumerate(words):
    before = words[i - 1] if i else ""
    if word[:1] != "-" and (before[:1] != "-" or "=" in before):
      end = i + 1
      break
  for word in words[end:]:
    if word.partition("=")[0] in _OF_LAUNCH:
      raise ValueError(
        f"{word} must come before FILE, as in `launch -n 2 FILE`, got it "
        f"behind {words[end - 1]!r}, where flags of `train` are."
      )
  return [*words[:end]], [*words[end:]]


def check_topology(words: Sequence[str]) -> None:
  """Refuses words of `preflight` without --topology, but one that is near it.

  Args:
    words: Behind FILE.

  Raises:
    ValueError: Naming the word.
  """
  flags = [word.partition("=")[0] for word in words if word[:2] == "--"]
  near = difflib.get_close_matches("--topology", flags, n=1, cutoff=0.75)
  if near and near[0] != "--topology":
    raise ValueError(f"unknown flag {near[0]!r}, did you mean '--topology'?")
