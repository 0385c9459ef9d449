"""A language model of bytes, on the Python standard library's own source text.

Some 10 million bytes to learn from; under five minutes on two CPU cores from
the first byte to bits per byte on files it has not seen, and text of its own.

  deepseek-jax train experiments/byte_lm.py
  deepseek-jax generate runs/byte_lm --prompt "def "
"""

from deepseek_jax.train import (
  LanguageExperiment,
  LanguageModel,
  Optimizer,
  Text,
  Train,
)

experiment = LanguageExperiment(
  data=Text(name="python_text", length=256, batch_size=16, validation=0.1),
  model=LanguageModel(features=128, num_layers=4, num_heads=2),
  optimizer=Optimizer(name="deepseek", learning_rate=1e-2, warmup_steps=20),
  train=Train(
    epochs=None,
    steps=550,
    accumulate=2,  # Half of the activations at a time: they stay in the caches.
    evaluate_every=110,
    log_every=10,
    monitor="validation/bits_per_byte",
  ),
  seed=0,
  workdir="runs/byte_lm",
)
