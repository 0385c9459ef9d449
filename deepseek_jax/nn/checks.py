"""Errors for sizes and fractions that no layer can work with."""


def require_positive(**sizes: int) -> None:
  """Raises `ValueError` naming the first size that is below 1.

  >>> require_positive(features=0)
  Traceback (most recent call last):
    ...
  ValueError: features must be an integer of at least 1, got features=0.
  """
  for name, size in sizes.items():
    if not isinstance(size, int) or size < 1:
      raise ValueError(
        f"{name} must be an integer of at least 1, got {name}={size!r}."
      )


def require_fraction(**fractions: float) -> None:
  """Raises `ValueError` naming the first fraction that is outside [0, 1).

  >>> require_fraction(dropout=1.0)
  Traceback (most recent call last):
    ...
  ValueError: dropout must be in [0, 1), got dropout=1.0.
  """
  for name, fraction in fractions.items():
    if not 0.0 <= fraction < 1.0:
      raise ValueError(f"{name} must be in [0, 1), got {name}={fraction!r}.")


def require_choice(choices: tuple[str | None, ...], **values: object) -> None:
  """Raises `ValueError` naming the first value that is not a choice.

  >>> require_choice(("last", "mean"), pooling="first")
  Traceback (most recent call last):
    ...
  ValueError: pooling must be one of 'last', 'mean', got pooling='first'.
  """
  for name, value in values.items():
    if value not in choices:
      listed = ", ".join(map(repr, choices))
      raise ValueError(f"{name} must be one of {listed}, got {name}={value!r}.")
