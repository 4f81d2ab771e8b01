"""No memory: every token receives the mean output of the block, the control of what blocks add."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dmt.config import NoMemoryConfig
from dmt.memory.base import MemoryLayer, load_output_bias
from dmt.memory.registry import register_memory


@register_memory("none", config=NoMemoryConfig)
class NoMemory(MemoryLayer):
    """A layer that adds the same vector to every token: nothing is read.

    It begins as the output bias of the block; calibration makes it the block's mean output, the
    best constant. All that the block computes from its input is lost.

    Args:
        width: size of a hidden state.
        config: has no settings.
    """

    def __init__(self, width: int, config: NoMemoryConfig) -> None:
        super().__init__()
        self.output_bias = nn.Parameter(torch.empty(width))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Set the output to zero."""
        self.output_bias.zero_()

    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Take over the output bias of the block, where it has one."""
        return load_output_bias(self.output_bias, tensors)

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Set the output to the mean of the block's."""
        self.output_bias.copy_(target.mean(0))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        return self.output_bias.to(hidden.dtype).expand_as(hidden)
