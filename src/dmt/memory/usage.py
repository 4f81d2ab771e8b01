"""Which slots are read how often, counted while a context manager is active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dmt.distributed import all_reduce_sum


@dataclass
class UsageCounts:
    """Reads of one memory's slots.

    Attributes:
        reads: `(num_slots,)` tokens that read each slot.
        tokens: number of tokens.
    """

    reads: Tensor
    tokens: int = 0

    @torch.no_grad()
    def add(self, selected: Tensor, num_tokens: int | None = None) -> None:
        """Add the reads of one pass.

        Args:
            selected: a mask `(tokens, num_slots)`, or ids of the slots that were read.
            num_tokens: number of tokens; needed with ids.
        """
        if selected.dtype == torch.bool:
            self.reads.add_(selected.sum(0))
        else:
            ids = selected.flatten()
            self.reads.scatter_add_(0, ids, torch.ones_like(ids))
        self.tokens += len(selected) if num_tokens is None else num_tokens

    @property
    def mean_reads(self) -> float:
        """Mean number of slots read per token; 0 without tokens."""
        return float(self.reads.sum()) / self.tokens if self.tokens else 0.0

    def all_reduce(self) -> UsageCounts:
        """Sum over all processes (collective: every process must call it)."""
        return UsageCounts(
            all_reduce_sum(self.reads), int(all_reduce_sum(self.reads.new_tensor(self.tokens)))
        )


class UsageMixin:
    """A memory whose reads of slots can be counted.

    Attributes:
        num_slots: rows of its table.
        k: rows read per token, on average.
        values: what it sums, `(num_slots, width)`.
        output_bias: what it adds to the sum, `(width,)`.
        output: map `(width, width)` of the sum; None where there is none.
    """

    num_slots: int
    k: int
    values: Tensor
    output_bias: Tensor
    output: Tensor | None
    _usage: UsageCounts | None = None

    def gather_values(self, ids: Tensor) -> Tensor:
        """Return the values `(n, width)` of the slots `ids` `(n,)`."""
        return self.values[ids]

    @contextmanager
    def recording_usage(self) -> Iterator[UsageCounts]:
        """Count which slots are read inside the block; an outer recording is paused.

        Yields:
            The counts, which grow while the block runs.
        """
        previous = self._usage
        reads = torch.zeros(self.num_slots, dtype=torch.long, device=self.output_bias.device)
        self._usage = UsageCounts(reads)
        try:
            yield self._usage
        finally:
            self._usage = previous

    @contextmanager
    def usage_paused(self) -> Iterator[None]:
        """Count no reads inside the block."""
        previous, self._usage = self._usage, None
        try:
            yield
        finally:
            self._usage = previous

    @torch.no_grad()
    def _record_reads(self, selected: Tensor, num_tokens: int | None = None) -> None:
        """Count reads: a mask `(tokens, num_slots)`, or the ids that `num_tokens` tokens read."""
        if self._usage is not None:
            self._usage.add(selected, num_tokens)


@contextmanager
def record_usage(memories: Mapping[int, UsageMixin]) -> Iterator[dict[int, UsageCounts]]:
    """Count the reads of several memories inside the block.

    Args:
        memories: by layer.

    Yields:
        Counts by layer, which grow while the block runs.
    """
    with ExitStack() as stack:
        yield {
            layer: stack.enter_context(memory.recording_usage())
            for layer, memory in memories.items()
        }
