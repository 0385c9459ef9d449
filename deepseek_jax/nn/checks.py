"""Errors for sizes and fractions that no layer can work with."""


def require_positive(**sizes: int) -> None:
  """Raises `ValueError` naming the first size that is below 1.

  >>> require_positive(features=0)
  Traceback (most recent call last):
    ...
  ValueError: features must be an integer of at least 1, got features=0.
  """
  for name, size in sizes.items():
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
      raise ValueError(
        f"{name} must be an integer of at least 1, got {name}={size!r}."
      )


def require_fraction(**fractions: int | float) -> None:
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


def head_size(
  features: int, num_heads: int, num_kv_heads: int, head_dim: int | None
) -> int:
  """Returns the size of a head; raises `ValueError` if heads do not divide."""
  require_positive(
    features=features, num_heads=num_heads, num_kv_heads=num_kv_heads
  )
  if num_heads % num_kv_heads:
    raise ValueError(
      "num_kv_heads must divide num_heads, as groups of queries share keys, "
      f"got {num_kv_heads=} for {num_heads=}."
    )
  if head_dim is None:
    if features % num_heads:
      raise ValueError(
        "num_heads must divide features unless head_dim is given, got "
        f"{num_heads=} for {features=}."
      )
    head_dim = features // num_heads
  require_positive(head_dim=head_dim)
  return head_dim
