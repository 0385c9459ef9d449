"""Names for the types that every room passes to the next.

Shape letters in annotations, everywhere in the library: B batch, T query time,
S key time, D model, N heads, K key-value heads, H head size, C channels.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from jaxtyping import Array, Bool, Float32, Int32

Value = TypeVar("Value")

# Any pytree of arrays. JAX checks the structure; Python has no type for it.
Params: TypeAlias = Any
PyTree: TypeAlias = Any

# "stages/0/kernel"
Path: TypeAlias = str
# Ordered (regular expression, value) pairs; the first match decides.
Rules: TypeAlias = Sequence[tuple[str, Value]]

# Scalars on the device. Inside `vmap` they are scalars still.
Flag: TypeAlias = Bool[Array, ""]
Count: TypeAlias = Int32[Array, ""]
Scalar: TypeAlias = Float32[Array, ""]
