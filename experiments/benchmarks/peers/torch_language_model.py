"""The language model and its step in PyTorch, as fast as it goes on CPU.

One product for queries, keys and values and one for both halves of the gated
feed-forward; the fused attention, which skips the future unless documents must
be told apart by a mask; the fused optimizer. It starts from the weights of the
library's model.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
import worker
from torch import nn


class Layer(nn.Module):
  """x + attention(norm(x)), then x + feed-forward(norm(x)); causal."""

  def __init__(self, features: int, hidden: int, heads: int):
    super().__init__()
    self.heads = heads
    linear = lambda *shape: nn.Linear(*shape, bias=False)
    self.attention_norm = nn.RMSNorm(features, eps=1e-6)
    self.query_key_value = linear(features, 3 * features)
    self.out = linear(features, features)
    self.feed_forward_norm = nn.RMSNorm(features, eps=1e-6)
    self.gate_inward = linear(features, 2 * hidden)
    self.outward = linear(hidden, features)

  def forward(self, x, cos, sin, same):
    """Returns tokens that know their past."""
    heads = self.query_key_value(self.attention_norm(x))
    heads = heads.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    turned, v = heads[:2], heads[2]  # Queries and keys at once.
    a, b = turned.chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    read = F.scaled_dot_product_attention(
      turned[0], turned[1], v, attn_mask=same, is_causal=same is None
    )
    x = x + self.out(read.transpose(1, 2).flatten(2))
    gate, inward = self.gate_inward(self.feed_forward_norm(x)).chunk(2, -1)
    return x + self.outward(F.silu(gate) * inward)


class LanguageModel(nn.Module):
  """Embedding, layers, norm, and the embedding again as the head."""

  def __init__(self, sizes: dict):
    super().__init__()
    features, time = sizes["features"], sizes["length"]
    self.separator = sizes["separator"]
    self.embedding = nn.Embedding(sizes["vocab"], features)
    self.layers = nn.ModuleList(
      Layer(features, sizes["hidden"], sizes["heads"])
      for _ in range(sizes["layers"])
    )
    self.norm = nn.RMSNorm(features, eps=1e-6)
    half = features // sizes["heads"] // 2
    frequency = 10_000.0 ** (-torch.arange(half) / half)
    angle = torch.arange(time)[:, None] * frequency
    self.register_buffer("cos", angle.cos())
    self.register_buffer("sin", angle.sin())
    self.register_buffer("past", torch.ones(time, time).tril().bool())

  def forward(self, tokens):
    """Returns for each token the logits of the one after it."""
    same = None
    if self.separator is not None:
      number = (tokens == self.separator).cumsum(1)
      same = (number[:, None, :, None] == number[:, None, None]) & self.past
    x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
    for layer in self.layers:
      x = layer(x, self.cos, self.sin, same)
    return F.linear(self.norm(x), self.embedding.weight)


def load_weights(model: LanguageModel, path: str) -> None:
  """Copies the weights of the library's model."""
  with np.load(path) as arrays:
    held = {name: torch.from_numpy(arrays[name]) for name in arrays}

  def kernels(place, *names):
    return torch.cat([held[f"{place}/{n}/kernel"].T for n in names])

  state = {
    "embedding.weight": held["embedding/embedding"],
    "norm.weight": held["norm/scale"],
  }
  for i in range(len(model.layers)):
    place = f"layers/layers/{i}"
    attention, think = f"{place}/attention", f"{place}/feed_forward"
    state |= {
      f"layers.{i}.{name}": value
      for name, value in {
        "attention_norm.weight": held[f"{place}/attention_norm/scale"],
        "query_key_value.weight": kernels(attention, "query", "key", "value"),
        "out.weight": kernels(attention, "out"),
        "feed_forward_norm.weight": held[f"{place}/feed_forward_norm/scale"],
        "gate_inward.weight": torch.cat(
          [kernels(think, "gate"), held[f"{think}/inward"]]
        ),
        "outward.weight": kernels(think, "outward"),
      }.items()
    }
  state |= {name: getattr(model, name) for name in ("cos", "sin", "past")}
  model.load_state_dict(state)


def main() -> None:
  sizes, tokens, targets = worker.read()
  torch.set_num_threads(sizes["threads"])
  model = LanguageModel(sizes)
  load_weights(model, sizes["weights"])
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=sizes["learning_rate"],
    weight_decay=sizes["weight_decay"], fused=True,
  )  # fmt: skip
  forward = torch.compile(model) if sizes["compile"] else model
  # [steps, B, T]
  x, y = torch.from_numpy(tokens).long(), torch.from_numpy(targets).long()

  def mean_loss(step):
    logits = forward(x[step % len(x)])
    return F.cross_entropy(logits.flatten(0, 1), y[step % len(x)].flatten())

  done = 0

  def step() -> float:
    nonlocal done
    loss = mean_loss(done)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    done += 1
    return loss.item()

  with torch.no_grad():
    first = mean_loss(0).item()
  worker.serve(
    step,
    loss=first,
    parameters=sum(p.numel() for p in model.parameters()),
    versions={"torch": torch.__version__},
  )


if __name__ == "__main__":
  main()
