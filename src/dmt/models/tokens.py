"""Memory tokens: embeddings that stand before every text and are no words. A model reads them and never says them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class MemoryTokens(nn.Embedding):
    """A model's table of embeddings, whose rows the head may share, and `count` more that it does not.

    Args:
        vocabulary, width: of the table `(vocabulary, width)`.
        count: memory tokens, `memory` `(count, width)`.
        first: token id of the first of them, at least as large as that of any word.
    """

    def __init__(self, vocabulary: int, width: int, count: int, first: int) -> None:
        super().__init__(vocabulary, width)
        self.first = first
        self.memory = nn.Parameter(torch.empty(count, width).normal_(std=0.02))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `(...)` to `(..., width)`."""
        which = ids - self.first
        words = super().forward(ids.clamp_max(min(self.first, self.num_embeddings) - 1))
        return torch.where((which >= 0).unsqueeze(-1), self.memory[which.clamp_min(0)].to(words.dtype), words)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, memory={len(self.memory)}"


def tokens_of(model: PreTrainedModel) -> MemoryTokens | None:
    """A model's memory tokens, where it has any."""
    found = model.get_input_embeddings()
    return found if isinstance(found, MemoryTokens) else None


@torch.no_grad()
def begin_with(model: PreTrainedModel, ids: Tensor) -> None:
    """Let memory tokens begin as the embeddings of words with these ids `(n,)`, repeated as often as needed."""
    memory = tokens_of(model)
    assert memory is not None, "the model has memory tokens"
    memory.memory.copy_(memory.weight[ids.repeat(-(-len(memory.memory) // len(ids)))[: len(memory.memory)]])
