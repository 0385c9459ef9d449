"""Full attention in PyTorch: its fused kernel, forward or both ways."""

import json
import sys

import torch
import torch.nn.functional as F
import worker


def main() -> None:
  with open(sys.argv[1], encoding="utf-8") as file:
    sizes = json.load(file)
  torch.set_num_threads(sizes["threads"])
  torch.manual_seed(0)
  shape = (1, sizes["heads"], sizes["time"], sizes["head_dim"])
  backward = sizes["backward"]
  q, k, v = (torch.randn(shape, requires_grad=backward) for _ in range(3))
  weights = torch.randn(shape)

  def call() -> float:
    if not backward:
      with torch.no_grad():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[
          0, 0, 0, 0
        ].item()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    grads = torch.autograd.grad(out, (q, k, v), weights)
    return grads[0][0, 0, 0, 0].item()

  worker.serve(call, versions={"torch": torch.__version__})


if __name__ == "__main__":
  main()
