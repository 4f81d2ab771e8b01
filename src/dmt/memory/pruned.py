"""A pruned block: fewer neurons, all read, the control of what choosing by token adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmt.config import PrunedConfig
from dmt.memory.base import BlockShape
from dmt.memory.neuron_table import NeuronTable
from dmt.memory.registry import register_memory
from dmt.memory.slot_table import DEFAULT_K_DIVISOR
from dmt.ops import linear


@register_memory("pruned", config=PrunedConfig)
class PrunedMemory(NeuronTable):
    """A layer with the `num_slots` neurons of the block whose outputs vary most, all read.

    It is exact when `num_slots` is the number of the block's neurons. Of the neurons that are left
    out it keeps the mean output, in the output bias.

    Args: those of `NeuronTable`, where `k` is `num_slots`.

    Source: He et al. 2014, ICASSP (neurons ranked by what they send on); the ranking by variance,
        and the mean that stays, are those of `dmt.models.conversion.resize_neurons`.
    """

    def __init__(
        self, width: int, num_slots: int, *, gated: bool, activation_function: str
    ) -> None:
        super().__init__(
            width, num_slots, num_slots, gated=gated, activation_function=activation_function
        )
        self.reset()

    @classmethod
    def make_arguments(cls, config: PrunedConfig, block: BlockShape) -> dict[str, Any]:
        """Return the arguments of a memory that replaces `block`, but for `width` and `gated`."""
        arguments = super().make_arguments(config, block)
        return {
            "num_slots": config.num_slots or max(1, block.num_neurons // DEFAULT_K_DIVISOR),
            "activation_function": arguments["activation_function"],
        }

    def find_slots(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Return every slot."""
        return torch.arange(self.num_slots, device=hidden.device).expand(hidden.shape[0], -1), None

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        flat = hidden.reshape(-1, self.width)
        self._record_reads(self.find_slots(flat)[0], flat.shape[0])
        weights = self.compute_weights(flat, self.compute_scores(flat))
        return linear(weights, self.values.t(), self.output_bias).view_as(hidden)
