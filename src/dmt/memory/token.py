"""Token memory: a table with a row for each token of the vocabulary, read without any search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from dmt.config import TokenConfig
from dmt.memory.base import BlockShape, MemoryLayer
from dmt.memory.lookup_table import LookupTable
from dmt.memory.registry import register_memory
from dmt.memory.token_context import get_contexts

# Tokens of text that weigh as much as what the block computes for the token alone.
PRIOR_COUNT = 1.0


@register_memory("token", config=TokenConfig)
class TokenMemory(MemoryLayer):
    """A layer that adds the row of the token itself: what a block computes for it on average.

    It begins as what the block computes for each token at the start of a text; calibration moves
    the rows of tokens in its text to the mean of the block's outputs for them. All that the block
    computes from the tokens before is lost. As the first part of `sum`, before a small block of
    its own, it is the flexible variant of the source.

    Args:
        width: size of a hidden state.
        vocab_size: tokens of the vocabulary. A token beyond it reads no row.
        value_dtype: type of saved rows.
        offload: `values` leaves the rows of a saved student on disk.

    Source: Jaiswal et al. 2026, arXiv 2602.00398.
    """

    row_kind = "token"

    def __init__(
        self,
        width: int,
        vocab_size: int,
        *,
        value_dtype: str = "float32",
        offload: str = "none",
    ) -> None:
        super().__init__()
        self.table = LookupTable(vocab_size, width, value_dtype=value_dtype, offload=offload)
        self.output_bias = nn.Parameter(torch.empty(width))
        self.reset()

    @classmethod
    def make_arguments(cls, config: TokenConfig, block: BlockShape) -> dict[str, Any]:
        """Return the size of the vocabulary and how rows are saved."""
        return {
            "vocab_size": block.vocab_size,
            "value_dtype": config.value_dtype,
            "offload": config.offload,
        }

    @classmethod
    def from_arguments(cls, width: int, gated: bool, arguments: Mapping[str, Any]) -> Self:
        """Create the memory from the values of `make_arguments`."""
        return cls(width, **arguments)

    @property
    def context_length(self) -> int:
        """The token itself."""
        return 1

    @torch.no_grad()
    def reset(self) -> None:
        """Set the output to zero."""
        for parameter in self.parameters():
            parameter.zero_()

    @property
    def reads_token_outputs(self) -> bool:
        """Whether it begins as what the block computes for each token."""
        return True

    @torch.no_grad()
    def load_token_outputs(self, outputs: Tensor) -> None:
        """Set each row to what the block computes for its token."""
        self.output_bias.copy_(outputs.mean(0))
        self.table.rows.copy_(outputs - self.output_bias)

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Move the rows of the tokens of a text to the mean of the block's outputs for them."""
        ids, is_known = self._find_rows(hidden.shape[:-1])
        mean = target.mean(0)
        rows = self.table.rows
        rows.add_(self.output_bias - mean)
        self.output_bias.copy_(mean)
        ids = ids[is_known]
        rows.mul_(PRIOR_COUNT).index_add_(0, ids, target[is_known] - self.output_bias)
        counts = ids.bincount(minlength=len(rows)) + PRIOR_COUNT
        rows.div_(counts.unsqueeze(-1))

    def prefetch(self, shape: torch.Size) -> None:
        """Read the rows of the coming pass ahead, where they are on disk."""
        if self.table.is_on_disk:
            ids, is_known = self._find_rows(shape)
            self.table.prefetch(ids[is_known])

    def _find_rows(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the row of each token, and whether it has one."""
        ids = get_contexts(1, shape)[..., 0]
        is_known = (ids >= 0) & (ids < self.table.num_rows)
        return ids.where(is_known, 0), is_known

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        ids, is_known = self._find_rows(hidden.shape[:-1])
        rows = self.table(ids, self.output_bias.dtype) * is_known.unsqueeze(-1)
        return (rows + self.output_bias).to(hidden.dtype)

    def select(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the row that each token reads."""
        ids, is_known = self._find_rows(hidden.shape[:-1])
        rows = self.table(ids, self.output_bias.dtype)
        return ids.unsqueeze(-1), is_known.to(rows).unsqueeze(-1), rows.unsqueeze(-2)
