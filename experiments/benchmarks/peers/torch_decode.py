"""Full attention of one token to a cache in PyTorch: its fused kernel."""

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
  q, k, v = (
    torch.randn(1, sizes["heads"], time, sizes["head_dim"])
    for time in (1, sizes["time"], sizes["time"])
  )

  def calls() -> float:
    with torch.no_grad():
      attend = lambda: F.scaled_dot_product_attention(q, k, v)
      outs = [attend() for _ in range(sizes["calls"])]
    return outs[-1][0, 0, 0, 0].item()

  worker.serve(calls, versions={"torch": torch.__version__})


if __name__ == "__main__":
  main()
