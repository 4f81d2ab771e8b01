"""Slots that nothing reads get no gradient, so they stay unread. This gives them some: they are asked for what is missing."""

from __future__ import annotations

import torch
from torch import Tensor

from dmt.memory import FeaturalMemory
from dmt.memory.search import as_mask
from dmt.memory.together import summed


def revival_error(memory: FeaturalMemory, dead: Tensor, hidden: Tensor, missing: Tensor, counts: Tensor) -> Tensor:
    """Squared error, summed over width and tokens, of the dead slots' own forecast of what the memory lacks.

    Args:
        dead: which slots have not been read for long, `(slots,)`.
        hidden: what the memory was given, `(tokens, width)`.
        missing: what its answer lacked, same shape, without gradient. Of the dead slots the k ranked highest are asked.
        counts: what each token counts, `(tokens,)`, see `outliers.share`.

    Source: the auxiliary loss of Gao et al. 2024, arXiv 2406.04093, section 2.4.
    """
    ids = dead.nonzero().flatten()
    if not len(ids):
        return hidden.new_zeros(())
    weights = memory.weights(hidden, memory.scores(hidden))[:, ids]
    rank = weights.detach().abs() * memory.lengths()[ids]
    chosen = as_mask(rank.topk(min(memory.k, len(ids)), dim=-1, sorted=False).indices, len(ids))
    said = (weights * chosen) @ memory.values[ids]
    return ((missing - said).float().square().sum(-1) * counts).sum()


@torch.no_grad()
def count_idle(memory: FeaturalMemory, idle: Tensor) -> None:
    """Bring `idle` `(slots,)`, tokens since each slot was read, up to date with `memory.reads`."""
    if memory.reads is not None:
        idle.add_(summed(idle.new_tensor(memory.reads_tokens))).masked_fill_(summed(memory.reads) > 0, 0)
