"""A table of a block's own neurons; each kind says which of them a token reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmt.config import MemoryConfig
from dmt.memory.base import BlockShape, MemoryLayer
from dmt.memory.featural import MAX_EXACT_SLOTS, MIN_BATCH_TOKENS
from dmt.memory.slot_table import ACTIVATIONS, DEFAULT_K_DIVISOR, SlotTable
from dmt.ops import linear
from dmt.validation import ARG, ArgumentError


class NeuronTable(SlotTable, MemoryLayer):
    """Neurons of a block with the block's activation: the sum of gate x weight x value over some.

    A kind defines `find_slots`, and its own arguments in `make_arguments`. With every slot read and
    every gate 1 the layer is the block.

    Args:
        width: size of a hidden state.
        num_slots: neurons.
        k: neurons read per token.
        gated: whether a neuron has a second, linear score, its gain (SwiGLU blocks).
        activation_function: the block's function, by its transformers name.
        value_dtype: type of saved values.
        offload: `values` leaves the values of a saved student on disk.
    """

    def __init__(
        self,
        width: int,
        num_slots: int,
        k: int,
        *,
        gated: bool,
        activation_function: str,
        value_dtype: str = "float32",
        offload: str = "none",
    ) -> None:
        super().__init__(
            width,
            num_slots,
            heads=1,
            activation="block",
            activation_function=activation_function,
            gated=gated,
            selection="score",
            metric="euclidean",
            projections=False,
            skip_connection=False,
            has_threshold=False,
            value_dtype=value_dtype,
            offload=offload,
        )
        self.k = k

    @classmethod
    def make_arguments(cls, config: Any, block: BlockShape) -> dict[str, Any]:
        """Return the arguments of a memory that replaces `block`, but for `width` and `gated`.

        Raises:
            ArgumentError: the settings do not fit the block.
        """
        check_activation(config, block)
        config.check_block(block.num_neurons, gated=block.gated)
        num_slots = getattr(config, "num_slots", None) or block.num_neurons
        k = getattr(config, "k", None) or max(1, num_slots // DEFAULT_K_DIVISOR)
        return {
            "num_slots": num_slots,
            "k": k,
            "activation_function": block.activation_function,
            "value_dtype": getattr(config, "value_dtype", "float32"),
            "offload": getattr(config, "offload", "none"),
        }

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Add to the output bias what the output lacks on average."""
        self.compensate(hidden, target - self.forward(hidden))

    def find_slots(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the slots that tokens read.

        Args:
            hidden: `(tokens, width)`.

        Returns:
            Ids `(tokens, n)` and the gates by which their weights are multiplied, of the same
            shape; None where all are 1. Gates of an id that occurs twice add up.
        """
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        flat = hidden.reshape(-1, self.width)
        ids, gates = self.find_slots(flat)
        self._record_reads(ids, flat.shape[0])
        if self._gathers_rows(flat.shape[0]):
            weights = self._gated_weights_at(flat, ids, gates)
            output = self.sum_values(ids, weights) + self.output_bias
        else:
            weights = self.compute_weights(flat, self.compute_scores(flat))
            all_gates = torch.zeros_like(weights).scatter_add(
                -1, ids, weights.new_ones(ids.shape) if gates is None else gates.to(weights.dtype)
            )
            output = linear(weights * all_gates, self.values.t(), self.output_bias)
        return output.view_as(hidden)

    def _gathers_rows(self, num_tokens: int) -> bool:
        """Return whether only the rows that are read are touched, which is fast for few of them.

        The shapes of a compiled or exported model must not depend on the number of tokens.
        """
        if self.num_slots > MAX_EXACT_SLOTS or self.is_attached:
            return True
        has_fixed_shapes = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return not has_fixed_shapes and num_tokens < MIN_BATCH_TOKENS

    def _gated_weights_at(self, hidden: Tensor, ids: Tensor, gates: Tensor | None) -> Tensor:
        weights = self.compute_weights_at(hidden, self.compute_scores_at(hidden, ids), ids)
        return weights if gates is None else weights * gates

    @torch.no_grad()
    def select(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows that a trace shows for `hidden` `(tokens, width)`."""
        ids, gates = self.find_slots(hidden)
        values = self.gather_values(ids.flatten()).view(*ids.shape, self.width)
        return ids, self._gated_weights_at(hidden, ids, gates), values

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return f"width={self.width}, num_slots={self.num_slots}, k={self.k}"


def check_activation(config: MemoryConfig, block: BlockShape) -> None:
    """Raise `ArgumentError` where a memory does not have the function of a block."""
    if block.activation_function not in ACTIVATIONS:
        raise ArgumentError(
            f"{ARG}kind={config.kind} computes the block's own neurons, and the blocks of this "
            f"model use {block.activation_function!r}; memories have {', '.join(ACTIVATIONS)}; set "
            f"{ARG}kind=featural and {ARG}activation=relu"
        )
