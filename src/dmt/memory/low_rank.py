"""A linear map of low rank: the control of what a block does beyond a small matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmt.config import LowRankConfig
from dmt.memory.base import BlockShape, MemoryLayer, load_output_bias
from dmt.memory.registry import register_memory
from dmt.ops import fit_reduced_rank, linear
from dmt.validation import ARG, ArgumentError

# rank = width / 16 where the config leaves it empty.
DEFAULT_RANK_DIVISOR = 16


@register_memory("low_rank", config=LowRankConfig)
class LowRankMemory(MemoryLayer):
    """A layer that computes `up @ down @ hidden + output_bias`: no rows, no choice, no activation.

    Calibration makes it the best map of its rank on the calibration text, by reduced-rank
    regression. What the block does beyond a linear map is lost. Without calibration it begins as
    the block's output bias.

    Args:
        width: size of a hidden state.
        config: its settings; `rank` is a number.

    Source: Izenman 1975, Journal of Multivariate Analysis 5 (reduced-rank regression).
    """

    def __init__(self, width: int, config: LowRankConfig) -> None:
        super().__init__()
        assert config.rank is not None, "set by make_arguments"
        self.down = nn.Parameter(torch.empty(config.rank, width))
        self.up = nn.Parameter(torch.empty(width, config.rank))
        self.output_bias = nn.Parameter(torch.empty(width))
        self.reset()

    @classmethod
    def make_arguments(cls, config: LowRankConfig, block: BlockShape) -> dict[str, Any]:
        """Return the rank.

        Raises:
            ArgumentError: it is larger than the width.
        """
        if config.rank is not None and config.rank > block.width:
            raise ArgumentError(
                f"{ARG}rank must be in [1, {block.width}], the width of the model, got "
                f"{config.rank}"
            )
        return {"rank": config.rank or max(1, block.width // DEFAULT_RANK_DIVISOR)}

    @torch.no_grad()
    def reset(self) -> None:
        """Draw a random `down`; the output is zero."""
        nn.init.normal_(self.down, std=1 / math.sqrt(self.down.shape[1]))
        self.up.zero_()
        self.output_bias.zero_()

    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Take over the output bias of the block, where it has one."""
        return load_output_bias(self.output_bias, tensors)

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Fit the map to the block by reduced-rank regression."""
        down, up = fit_reduced_rank(
            hidden - hidden.mean(0), target - target.mean(0), len(self.down)
        )
        self.down.copy_(down.t())
        self.up.copy_(up.t())
        self.output_bias.copy_(target.mean(0) - self.up @ (self.down @ hidden.mean(0)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        return linear(linear(hidden, self.down), self.up, self.output_bias)
