"""A product-key memory: a large table of values, found by keys that are pairs of sub-keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmt.config import ProductKeyConfig, round_up_to_square
from dmt.memory.base import BlockShape, MemoryLayer, load_output_bias
from dmt.memory.clustering import cluster_directions
from dmt.memory.lookup_table import LookupTable
from dmt.memory.product_keys import ProductKeyQuery
from dmt.memory.registry import register_memory
from dmt.memory.slot_table import DEFAULT_K_DIVISOR
from dmt.memory.usage import UsageMixin
from dmt.ops import linear, solve_sparse_ridge

# Factor of the cosines at the start. On the embedded teacher 6 to 8 explain most of held-out text.
INITIAL_SCALE = 8.0
# Ridge of the values at the start; most slots are read by few tokens of the calibration text.
VALUE_RIDGE = 0.1
# Directions of little variance count for less in a query, by this power of the variance.
WHITENING_POWER = -0.25
# SiLU of this is 1: the gate begins open.
OPEN_GATE = 1.2784645


@register_memory("product_key", config=ProductKeyConfig)
class ProductKeyMemory(UsageMixin, MemoryLayer):
    """A layer that reads k of n^2 values, weighted by softmax over the k / heads of each head.

    With `silu_gate` the sum is multiplied by a gate that reads the hidden state, and mapped
    linearly (Memory+); both begin as the identity.

    Values are not the neurons of the block: a weight is a softmax, not an activation, so nothing
    of the block is exact at the start. Calibration makes sub-keys the centers of the queries'
    halves on the teacher's inputs, and values what ridge regression finds for the slots that are
    read on the calibration text. Gradients are true: those of the slots read. A table that all
    layers share (Berges et al.) was tried and is left out: it is worse with as many rows and with
    as much RAM (docs/experiments/distillation.md).

    Args:
        width: size of a hidden state and of a value.
        num_slots: values, a square number.
        k: slots read per token, over all heads together.
        heads: queries, each with its own sub-keys; they share the values.
        key_width: size of a query.
        silu_gate: whether to gate the sum.
        value_dtype: type of saved values.
        offload: `values` leaves the values of a saved student on disk.

    Raises:
        ArgumentError: an argument is out of range, or two of them contradict each other.

    Source: Lample et al. 2019, arXiv 1907.05242; Berges et al. 2024, arXiv 2412.09764 (gate).
    """

    def __init__(
        self,
        width: int,
        num_slots: int,
        k: int,
        *,
        heads: int,
        key_width: int,
        silu_gate: bool,
        value_dtype: str = "float32",
        offload: str = "none",
    ) -> None:
        ProductKeyConfig(num_slots=num_slots, k=k, heads=heads, key_width=key_width)  # checks them
        super().__init__()
        self.width, self.num_slots, self.k, self.heads = width, num_slots, k, heads
        self.query = ProductKeyQuery(
            width, math.isqrt(num_slots), heads, key_width, has_cosines=True
        )
        self.table = LookupTable(num_slots, width, value_dtype=value_dtype, offload=offload)
        self.output_bias = nn.Parameter(torch.empty(width))
        self.gate = nn.Parameter(torch.empty(width, width)) if silu_gate else None
        self.gate_bias = nn.Parameter(torch.empty(width)) if silu_gate else None
        self.output = nn.Parameter(torch.empty(width, width)) if silu_gate else None
        self.reset()

    @classmethod
    def make_arguments(cls, config: ProductKeyConfig, block: BlockShape) -> dict[str, Any]:
        """Return the arguments of a memory that replaces `block`, but for `width`."""
        config.check_block(block.num_neurons, gated=block.gated)
        num_slots = config.num_slots or round_up_to_square(block.num_neurons)
        k = block.num_neurons // DEFAULT_K_DIVISOR // config.heads * config.heads
        return {
            "num_slots": num_slots,
            "k": config.k or max(config.heads, k),
            "heads": config.heads,
            "key_width": config.key_width or block.width // 2 * 2,
            "silu_gate": config.silu_gate,
            "value_dtype": config.value_dtype,
            "offload": config.offload,
        }

    @classmethod
    def from_arguments(
        cls, width: int, gated: bool, arguments: Mapping[str, Any]
    ) -> ProductKeyMemory:
        """Create the memory from the values of `make_arguments`."""
        return cls(width, **arguments)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The values of a student in training `(num_slots, width)`."""
        return self.table.rows

    def gather_values(self, ids: Tensor) -> Tensor:
        """Return the values `(n, width)` of the slots `ids` `(n,)` in the type of computation."""
        return self.table(ids, self.output_bias.dtype)

    @torch.no_grad()
    def reset(self) -> None:
        """Draw random keys and small random values; open the gate."""
        self.query.reset(INITIAL_SCALE)
        nn.init.normal_(self.values, std=0.02)
        nn.init.zeros_(self.output_bias)
        if self.gate is not None and self.gate_bias is not None and self.output is not None:
            nn.init.zeros_(self.gate)
            nn.init.constant_(self.gate_bias, OPEN_GATE)
            nn.init.eye_(self.output)

    def load_block(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Take over the output bias of the block, where it has one."""
        return load_output_bias(self.output_bias, tensors)

    @torch.no_grad()
    def fit_selection(self, hidden: Tensor, target: Tensor) -> None:
        """Make queries rotations of the hidden state, and sub-keys the centers of their halves."""
        query, mean = self.query, hidden.mean(0)
        covariance = (hidden - mean).t().cpu().double() @ (hidden - mean).cpu().double()
        variances, directions = torch.linalg.eigh(covariance / len(hidden))
        variances = variances.clamp_min(0) + 1e-3 * variances.mean()
        scaling = (directions * variances**WHITENING_POWER) @ directions.t()
        generator = torch.Generator().manual_seed(0)
        rotations = [
            nn.init.orthogonal_(
                torch.empty(query.key_width, self.width, dtype=torch.double), generator=generator
            )
            for _ in range(self.heads)
        ]
        query.weight.copy_(torch.cat(rotations) @ scaling)
        query.bias.copy_(-query.weight @ mean)
        queries = query.compute_queries(hidden).flatten(1, 2).unbind(1)
        centers = [
            cluster_directions(half, query.num_sub_keys, seed) for seed, half in enumerate(queries)
        ]
        query.sub_keys.copy_(torch.stack(centers).view_as(query.sub_keys))

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Fit the values of the slots that are read, by ridge regression."""
        ids, weights = self.read_weights(hidden)
        mean = target.mean(0)
        self.output_bias.copy_(mean)
        self.values.copy_(
            solve_sparse_ridge(ids, weights, target - mean, self.num_slots, VALUE_RIDGE)
        )

    def read_weights(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and weights `(tokens, k)` of the slots read for `(tokens, width)`.

        A slot that several heads find occurs more than once, and its weights add up.
        """
        ids, scores = self.query.search(hidden, self.k // self.heads)
        return ids.flatten(1), scores.softmax(-1).flatten(1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        flat = hidden.reshape(-1, self.width)
        ids, weights = self.read_weights(flat)
        self._record_reads(ids, flat.shape[0])
        total = self.table.sum_rows(ids, weights, self.output_bias.dtype)
        output = self._apply_gate(flat, total) + self.output_bias
        return output.to(hidden.dtype).view_as(hidden)

    def _apply_gate(self, hidden: Tensor, total: Tensor) -> Tensor:
        """Return what becomes of sums of values: gated and mapped, where there is a gate."""
        if self.gate is None or self.output is None:
            return total
        return linear(total * F.silu(linear(hidden, self.gate, self.gate_bias)), self.output)

    @torch.no_grad()
    def select(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows that a trace shows for `hidden` `(tokens, width)`."""
        ids, weights = self.read_weights(hidden)
        values = self.gather_values(ids.flatten())
        values = self._apply_gate(hidden.repeat_interleave(self.k, 0), values)
        return ids, weights, values.view(*ids.shape, self.width)

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        return (
            f"width={self.width}, num_slots={self.num_slots}, k={self.k}, heads={self.heads}, "
            f"key_width={self.query.key_width}"
        )
