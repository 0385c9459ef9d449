"""Two functions of a tree to descend, a smooth one and a bent one."""

import jax
import jax.numpy as jnp
import optax


def quadratic(params, target):
  gaps = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
  return sum(jax.tree.leaves(gaps))


def rosenbrock(params, target):
  """The sum over pairs of elements, moved so that `target` is the minimum."""

  def leaf_loss(p, t):
    x, y = (p - t + 1).reshape(-1, 2).T
    return jnp.sum((1 - x) ** 2 + 100 * (y - x**2) ** 2)

  return sum(jax.tree.leaves(jax.tree.map(leaf_loss, params, target)))


def descend(tx, loss, start, steps):
  """Returns the parameters after some updates."""

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, value=value)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(params):
    carry = params, tx.init(params)
    (params, _), _ = jax.lax.scan(step, carry, length=steps)
    return params

  return run(start)


def at_start(target):
  """Where a descent starts: Rosenbrock's (-1.2, 1), as seen from (1, 1)."""
  offset = jnp.tile(jnp.array([-2.2, 0.0]), target.size // 2)
  return target + offset.reshape(target.shape)
