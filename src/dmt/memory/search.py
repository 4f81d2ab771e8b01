"""Search finds slot ids. Weights are computed from live keys afterwards, so a poor search costs recall, never truth."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(rank: Tensor, k: int) -> Tensor:
    """Ids `(..., k)` of the k largest entries of `rank` `(..., slots)`, in no order."""
    return rank.topk(k, dim=-1, sorted=False).indices


SEARCHES = ("exact", "int8", "ivf", "product")
"""How slots are found, by the name that `memory.search` takes: all but the first by candidates, see `finding`."""


def as_mask(ids: Tensor, slots: int) -> Tensor:
    """Boolean `(..., slots)`, true at `ids` `(..., k)`."""
    mask = torch.zeros(*ids.shape[:-1], slots, dtype=torch.bool, device=ids.device)
    return mask.scatter_(-1, ids, True)


def reaching(rank: Tensor, threshold: Tensor) -> Tensor:
    """Boolean mask, true where `rank` is at least `threshold` `()`."""
    return rank >= threshold
