"""Experts: the block's neurons in groups of similar ones, of which a router chooses some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmt.config import ExpertsConfig
from dmt.memory.base import BlockShape
from dmt.memory.clustering import cluster_evenly
from dmt.memory.neuron_table import NeuronTable
from dmt.memory.registry import register_memory
from dmt.memory.slot_table import DEFAULT_K_DIVISOR, take_neurons
from dmt.ops import linear, solve_ridge


@register_memory("experts", config=ExpertsConfig)
class ExpertsMemory(NeuronTable):
    """A layer that reads whole experts: groups of neurons with similar keys, all of equal size.

    A linear router scores the experts, and the `k` neurons of the best ones are read, with the
    weights that they have in the block. With every expert read the layer is the block exactly; with
    fewer it loses the experts that are not read, but for their mean.

    Calibration fits the router by ridge regression to the length of what each expert adds on the
    calibration text. The loss does not reach the router, as in the paper: which experts are read is
    no function that has a gradient. Neurons have their true gradient where they are read.

    Args:
        width: size of a hidden state.
        num_slots: neurons.
        k: neurons read per token, a multiple of `expert_size`.
        expert_size: neurons of an expert.
        gated: whether a neuron has a second, linear score, its gain (SwiGLU blocks).
        activation_function: the block's function, by its transformers name.
        saved_rows: `value_dtype` and `offload`, as `NeuronTable` has them.

    Raises:
        ArgumentError: an argument is out of range, or two of them contradict each other.

    Source: Zhang et al. 2021, arXiv 2110.01786: experts by balanced k-means of the keys, and the
        choice by predicted activation. The paper trains a router of two layers; here it is linear
        and solved for.
    """

    router: Tensor
    router_bias: Tensor

    def __init__(
        self,
        width: int,
        num_slots: int,
        k: int,
        *,
        expert_size: int,
        gated: bool,
        activation_function: str,
        **saved_rows: str,
    ) -> None:
        ExpertsConfig(expert_size=expert_size, k=k).check_block(num_slots)
        super().__init__(
            width, num_slots, k, gated=gated, activation_function=activation_function, **saved_rows
        )
        self.expert_size = expert_size
        num_experts = num_slots // expert_size
        self.register_buffer("router", torch.empty(num_experts, width))
        self.register_buffer("router_bias", torch.empty(num_experts))
        self.reset()

    @classmethod
    def make_arguments(cls, config: ExpertsConfig, block: BlockShape) -> dict[str, Any]:
        """Return the arguments of a memory that replaces `block`, but for `width` and `gated`.

        Raises:
            ArgumentError: the settings do not fit the block.
        """
        arguments = super().make_arguments(config, block)
        size = config.expert_size
        default_k = max(1, block.num_neurons // DEFAULT_K_DIVISOR // size) * size
        return arguments | {"k": config.k or default_k, "expert_size": size}

    @torch.no_grad()
    def reset(self) -> None:
        """Draw random neurons; the router prefers experts whose keys are near the state."""
        super().reset()
        self._route_by_keys()

    @torch.no_grad()
    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Take over the neurons of a block, in the order of their experts."""
        order = cluster_evenly(tensors["keys"], len(self.router)).argsort(stable=True)
        names = super().load_block(take_neurons(tensors, order))
        self._route_by_keys()
        return names

    def _route_by_keys(self) -> None:
        """Score experts by the mean score of their neurons, until calibration fits the router."""
        self.router.copy_(self.keys.view(-1, self.expert_size, self.width).mean(1))
        self.router_bias.copy_(self.key_bias.view(-1, self.expert_size).mean(1))

    @torch.no_grad()
    def fit_selection(self, hidden: Tensor, target: Tensor) -> None:
        """Fit the router to the length of what each expert adds."""
        lengths = self.expert_lengths(hidden)
        coefficients = solve_ridge(hidden - hidden.mean(0), lengths - lengths.mean(0)).to(hidden)
        self.router.copy_(coefficients.t())
        self.router_bias.copy_(lengths.mean(0) - hidden.mean(0) @ coefficients)

    @torch.no_grad()
    def expert_lengths(self, hidden: Tensor) -> Tensor:
        """Return the length of what each expert adds: `(tokens, width)` to `(tokens, experts)`."""
        weights = self.compute_weights(hidden, self.compute_scores(hidden))
        pairs = zip(
            weights.split(self.expert_size, -1), self.values.split(self.expert_size), strict=True
        )
        return torch.stack([(part @ values).norm(dim=-1) for part, values in pairs], dim=-1)

    @torch.no_grad()
    def find_slots(self, hidden: Tensor) -> tuple[Tensor, None]:
        """Return the neurons `(tokens, k)` of the experts with the best scores."""
        scores = linear(hidden, self.router, self.router_bias)
        experts = scores.topk(self.k // self.expert_size, dim=-1, sorted=False).indices
        offsets = torch.arange(self.expert_size, device=hidden.device)
        return (experts.unsqueeze(-1) * self.expert_size + offsets).flatten(-2), None
