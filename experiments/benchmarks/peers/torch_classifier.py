"""The classifier and its training loop in PyTorch, as fast as it goes on CPU.

Batches are gathered from tensors in memory, which is several times faster than
a `DataLoader`; the optimizer is fused; the loss is read once an epoch.
"""

import torch
import torch.nn.functional as F
import worker
from torch import nn


class Attention(nn.Module):
  """Multi-head self-attention on normalized tokens, added to the tokens."""

  def __init__(self, features: int, sizes: dict):
    super().__init__()
    self.heads = sizes["num_heads"]
    width = self.heads * sizes["head_dim"]
    self.norm = nn.LayerNorm(features, eps=1e-6)
    self.query_key_value = nn.Linear(features, 3 * width)
    self.out = nn.Linear(width, features)
    self.dropout = nn.Dropout(sizes["dropout"])

  def forward(self, tokens):
    heads = self.query_key_value(self.norm(tokens))
    heads = heads.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    read = F.scaled_dot_product_attention(*heads)
    return tokens + self.dropout(self.out(read.transpose(1, 2).flatten(2)))


class Classifier(nn.Module):
  """Convolution stages, LSTM, attention, the last token, one linear layer."""

  def __init__(self, sizes: dict):
    super().__init__()
    _, width, channels = sizes["image_shape"]
    pool, dropout = sizes["pool"], sizes["dropout"]
    stages = []
    for features in sizes["channels"]:
      stages += [
        nn.Conv2d(channels, features, sizes["kernel_size"], padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(pool),
        nn.Dropout(dropout),
      ]
      channels, width = features, width // pool
    self.convolutions = nn.Sequential(*stages)
    self.rows = sizes["sequence"] == "rows"
    features = sizes["lstm_features"]
    self.lstm = nn.LSTM(
      width * channels if self.rows else channels, features, batch_first=True
    )
    # PyTorch adds two biases; the others have one.
    self.lstm.bias_hh_l0.requires_grad_(False).zero_()
    self.attention = Attention(features, sizes)
    self.dropout = nn.Dropout(dropout)
    self.head = nn.Linear(features, sizes["num_classes"])

  def forward(self, images):
    x = self.convolutions(images).permute(0, 2, 3, 1)
    x = x.flatten(2) if self.rows else x.flatten(1, 2)
    x = self.attention(self.dropout(self.lstm(x)[0]))
    return self.head(self.dropout(x[:, -1]))


def main() -> None:
  sizes, images, labels = worker.read()
  torch.set_num_threads(sizes["threads"])
  torch.manual_seed(sizes["seed"])
  x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
  y = torch.from_numpy(labels).long()
  model = Classifier(sizes)
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=sizes["learning_rate"],
    weight_decay=sizes["weight_decay"],
    fused=True,
  )
  forward = torch.compile(model) if sizes["compile"] else model

  def epoch() -> float:
    total = torch.zeros(())
    correct = torch.zeros((), dtype=torch.int64)
    for rows in torch.randperm(len(x)).split(sizes["batch_size"]):
      target = y[rows]
      logits = forward(x[rows])
      loss = F.cross_entropy(logits, target)
      optimizer.zero_grad(set_to_none=True)
      loss.backward()
      optimizer.step()
      total += loss.detach() * len(rows)
      correct += (logits.detach().argmax(-1) == target).sum()
    return total.item() / len(x)

  worker.serve(
    epoch,
    parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    versions={"torch": torch.__version__},
  )


if __name__ == "__main__":
  main()
