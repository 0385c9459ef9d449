"""A chain of named parts whose state any library can save."""

import optax


def named_chain(
  *parts: tuple[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """`optax.named_chain` with a plain dictionary of states.

  The original keeps them in an `OrderedDict`, which `flax.serialization` cannot
  save.

  Args:
    *parts: Pairs of a name and a transform, in the order they act.

  Returns:
    An `optax.GradientTransformationExtraArgs`.

  >>> tx = named_chain(("clip", optax.clip(1.0)), ("rate", optax.scale(-0.1)))
  >>> sorted(tx.init({"bias": 0.0}))
  ['clip', 'rate']
  """
  transforms = {name: optax.with_extra_args_support(tx) for name, tx in parts}

  def init_fn(params):
    return {name: tx.init(params) for name, tx in transforms.items()}

  def update_fn(updates, state, params=None, **extra_args):
    new_state = {}
    for name, tx in transforms.items():
      updates, new_state[name] = tx.update(
        updates, state[name], params, **extra_args
      )
    return updates, new_state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
