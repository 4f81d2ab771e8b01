"""One budget for all memories of a model: slots are read where they are worth most, in whatever layer, for whatever token.

Memories with `selection="threshold"` read every slot whose rank reaches a threshold that they share. Their ranks
compare over layers where the metric is `sensitivity`, so one number spends the budget: mean slots read per token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dmt.distributed import all_reduce_sum
from dmt.memory.featural import FeaturalMemory

MAX_RANKS = 8_000_000
"""Ranks, over tokens, slots and memories, that are held at once to find the first threshold."""


def select_thresholded(memories: Iterable[FeaturalMemory]) -> list[FeaturalMemory]:
    """Those that share the budget."""
    return [memory for memory in memories if memory.threshold is not None]


@torch.no_grad()
def initialize_threshold(memories: Iterable[FeaturalMemory], hidden: Iterable[Tensor]) -> None:
    """Set the shared threshold so that these hidden states `(tokens, width)`, one per memory, are given the budget."""
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
    # A rank of zero is a slot with nothing to say. A threshold of zero would read them all, and never move.
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
    """Begin to count, while training, what those that share the budget read, for `hold`."""
    for memory in select_thresholded(memories):
        memory.budget_counts = torch.zeros(2, dtype=torch.long, device=memory.keys.device)


@torch.no_grad()
def update_threshold(memories: Iterable[FeaturalMemory], rate: float) -> None:
    """Move the shared threshold towards the budget, by what was read since the last call; forgets what was read.

    Of several processes that train together all have to call it; what all of them read counts.
    Too many reads by a factor f raise it by f to the power of `rate`.
    """
    counted = [
        memory
        for memory in select_thresholded(memories)
        if memory.budget_counts is not None and memory.budget_counts[1]
    ]
    if not counted:
        return
    counts = all_reduce_sum(torch.stack([memory.budget_counts for memory in counted]))  # type: ignore[misc]
    total_counts = counts.float()  # (memories, 2): reads, tokens, of all processes
    target_reads = sum(min(memory.num_slots, memory.k * memory.k_multiplier) for memory in counted)
    factor = ((total_counts[:, 0] / total_counts[:, 1]).sum() / target_reads).clamp(0.1, 10) ** rate
    for memory in counted:
        memory.threshold.mul_(factor)  # type: ignore[union-attr]
        memory.budget_counts.zero_()  # type: ignore[union-attr]
