"""A mixture of experts: of many feed-forwards, each token uses a few."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deepseek_jax.core import arguments
from deepseek_jax.nn import checks
from deepseek_jax.nn.activations import Activation
from deepseek_jax.nn.expert_balance import (
  Balance,
  balance_loss,
  moved_bias,
  with_loss,
)
from deepseek_jax.nn.expert_bank import ExpertBank
from deepseek_jax.nn.expert_loads import LoadReading
from deepseek_jax.nn.feed_forward import GatedFeedForward
from deepseek_jax.nn.routing import Gate, Routing, route


class ExpertBias(nnx.Variable):
  """Added to the scores of experts when they are chosen; float32, [E]."""


class MixtureOfExperts(nnx.Module):
  """Each token goes through the `top_k` of E feed-forwards that suit it best.

  y = Σ_k weight_k · expert_k(x) + shared(x). A router scores the experts, in
  float32; see `route`. Time and memory of a token are those of `top_k` +
  `num_shared` feed-forwards, whatever E is. Experts that are chosen seldom
  learn little, so something sees to `balance`:

  * "bias": scores get a bias when experts are chosen, which rises by
    `bias_rate` a call for those below the mean load and falls for those above.
    It is a variable of its own type, no parameter: optimizers do not see it,
    and it rests in evaluation mode. It asks nothing of the gradient; but a
    given `auxiliary_weight` adds the loss below, and both work together.
  * "auxiliary": `balance_loss` times `auxiliary_weight` is added to the loss.
    It reaches the gradient without being returned, see `with_loss` there for
    micro-batches.
  * "none".

  Loads are counted over the whole batch, on all devices; read them with
  `expert_loads`.

  On a mesh with an axis "expert", each device along it has E / its size of the
  experts, and tokens travel to them. A device may send `capacity_factor` ·
  tokens · `top_k` / E of its own tokens to an expert; choices beyond that are
  dropped, later tokens first: what a token does not get from an expert is
  missing, not made up for (the residual and the shared experts remain). With
  None nothing is dropped, and E / `top_k` times the bytes travel, nearly all of
  them empty: for tests. Without that axis nothing is ever dropped.

  The mesh is the current one, `jax.set_mesh(mesh)` around the call, or
  `jax.sharding.use_abstract_mesh(mesh.abstract_mesh)` while tracing; JAX's
  deprecated `with mesh:` makes none current, nor does where arrays lie.

  In training mode a call changes variables, which NNX forbids under `jax.vmap`:
  map `layer.eval()`. Some are whole numbers: in NNX's tree mode, which has no
  `nnx.DiffState`, write `nnx.grad(loss, allow_int=True)`.

  Parameters: `router/kernel` [D, E], `experts/gate` and `experts/up` [E, D, H],
  `experts/down` [E, H, D], and those of a `GatedFeedForward` in `shared`. Rules
  of placement cut E over "expert" and H over "tensor".

  >>> layer = MixtureOfExperts(16, 32, 8, rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((2, 5, 16))).shape
  (2, 5, 16)
  >>> from deepseek_jax import parallel
  >>> mesh = parallel.make_mesh(
  ...   parallel.MeshSpec(data=1, expert=2), jax.devices()[:2]
  ... )
  >>> with jax.set_mesh(mesh):
  ...   y = nnx.jit(lambda layer, x: layer(x))(layer, jnp.ones((2, 5, 16)))
  >>> tuple(y.sharding.spec)
  ('expert',)

  Args:
    features: D, size of a token, of inputs and outputs, at least 1.
    hidden: H, units of each expert, at least 1.
    num_experts: E, at least 1.
    top_k: experts of a token, from 1 to E.
    num_shared: experts that every token goes through besides, at least 0; they
      are one feed-forward of `num_shared` · `hidden` units.
    activation: a name in `nn.ACTIVATIONS`, or a function.
    capacity_factor: room at an expert in units of an equal share, above 0; None
      for as much as may be needed. 1.25 to 2 are usual.
    gate: "sigmoid" or "softmax", see `route`.
    balance: "bias", "auxiliary" or "none".
    bias_rate: of the bias, a call; above 0.
    auxiliary_weight: of the auxiliary loss, at least 0; None for 0.01 where
      it alone balances, and 0 elsewhere.
    dtype: of the computation and the result; parameters are float32.
    rngs: stream "params".

  Raises:
    ValueError: a number is out of its range, or a name is unknown.

  References:
    Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated
    Mixture-of-Experts Layer", 2017, https://arxiv.org/abs/1701.06538
    Lepikhin et al., "GShard", 2020, https://arxiv.org/abs/2006.16668 (experts
    on many devices; there later choices, here later tokens are dropped first)
    Dai et al., "DeepSeekMoE", 2024, https://arxiv.org/abs/2401.06066 (shared
    experts)
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    num_experts: int,
    *,
    top_k: int = 2,
    num_shared: int = 0,
    activation: str | Activation = "silu",
    capacity_factor: int | float | None = None,
    gate: Gate = "sigmoid",
    balance: Balance = "bias",
    bias_rate: int | float = 0.005,
    auxiliary_weight: int | float | None = None,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    _check(top_k, num_experts, num_shared, capacity_factor)
    checks.require_choice(("sigmoid", "softmax"), gate=gate)
    checks.require_choice(("bias", "auxiliary", "none"), balance=balance)
    arguments.require_in("(0, inf)", bias_rate=bias_rate)
    if auxiliary_weight is None:
      auxiliary_weight = 0.01 if balance == "auxiliary" else 0.0
    elif balance == "none":
      raise ValueError(
        "auxiliary_weight is for balance 'bias' or 'auxiliary', got "
        f"{auxiliary_weight} for {balance=}."
      )
    arguments.require_in("[0, inf)", auxiliary_weight=auxiliary_weight)
    self.experts = ExpertBank(
      features, hidden, num_experts, activation=activation, dtype=dtype,
      rngs=rngs,
    )  # fmt: skip
    self.router = nnx.Linear(
      features,
      num_experts,
      use_bias=False,
      # Of TPUs too, which would round to bfloat16: near choices would flip.
      precision=jax.lax.Precision.HIGHEST,
      rngs=rngs,
    )
    self.shared = (
      GatedFeedForward(
        features, num_shared * hidden, activation=activation, dtype=dtype,
        rngs=rngs,
      )
      if num_shared
      else None
    )  # fmt: skip
    self.bias = (
      ExpertBias(jnp.zeros(num_experts, jnp.float32))
      if balance == "bias"
      else None
    )
    self.reading = LoadReading(num_experts)
    self.num_experts = num_experts
    self.top_k = top_k
    self.capacity_factor = capacity_factor
    self.gate: Gate = gate
    self.balance: Balance = balance
    self.bias_rate = bias_rate
    self.auxiliary_weight = auxiliary_weight
    self.deterministic = False

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns the tokens' images.

    Args:
      x: tokens, at least one.

    Raises:
      ValueError: there are none, they are not of size D, or the mesh's axis
        "expert" does not divide the experts.
    """
    routing = self.route(x)
    y, dropped = self.experts(
      x, routing.chosen, routing.weights, self.capacity_factor
    )
    if self.shared is not None:
      y = y + self.shared(x)
    if self.deterministic:
      return y
    self.reading.take(routing.counts, dropped)
    if self.bias is not None:
      self.bias[...] = moved_bias(
        self.bias[...], routing.counts, self.bias_rate
      )
    if self.auxiliary_weight:
      loss = balance_loss(routing.shares, routing.counts)
      y = with_loss(y, self.auxiliary_weight * loss)
    return y

  def route(self, x: Float[Array, "*B D"]) -> Routing:
    """Returns the experts of every token, and their weights.

    Args:
      x: tokens, at least one.

    Raises:
      ValueError: there are none, or they are not of size D.
    """
    features = self.router.in_features
    if jnp.shape(x)[-1:] != (features,) or not jnp.size(x):
      raise ValueError(
        f"x must be tokens of {features} features, [..., {features}], at least "
        f"one, got shape {jnp.shape(x)}."
      )
    bias = None if self.bias is None else self.bias[...]
    logits = self.router(x.astype(jnp.float32))
    return route(logits, self.top_k, gate=self.gate, bias=bias)

  def decode(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Returns the same; of few tokens only their experts are read."""
    return self(x)


def _check(
  top_k: int,
  num_experts: int,
  num_shared: int,
  capacity_factor: int | float | None,
) -> None:
  """Raises `ValueError` for numbers that no mixture can have."""
  checks.require_positive(num_experts=num_experts, top_k=top_k)
  if top_k > num_experts:
    raise ValueError(
      "top_k must be at most num_experts, as no token goes to an expert twice, "
      f"got {top_k=} for {num_experts=}."
    )
  arguments.require_static(0, num_shared=num_shared)
  if capacity_factor is not None:
    arguments.require_in("(0, inf)", capacity_factor=capacity_factor)
