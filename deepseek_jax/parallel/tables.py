"""Rule tables of this library's models, and one for all others.

Matrices are cut as in Megatron: those that read a token's vector (queries,
keys, values, gate) by their units over "tensor", and those that write it (out,
outward) by what they read, so that a block needs one sum over "tensor". The
other dimension is cut over "fsdp". Vectors and small state are whole.

Every table ends in `DEFAULT`, for parts that a user exchanged.
"""

from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.rules import Largest, Preferred, Rules


def _fit(*dims: str | tuple[str, ...] | None) -> Preferred:
  return Preferred(P(*dims))


DEFAULT: Rules = ((r".*", Largest(("fsdp",))),)
"""Any model: what is large is cut over "fsdp", all else is whole."""

_RANDOM: Rules = ((r"(.*/)?rngs/.*", _fit()),)

_ATTENTION: Rules = (
  (r".*/attention/(query|key|value)/kernel", _fit("fsdp", "tensor")),
  (r".*/attention/out/kernel", _fit("tensor", "fsdp")),
  # Every device hashes with the same directions.
  (r".*/attention/(projections|learned_window/.*|annealing/.*)", _fit()),
)

_NORMS: Rules = ((r"(.*/)?(norm|\w+_norm)/(scale|bias|mean|var)", _fit()),)

_FEED_FORWARD = r".*/feed_forward(/shared)?"

_EXPERTS: Rules = (
  (r".*/feed_forward/experts/(gate|up)", _fit("expert", "fsdp", "tensor")),
  (r".*/feed_forward/experts/down", _fit("expert", "tensor", "fsdp")),
  # Every device scores all experts for its own tokens.
  (r".*/feed_forward/(router/kernel|bias|reading/.*)", _fit()),
)

LANGUAGE_MODEL: Rules = (
  (r"embedding/embedding", _fit("tensor", "fsdp")),
  (r"head/kernel", _fit("fsdp", "tensor")),
  *_ATTENTION,
  *_NORMS,
  (rf"{_FEED_FORWARD}/gate/kernel", _fit("fsdp", "tensor")),
  # Both have a row for each unit.
  (rf"{_FEED_FORWARD}/(inward|outward/kernel)", _fit("tensor", "fsdp")),
  *_EXPERTS,
  # Thresholds, and what they count: a scalar, or a number for each unit.
  (rf"{_FEED_FORWARD}/activation/.*", _fit()),
  *_RANDOM,
  *DEFAULT,
)
"""`models.LanguageModel`."""

CLASSIFIER: Rules = (
  (r"inputs/.*/convolution/kernel", _fit(None, None, "fsdp", "tensor")),
  (r"inputs/.*/convolution/bias", _fit("tensor")),
  # Four gates lie side by side: cut over "tensor", every step of the scan would
  # have to exchange them.
  (r".*/recurrent/.*_kernel", _fit("fsdp")),
  (r".*/recurrent/.*bias", _fit()),
  *_ATTENTION,
  (r".*/attention/(query|key|value)/bias", _fit("tensor")),
  (r".*/attention/out/bias", _fit()),
  *_NORMS,
  (r"decision/(pool/score|linear)/kernel", _fit("fsdp")),
  (r"decision/linear/bias", _fit()),
  *_RANDOM,
  *DEFAULT,
)
"""`models.Classifier`."""
