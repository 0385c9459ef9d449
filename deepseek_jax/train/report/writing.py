"""What a language model wrote, and how it compares with compressors."""

from typing import Any

from deepseek_jax.train.report import html as page
from deepseek_jax.train.report.run import Run


def sections(run: Run) -> str:
  """Bits per byte beside those of compressors, and samples; or nothing."""
  if run.writing is None:
    return ""
  cards = [
    '<div class="card">' + _sample(sample) + "</div>"
    for sample in run.writing["samples"]
  ]
  table = f'<div class="card">{_comparison(run)}</div>'
  return f"<h2>Text</h2>{table}{page.grid(cards)}"


def _comparison(run: Run) -> str:
  """Bits per byte of the test text, fewest first."""
  metrics = (run.result or {}).get("metrics") or {}
  found = dict(run.writing["compressors"]) if run.writing else {}
  if (own := metrics.get("test/bits_per_byte")) is not None:
    found["this model"] = own
  largest = max(found.values(), default=1)
  rows = [
    (page.text(name), page.bar(bits / largest), page.number(bits))
    for name, bits in sorted(found.items(), key=lambda item: item[1])
  ]
  return page.table(("test text", "", "bits per byte"), rows, numeric=1)


def _sample(sample: dict[str, Any]) -> str:
  """The prompt, then what the model added, line by line."""
  lines = lambda value: "\n".join(map(page.text, str(value).split("\n")))
  prompt = f"<b>{lines(sample['prompt'])}</b>" if sample["prompt"] else ""
  return f"<pre>{prompt}{lines(sample['text'])}</pre>"
