"""A transcoder: the k largest of many ReLU latents, decoded linearly, beside an affine skip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from dmt.config import TranscoderConfig
from dmt.memory.base import BlockShape
from dmt.memory.featural import FeaturalMemory, topk_ids
from dmt.memory.registry import register_memory
from dmt.memory.slot_table import DEFAULT_K_DIVISOR
from dmt.ops import solve_sparse_ridge

# Ridge of the change of the values; many latents are read by few tokens of the calibration text.
VALUE_RIDGE = 1.0


@register_memory("transcoder", config=TranscoderConfig)
class TranscoderMemory(FeaturalMemory):
    """A layer that encodes a token in `num_slots` latents, decodes the k largest, and adds a skip.

    It is a featural memory with `relu` weights that ranks slots by score: keys are the encoder and
    values the decoder. Gradients are true: those of the latents that are decoded.

    Latents begin as the neurons of the block, scaled such that decoder rows have length 1 and the
    largest latents are those that contribute most. What is lost is what neurons do below zero, and
    in gated blocks the gains, since a latent has one score; a block of ReLU neurons without gains
    is exact with k = num_slots. Calibration fits the skip connection and the decoder to the block
    by ridge regression.

    Args:
        width: size of a hidden state.
        num_slots: latents.
        k: latents decoded per token.
        skip_connection: add an affine map of the hidden state.
        value_dtype: type of saved values.
        offload: `values` leaves the values of a saved student on disk.

    Source: Paulo et al. 2025, arXiv 2501.18823 (skip transcoders); Gao et al. 2024, arXiv
        2406.04093 (top-k latents).
    """

    def __init__(
        self,
        width: int,
        num_slots: int,
        k: int,
        *,
        skip_connection: bool,
        value_dtype: str = "float32",
        offload: str = "none",
    ) -> None:
        super().__init__(
            width,
            num_slots,
            k,
            activation="relu",
            selection="score",
            skip_connection=skip_connection,
            value_dtype=value_dtype,
            offload=offload,
        )

    @classmethod
    def make_arguments(cls, config: TranscoderConfig, block: BlockShape) -> dict[str, Any]:  # type: ignore[override]
        """Return the arguments of a memory that replaces `block`, but for `width`."""
        config.check_block(block.num_neurons, gated=block.gated)
        num_slots = config.num_slots or block.num_neurons
        return {
            "num_slots": num_slots,
            "k": config.k or max(1, num_slots // DEFAULT_K_DIVISOR),
            "skip_connection": config.skip_connection,
            "value_dtype": config.value_dtype,
            "offload": config.offload,
        }

    @classmethod
    def from_arguments(cls, width: int, gated: bool, arguments: Mapping[str, Any]) -> Self:
        """Create the memory from the values of `make_arguments`."""
        return cls(width, **arguments)

    @torch.no_grad()
    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Make latents of the neurons of a block."""
        gains = tensors.get("gains")
        without_gains = {
            name: tensor for name, tensor in tensors.items() if name not in ("gains", "gain_bias")
        }
        names = super().load_block(without_gains)
        lengths = self.values.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        self.values.div_(lengths.unsqueeze(-1))
        if gains is not None:
            lengths = lengths * gains.norm(dim=-1)
            self.values.zero_()  # the sign of a gain differs from token to token
        self.keys.mul_(lengths.unsqueeze(-1))
        self.key_bias.mul_(lengths)
        return names

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Fit the skip connection, then the values to what it leaves, then the skip connection."""
        scores = self.compute_scores(hidden)
        ids = topk_ids(scores, self.k)
        latents = scores.gather(-1, ids).relu()
        self.compensate(hidden, target - self.forward(hidden))
        residual = target - self.forward(hidden)
        update = solve_sparse_ridge(ids, latents, residual, self.num_slots, VALUE_RIDGE)
        self.values.add_(update.to(self.values))
        self.compensate(hidden, target - self.forward(hidden))
