"""One sparsity budget for all memories of a model, by a threshold that they share.

Memories with `k_mode="threshold"` read every slot whose rank reaches the threshold. Their ranks are
comparable across layers with `metric="fisher"`, so one number spends the budget, the mean number of
slots read per token, where it is worth most.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dmt.distributed import all_reduce_sum
from dmt.memory.featural import FeaturalMemory

# Ranks, over tokens, slots and memories, that exist at once to find the first threshold.
MAX_RANKS = 8_000_000


def select_thresholded(memories: Iterable[FeaturalMemory]) -> list[FeaturalMemory]:
    """Return the memories that share the budget."""
    return [memory for memory in memories if memory.threshold is not None]


@torch.no_grad()
def initialize_threshold(memories: Iterable[FeaturalMemory], hidden: Iterable[Tensor]) -> None:
    """Set the shared threshold so that these hidden states spend the budget.

    Args:
        memories: those without a threshold are skipped.
        hidden: one `(tokens, width)` per memory.
    """
    pairs = [
        (memory, states)
        for memory, states in zip(memories, hidden, strict=True)
        if memory.threshold is not None
    ]
    if not pairs:
        return
    max_tokens = max(1, MAX_RANKS // sum(memory.num_slots for memory, _ in pairs))
    ranks = [
        memory.compute_ranks(states[:: -(-len(states) // max_tokens)]) for memory, states in pairs
    ]
    num_reads = sum(memory.k * len(rank) for (memory, _), rank in zip(pairs, ranks, strict=True))
    all_ranks = torch.cat([rank.flatten().float() for rank in ranks])
    # A slot of rank zero contributes nothing. A threshold of zero would read them all, and scaling
    # would never change it.
    threshold = (
        all_ranks.topk(num_reads).values[-1] if num_reads < len(all_ranks) else torch.zeros(())
    )
    if num_reads < len(all_ranks) and threshold == 0:
        threshold = (
            all_ranks[all_ranks > 0].min()
            if (all_ranks > 0).any()
            else all_ranks.new_tensor(torch.finfo(torch.float32).tiny)
        )
    for memory, _ in pairs:
        memory.threshold.copy_(threshold)  # type: ignore[union-attr]


def reset_counts(memories: Iterable[FeaturalMemory]) -> None:
    """Start to count the reads of memories that share the budget, for `update_threshold`."""
    for memory in select_thresholded(memories):
        memory.reset_budget_counts()


@torch.no_grad()
def update_threshold(memories: Iterable[FeaturalMemory], rate: float) -> None:
    """Move the shared threshold toward the budget by the reads since the last call.

    Too many reads by a factor f multiply it by f to the power of `rate`. With several processes
    every process must call it; the reads of all of them count.

    Args:
        memories: those that count nothing are skipped.
        rate: exponent; 1 corrects at once where reads are proportional to the threshold.
    """
    counted = [
        memory
        for memory in select_thresholded(memories)
        if memory.budget_reads is not None and memory.budget_tokens
    ]
    if not counted:
        return
    reads = torch.stack([memory.budget_reads for memory in counted])  # type: ignore[misc]
    # Filled, not copied from the host, which would wait for a GPU.
    tokens = torch.stack(
        [torch.full_like(memory.budget_reads, memory.budget_tokens) for memory in counted]  # type: ignore[arg-type]
    )
    counts = all_reduce_sum(torch.stack([reads, tokens], dim=1))
    total_counts = counts.float()  # (memories, 2): reads and tokens of all processes
    target_reads = sum(min(memory.num_slots, memory.k * memory.k_multiplier) for memory in counted)
    factor = ((total_counts[:, 0] / total_counts[:, 1]).sum() / target_reads).clamp(0.1, 10) ** rate
    for memory in counted:
        memory.threshold.mul_(factor)  # type: ignore[union-attr]
        memory.reset_budget_counts()
