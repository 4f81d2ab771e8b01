"""One budget for all memories of a model: slots are read where they are worth most, in whatever layer, for whatever token.

Memories with `selection="threshold"` read every slot whose rank reaches a threshold that they share. Their ranks
compare over layers where the metric is `sensitivity`, so one number spends the budget: mean slots read per token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dmt.memory.featural import FeaturalMemory
from dmt.memory.together import summed

RANKS = 8_000_000
"""Ranks, over tokens, slots and memories, that are held at once to find the first threshold."""


def sharing(memories: Iterable[FeaturalMemory]) -> list[FeaturalMemory]:
    """Those that share the budget."""
    return [memory for memory in memories if memory.threshold is not None]


@torch.no_grad()
def first_threshold(memories: Iterable[FeaturalMemory], hidden: Iterable[Tensor]) -> None:
    """Set the shared threshold so that these hidden states `(tokens, width)`, one per memory, are given the budget."""
    pairs = [(memory, states) for memory, states in zip(memories, hidden, strict=True) if memory.threshold is not None]
    if not pairs:
        return
    tokens = max(1, RANKS // sum(memory.slots for memory, _ in pairs))
    ranks = [memory.rank(states[:: -(-len(states) // tokens)]) for memory, states in pairs]
    budget = sum(memory.k * len(rank) for (memory, _), rank in zip(pairs, ranks, strict=True))
    everything = torch.cat([rank.flatten().float() for rank in ranks])
    # A rank of zero is a slot with nothing to say. A threshold of zero would read them all, and never move.
    lowest = everything.topk(budget).values[-1] if budget < len(everything) else torch.zeros(())
    if budget < len(everything) and lowest == 0:
        lowest = (
            everything[everything > 0].min() if (everything > 0).any() else everything.new_tensor(torch.finfo(torch.float32).tiny)
        )
    for memory, _ in pairs:
        memory.threshold.copy_(lowest)  # type: ignore[union-attr]


def watch(memories: Iterable[FeaturalMemory]) -> None:
    """Begin to count, while training, what those that share the budget read, for `hold`."""
    for memory in sharing(memories):
        memory.spent = torch.zeros(2, dtype=torch.long, device=memory.keys.device)


@torch.no_grad()
def hold(memories: Iterable[FeaturalMemory], rate: float) -> None:
    """Move the shared threshold towards the budget, by what was read since the last call; forgets what was read.

    Of several processes that train together all have to call it; what all of them read counts.
    Too many reads by a factor f raise it by f to the power of `rate`.
    """
    held = [memory for memory in sharing(memories) if memory.spent is not None and memory.spent[1]]
    if not held:
        return
    spent = summed(torch.stack([memory.spent for memory in held]))  # type: ignore[misc]
    reads = spent.float()  # (memories, 2): reads, tokens, of all processes
    budget = sum(min(memory.slots, memory.k * memory.widened) for memory in held)
    factor = ((reads[:, 0] / reads[:, 1]).sum() / budget).clamp(0.1, 10) ** rate
    for memory in held:
        memory.threshold.mul_(factor)  # type: ignore[union-attr]
        memory.spent.zero_()  # type: ignore[union-attr]
