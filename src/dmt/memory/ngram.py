"""N-gram memory: tables of rows for the last tokens of a text, at addresses that a hash tells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from dmt.config import NgramConfig
from dmt.memory.base import BlockShape, MemoryLayer
from dmt.memory.lookup_table import LookupTable
from dmt.memory.registry import register_memory
from dmt.memory.token_context import derive_from_contexts, get_contexts
from dmt.validation import ARG, ArgumentError

# Tokens of text that weigh as much as no row at all, where rows are set from text.
SHRINKAGE = 4.0
GATE_EPSILON = 1e-6  # added to mean squares
MAX_NUMBERS = 2**16  # factors of one length, at most
MAX_OBSERVED = 16_384  # tokens of an observed text whose rows are read at once


@dataclass(frozen=True)
class _ObservedText:
    """A text that rows are set from.

    Attributes:
        sums: for each length, what the output lacks `(heads, rows, part)`, summed by row.
        contexts: the last ids up to each token `(tokens, order)`, in parts.
    """

    sums: list[Tensor]
    contexts: list[Tensor]


def _mix(number: int) -> int:
    """Return a 63-bit number that looks random. Source: Steele et al. 2014, SplitMix64."""
    number = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return (number ^ (number >> 31)) >> 1


def hash_contexts(contexts: Tensor, factors: Tensor, num_rows: int) -> Tensor:
    """Return the row `(..., heads)` of each n-gram in the table of each head.

    Args:
        contexts: token ids `(..., order)`, all of them known.
        factors: odd factors `(heads, order)`.
        num_rows: rows of a table.
    """
    mixed = (contexts.unsqueeze(-2) + 1) * factors  # wraps, as it should
    mixed = mixed ^ (mixed >> 29)
    code = (mixed * factors.flip(-1)).sum(-1)
    return (code ^ (code >> 32)) % num_rows


@register_memory("ngram", config=NgramConfig)
class NgramMemory(MemoryLayer):
    """A layer that adds rows for the last token, the last two and so on, up to `order`.

    There is a table for each length. An n-gram reads `hash_heads` rows of it, each a part of the
    output, so that two n-grams that share one row seldom share all. Single tokens have rows of
    their own where the table has as many. With `context_gate` the hidden state weighs what is read;
    at first the weight is one. Addresses depend on the text alone: rows can be fetched before they
    are needed.

    Rows are set from text, the shortest n-grams first: each to the mean of what is lacking, shrunk
    where it was seen seldom. Without `learn_rows` they stay so. What the block computes from
    anything but the last `order` tokens is lost, so it is meant as a part of `sum`.

    Args:
        width: size of a hidden state.
        vocab_size: tokens of the vocabulary. One beyond it has no n-grams.
        order: tokens of the longest n-gram.
        num_rows: rows of a table.
        hash_heads: rows that an n-gram reads of a table.
        context_gate: whether the hidden state weighs what is read.
        learn_rows: whether rows have a gradient.
        value_dtype: type of saved rows.
        offload: `values` leaves the rows of a saved student on disk.

    Raises:
        ArgumentError: `hash_heads` does not divide the width.

    Source: Cheng et al. 2026, arXiv 2601.07372 (Engram). The gate's key is a row itself, weighted
        number by number, where the source learns a matrix; there is no convolution.
    """

    row_kind = "ngram"

    def __init__(
        self,
        width: int,
        vocab_size: int,
        *,
        order: int,
        num_rows: int,
        hash_heads: int,
        context_gate: bool,
        learn_rows: bool,
        value_dtype: str = "float32",
        offload: str = "none",
    ) -> None:
        super().__init__()
        if width % hash_heads:
            raise ArgumentError(
                f"{ARG}hash_heads must divide {width}, the width of the model, got {hash_heads}"
            )
        self.vocab_size, self.order, self.hash_heads = vocab_size, order, hash_heads
        # That of each length has the rows of the first head, then those of the second, and so on.
        self.tables = nn.ModuleList(
            LookupTable(
                hash_heads * (min(vocab_size, num_rows) if length == 1 else num_rows),
                width // hash_heads,
                learn_rows=learn_rows,
                value_dtype=value_dtype,
                offload=offload,
            )
            for length in range(1, order + 1)
        )
        self.output_bias = nn.Parameter(torch.empty(width))
        gate_shape = (order, width)
        self.gate_weight = nn.Parameter(torch.empty(gate_shape)) if context_gate else None
        self.gate_bias = nn.Parameter(torch.empty(order)) if context_gate else None
        self._observed: _ObservedText | None = None
        self.reset()

    @classmethod
    def make_arguments(cls, config: NgramConfig, block: BlockShape) -> dict[str, Any]:
        """Return the arguments of a memory that replaces `block`, but for `width`.

        Raises:
            ArgumentError: `hash_heads` does not divide the width.
        """
        arguments = {name: value for name, value in asdict(config).items() if name != "kind"}
        if block.width % config.hash_heads:
            raise ArgumentError(
                f"{ARG}hash_heads must divide {block.width}, the width of the model, got "
                f"{config.hash_heads}"
            )
        return {"vocab_size": block.vocab_size, **arguments}

    @classmethod
    def from_arguments(cls, width: int, gated: bool, arguments: Mapping[str, Any]) -> Self:
        """Create the memory from the values of `make_arguments`."""
        return cls(width, **arguments)

    @property
    def context_length(self) -> int:
        """The tokens of the longest n-gram."""
        return self.order

    @property
    def _lengths(self) -> range:
        return range(1, self.order + 1)

    def get_table(self, length: int) -> LookupTable:
        """Return the table of the n-grams of a length."""
        table = self.tables[length - 1]
        assert isinstance(table, LookupTable), "set in __init__"
        return table

    def view_rows(self, length: int) -> Tensor:
        """Return the rows `(heads, rows, part)` of a student in training, to be read or set."""
        table = self.get_table(length)
        return table.rows.detach().view(self.hash_heads, -1, table.width)

    def _count_rows(self, length: int) -> int:
        """Return the rows of one head for n-grams of a length."""
        return self.get_table(length).num_rows // self.hash_heads

    @torch.no_grad()
    def reset(self) -> None:
        """Set the output to zero and the gate to one."""
        for parameter in self.parameters():
            parameter.zero_()

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor) -> None:
        """Set the rows to what is lacking in a text."""
        self.reset()
        self.output_bias.copy_(target.mean(0))
        self.observe(hidden, target)
        self.set_rows()

    @property
    def observes_text(self) -> bool:
        """Rows take a long text."""
        return True

    @torch.no_grad()
    def observe(self, hidden: Tensor, target: Tensor) -> None:
        """Add tokens of a text to the sums that rows are set from."""
        if self._observed is None:
            sums = [torch.zeros_like(self.view_rows(length)) for length in self._lengths]
            self._observed = _ObservedText(sums, [])
        observed = self._observed
        contexts = get_contexts(self.order, hidden.shape[:-1])
        observed.contexts.append(contexts.to(torch.int32))
        residual = target - self.output_bias
        for length in self._lengths:
            self._add_by_row(observed.sums[length - 1], contexts, length, residual)

    @torch.no_grad()
    def set_rows(self) -> None:
        """Set each row to the mean of what shorter n-grams leave, the shortest first."""
        if self._observed is None:
            return
        sums, contexts = self._observed.sums, torch.cat(self._observed.contexts).long()
        self._observed = None
        for length in self._lengths:
            rows = self.view_rows(length)
            counts = rows.new_zeros(rows.shape[:2])
            for part in contexts.split(MAX_OBSERVED):
                ids, is_known = self._hash(part, length)
                for head, head_ids in enumerate(ids[is_known].unbind(-1)):
                    counts[head] += head_ids.bincount(minlength=rows.shape[1])
            rows.copy_(sums[length - 1] / (counts.unsqueeze(-1) + SHRINKAGE))
            for part in contexts.split(MAX_OBSERVED) if length < self.order else ():
                output = self._read_rows(length, *self._locate_rows(part, length))
                for longer in range(length + 1, self.order + 1):
                    self._add_by_row(sums[longer - 1], part, longer, -output)

    def _add_by_row(self, sums: Tensor, contexts: Tensor, length: int, values: Tensor) -> None:
        """Add values `(tokens, width)` to the rows `(heads, rows, part)` of their n-grams."""
        ids, is_known = self._hash(contexts, length)
        parts = values.unflatten(-1, (self.hash_heads, -1))
        for head in range(self.hash_heads):
            sums[head].index_add_(0, ids[is_known, head], parts[is_known, head].to(sums))

    def get_factors(self, length: int) -> Tensor:
        """Return the odd factors `(heads, length)` of the hash, the same in every process."""
        numbers = [
            _mix(length * MAX_NUMBERS + number) | 1 for number in range(self.hash_heads * length)
        ]
        return torch.tensor(numbers).view(self.hash_heads, length)

    def _find_rows(self, length: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the rows of n-grams of a length in its table, as `_locate_rows` does."""
        key = ("ngram", length, self.hash_heads, self._count_rows(length), self.vocab_size)
        ids, is_known = derive_from_contexts(
            key, length, shape, lambda contexts: self._locate_rows(contexts, length)
        )
        return ids, is_known

    def _locate_rows(self, contexts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return rows `(..., heads)` of a table, and which tokens have one `(..., 1)`.

        Args:
            contexts: `(..., length or more)`.
            length: tokens of an n-gram.
        """
        ids, is_known = self._hash(contexts, length)
        first_rows = torch.arange(self.hash_heads, device=ids.device) * self._count_rows(length)
        return ids + first_rows, is_known.unsqueeze(-1)

    def _hash(self, contexts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return rows `(..., heads)` among those of a head, and which tokens have one `(...)`."""
        contexts = contexts[..., contexts.shape[-1] - length :]
        is_known = ((contexts >= 0) & (contexts < self.vocab_size)).all(-1)
        num_rows = self._count_rows(length)
        if length == 1 and num_rows == self.vocab_size:
            ids = contexts.expand(*contexts.shape[:-1], self.hash_heads)
        else:
            ids = hash_contexts(contexts, self.get_factors(length).to(contexts.device), num_rows)
        return ids.where(is_known.unsqueeze(-1), 0), is_known

    def _read_rows(self, length: int, ids: Tensor, is_known: Tensor) -> Tensor:
        """Return what n-grams of a length read, `(..., width)`, without the gate."""
        return self.get_table(length)(ids, self.output_bias.dtype).flatten(-2) * is_known

    def prefetch(self, shape: torch.Size) -> None:
        """Read the rows of the coming pass ahead, where they are on disk."""
        for length in self._lengths:
            table = self.get_table(length)
            if table.is_on_disk:
                ids, is_known = self._find_rows(length, shape)
                table.prefetch(ids[is_known.squeeze(-1)])

    def _compute_gate(self, length: int, hidden: Tensor, rows: Tensor) -> Tensor | None:
        """Return the weight `(..., 1)` of what n-grams of a length read; None where it is one."""
        if self.gate_weight is None or self.gate_bias is None:
            return None
        product = _normalize(hidden.to(rows)) * _normalize(rows) * self.gate_weight[length - 1]
        score = product.sum(-1, keepdim=True) / math.sqrt(rows.shape[-1])
        return 2 * (score + self.gate_bias[length - 1]).sigmoid()

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        output = self.output_bias.expand_as(hidden)
        for length in self._lengths:
            rows = self._read_rows(length, *self._find_rows(length, hidden.shape[:-1]))
            gate = self._compute_gate(length, hidden, rows)
            output = output + (rows if gate is None else gate * rows)
        return output.to(hidden.dtype)

    def select(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows that each token reads; those of longer n-grams have higher ids."""
        ids, weights, values, first = [], [], [], 0
        for length in self._lengths:
            row_ids, is_known = self._find_rows(length, hidden.shape[:-1])
            rows = self._read_rows(length, row_ids, is_known)
            gate = self._compute_gate(length, hidden, rows)
            weight = is_known.to(rows) if gate is None else gate * is_known
            part = rows.shape[-1] // self.hash_heads
            for head in range(self.hash_heads):
                in_part = torch.zeros(rows.shape[-1], device=rows.device)
                in_part[head * part : (head + 1) * part] = 1
                ids.append(row_ids[..., head] + first)
                weights.append(weight[..., 0])
                values.append(rows * in_part)
            first += self.get_table(length).num_rows
        return torch.stack(ids, -1), torch.stack(weights, -1), torch.stack(values, -2)


def _normalize(states: Tensor) -> Tensor:
    return states * (states.square().mean(-1, keepdim=True) + GATE_EPSILON).rsqrt()
