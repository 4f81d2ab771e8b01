"""A memory of your own: rows read by softmax attention, in about forty lines.

python examples/own_memory.py
python distill.py memory.kind=own_memory:RowAttention memory.num_rows=64    # from examples/
"""

from dataclasses import dataclass

import torch
from torch import nn

import dmt


@dataclass(frozen=True)
class RowAttentionConfig(dmt.MemoryConfig):
    """Settings of a `RowAttention`."""

    num_rows: int = dmt.bounded(64, minimum=1)
    """Rows of the memory."""
    scale: float = dmt.bounded(4.0, above=0)
    """Factor of the scores: the larger, the fewer rows have a weight."""


@dmt.register_memory("row_attention", config=RowAttentionConfig)
class RowAttention(dmt.MemoryLayer):
    """Every token reads all rows, weighted by softmax (Sukhbaatar 2019, arXiv 1907.01470)."""

    def __init__(self, width: int, config: RowAttentionConfig) -> None:
        super().__init__()
        self.scale = config.scale / width**0.5
        self.keys = nn.Parameter(torch.empty(config.num_rows, width))
        self.values = nn.Parameter(torch.empty(config.num_rows, width))
        self.output_bias = nn.Parameter(torch.empty(width))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.keys.normal_()
        self.values.normal_(std=0.02)
        self.output_bias.zero_()

    def load_block(self, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        if "output_bias" not in tensors:  # a Llama has none
            return {}
        self.output_bias.copy_(tensors["output_bias"])
        return {"output_bias": "output_bias"}

    def weights(self, hidden: torch.Tensor) -> torch.Tensor:
        return (self.scale * hidden @ self.keys.T).softmax(-1)

    def select(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights, ids = self.weights(hidden).topk(min(8, len(self.keys)))
        return ids, weights, self.values[ids]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weights(hidden) @ self.values + self.output_bias


if __name__ == "__main__":
    from transformers import GPT2Config, GPT2LMHeadModel

    from dmt.testing import check_memory

    check_memory(RowAttention, RowAttentionConfig(num_rows=8))
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128))
    student = dmt.convert(model, RowAttentionConfig(num_rows=32))
    print(student.transfer_report.summary())
