"""PEER: a block's own neurons, each an expert, found by product keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmt.config import PeerConfig, round_up_to_square
from dmt.memory.base import BlockShape
from dmt.memory.clustering import arrange_in_grid
from dmt.memory.neuron_table import NeuronTable
from dmt.memory.product_keys import ProductKeyQuery
from dmt.memory.registry import register_memory
from dmt.memory.slot_table import DEFAULT_K_DIVISOR, take_neurons
from dmt.ops import fit_reduced_rank

# How far below the mean contribution, in standard deviations, a head is told that neurons of the
# other heads are, so that at first each head finds neurons of its own.
OTHER_HEADS_DEVIATIONS = 3.0


@register_memory("peer", config=PeerConfig)
class PeerMemory(NeuronTable):
    """A layer that reads k neurons, found among n^2 by product keys; a neuron is an expert.

    Experts are the neurons of the block, and neurons that add nothing yet where n^2 is more. With
    all of them read the layer is the block exactly; with fewer it loses the neurons that are not
    read, but for their mean.

    Gates are `k softmax(gate_scale * scores)` over what a head reads. The factor begins at zero, so
    at first every gate is 1 and a neuron weighs what it does in the block; the factor and then,
    through the gates, queries and sub-keys have their true gradients. The paper's gates do not add
    up to k, which would make the block's neurons k times as weak. A neuron that several heads find
    has the mean of their gates, not their sum.

    Calibration arranges neurons in a grid, similar keys in a row, and fits queries and sub-keys by
    reduced-rank regression so that a pair's score predicts |weight| x |value|; at first each head
    looks for neurons in some of the rows.

    Args:
        width: size of a hidden state.
        num_slots: experts, a square number.
        k: neurons read per token, over all heads together.
        heads: queries, each with its own sub-keys; they share the neurons.
        key_width: size of a query.
        gated: whether a neuron has a second, linear score, its gain (SwiGLU blocks).
        activation_function: the block's function, by its transformers name.
        saved_rows: `value_dtype` and `offload`, as `NeuronTable` has them.

    Raises:
        ArgumentError: an argument is out of range, or two of them contradict each other.

    Source: He 2024, arXiv 2407.04153.
    """

    def __init__(
        self,
        width: int,
        num_slots: int,
        k: int,
        *,
        heads: int,
        key_width: int,
        gated: bool,
        activation_function: str,
        **saved_rows: str,
    ) -> None:
        PeerConfig(num_slots=num_slots, k=k, heads=heads, key_width=key_width)  # checks them
        super().__init__(
            width, num_slots, k, gated=gated, activation_function=activation_function, **saved_rows
        )
        self.num_heads = heads
        self.router = ProductKeyQuery(
            width, math.isqrt(num_slots), heads, key_width, has_cosines=False
        )
        self.gate_scale = nn.Parameter(torch.empty(heads))
        self.reset()

    @classmethod
    def make_arguments(cls, config: PeerConfig, block: BlockShape) -> dict[str, Any]:
        """Return the arguments of a memory that replaces `block`, but for `width` and `gated`.

        Raises:
            ArgumentError: the settings do not fit the block.
        """
        arguments = super().make_arguments(config, block)
        k = block.num_neurons // DEFAULT_K_DIVISOR // config.heads * config.heads
        return arguments | {
            "num_slots": config.num_slots or round_up_to_square(block.num_neurons),
            "k": config.k or max(config.heads, k),
            "heads": config.heads,
            "key_width": config.key_width or block.width // 2 * 2,
        }

    @torch.no_grad()
    def reset(self) -> None:
        """Draw random neurons and keys; every gate is 1."""
        super().reset()
        self.router.reset()
        nn.init.zeros_(self.gate_scale)

    @torch.no_grad()
    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Take over the neurons of a block, in the order of the grid."""
        order = arrange_in_grid(tensors["keys"], self.router.num_sub_keys)
        return super().load_block(take_neurons(tensors, order))

    @torch.no_grad()
    def fit_selection(self, hidden: Tensor, target: Tensor) -> None:
        """Fit queries and sub-keys to what each neuron contributes on the teacher's inputs."""
        router, num_sub_keys, mean = self.router, self.router.num_sub_keys, hidden.mean(0)
        weights = self.compute_weights(hidden, self.compute_scores(hidden))
        contributions = (weights.abs() * self.values.norm(dim=-1)).view(
            len(hidden), num_sub_keys, num_sub_keys
        )
        low = contributions.mean() - OTHER_HEADS_DEVIATIONS * contributions.std()
        inputs = torch.cat([hidden - mean, torch.ones_like(hidden[:, :1])], dim=-1)
        head_of_row = torch.arange(num_sub_keys, device=hidden.device) % self.num_heads
        query_weights, query_biases = [], []
        for head in range(self.num_heads):
            is_own = head_of_row == head
            if not is_own.any():  # more heads than rows
                is_own = torch.ones_like(is_own)
            own = contributions[:, is_own]
            overall = own.mean((1, 2)).unsqueeze(-1) / 2
            rows = low.expand(len(hidden), num_sub_keys).clone()
            rows[:, is_own] = own.mean(2) - overall
            for half, sums in enumerate((rows, own.mean(1) - overall)):
                projection, sub_keys = fit_reduced_rank(inputs, sums, router.key_width // 2)
                rank = len(sub_keys)  # less than the width where there are fewer sub-keys
                weight = torch.zeros(router.key_width // 2, self.width + 1)
                weight[:rank] = projection.t().float()
                query_weights.append(weight[:, :-1])
                query_biases.append(weight[:, -1] - weight[:, :-1] @ mean.float().cpu())
                router.sub_keys[head, half, :, :rank].copy_(sub_keys.t())
        router.weight.copy_(torch.cat(query_weights))
        router.bias.copy_(torch.cat(query_biases))

    def find_slots(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the neurons `(tokens, k)` with the best scores of each head, and their gates."""
        ids, scores = self.router.search(hidden, self.k // self.num_heads)
        gates = (scores * self.gate_scale.unsqueeze(-1)).softmax(-1) * ids.shape[-1]
        ids, gates = ids.flatten(1), gates.flatten(1)
        if self.num_heads > 1:
            counts = (ids.unsqueeze(-1) == ids.unsqueeze(-2)).sum(-1)
            gates = gates / counts
        return ids, gates
