"""Paths, rules and finite arithmetic that every other room builds on."""

from deepseek_jax.core.arguments import is_number as is_number
from deepseek_jax.core.arguments import require_floating as require_floating
from deepseek_jax.core.arguments import require_in as require_in
from deepseek_jax.core.arguments import require_one_of as require_one_of
from deepseek_jax.core.arguments import require_static as require_static
from deepseek_jax.core.arguments import require_whole as require_whole
from deepseek_jax.core.numerics import Ema as Ema
from deepseek_jax.core.numerics import all_finite as all_finite
from deepseek_jax.core.numerics import ema_value as ema_value
from deepseek_jax.core.numerics import init_ema as init_ema
from deepseek_jax.core.numerics import safe_ratio as safe_ratio
from deepseek_jax.core.numerics import scale_tree as scale_tree
from deepseek_jax.core.numerics import select_tree as select_tree
from deepseek_jax.core.numerics import update_ema as update_ema
from deepseek_jax.core.tree import label_tree as label_tree
from deepseek_jax.core.tree import leaf_paths as leaf_paths
from deepseek_jax.core.tree import map_with_paths as map_with_paths
from deepseek_jax.core.tree import mask_tree as mask_tree
from deepseek_jax.core.tree import match_rules as match_rules
from deepseek_jax.core.tree import multiplier_tree as multiplier_tree
