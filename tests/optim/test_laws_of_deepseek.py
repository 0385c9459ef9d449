"""The laws, for the recipe."""

from laws import RULES, Case, Laws

from deepseek_jax import optim

# Whitening amplifies the rounding in small singular values.
AMPLIFIED = {"rtol": 1e-4, "atol": 2e-5}


def recipe(is_variant=False, **arguments):
  # Its decay would shift the minimum.
  arguments = {"learning_rate": 0.05, "weight_decay": 1e-4} | arguments
  return Case(
    optim.deepseek, arguments, tolerance=AMPLIFIED, is_variant=is_variant
  )


RECIPES = {
  "default": recipe(),
  "bare": recipe(is_variant=True, average=0, cap=0),
  "all_parts": recipe(
    is_variant=True,
    warmup_steps=5,
    layer_rules=RULES,
    loss_power=0.5,
    snr_power=0.5,
    moment_dtype="int8",
  ),
}


class TestDeepseek(Laws):
  cases = RECIPES
