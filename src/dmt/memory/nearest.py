"""The nearest of many rows, exactly: one product, and a choice that looks at blocks before it looks at rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Among = Callable[[Tensor], tuple[Tensor, Tensor]]

BLOCK = 64
"""Scores whose largest stands for them in the first round of the choice."""
PLAIN = 4_096
"""Rows up to which choosing at once is as fast."""
SCORES = 16_000_000
"""Scores held at once."""
KEYS = 65_536
"""Keys compared with at once, so that there are many queries to a product however many keys there are."""
CANDIDATES = 2
"""Rows looked at exactly for each row wanted, of those that look nearest in half precision (recall .9999, EXPERIMENTS.md)."""


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns `(n, k)` of the k largest of each row of `scores` `(n, columns)`, largest first.

    The k largest lie in the k blocks whose own largest are largest, so only those are looked into: the same answer as
    `Tensor.topk` (equal scores may come in another order), up to seven times as fast on a processor.
    """
    rows, columns = scores.shape
    whole = columns // BLOCK * BLOCK
    if columns <= PLAIN or k > whole // BLOCK:
        return tuple(scores.topk(k))  # type: ignore[return-value]
    best = scores[:, :whole].view(rows, -1, BLOCK).amax(-1).topk(k, sorted=False).indices
    looked = (best.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    if whole < columns:
        rest = torch.arange(whole, columns, device=scores.device).expand(rows, -1)
        looked = torch.cat([looked, rest], dim=1)
    values, at = scores.gather(1, looked).topk(k)
    return values, looked.gather(1, at)


@torch.no_grad()
def nearest(queries: Tensor, keys: Tensor, handicap: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared Euclidean distances and row numbers `(n, k)` of the keys nearest to each query, nearest first.

    Args:
        queries: `(n, width)`.
        keys: `(rows, width)`.
        handicap: `(rows,)`: minus half the squared length of each key; minus infinity for a row that is not there,
            which then comes last, at an infinite distance.
        k: at most `rows`.
    """

    def among(part: Tensor) -> tuple[Tensor, Tensor]:
        scores, rows = _best(part, keys, handicap, k)
        return (part.square().sum(-1, keepdim=True) - 2 * scores).clamp_min(0), rows

    return _in_pieces(queries, k, SCORES // max(1, min(len(keys), KEYS)), among)


def _in_pieces(queries: Tensor, k: int, at_once: int, among: Among) -> tuple[Tensor, Tensor]:
    """Distances and rows `(n, k)` that `among` finds for so many queries at once."""
    if not len(queries):
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.long, device=queries.device)
    distances, rows = zip(*map(among, queries.split(max(1, at_once))), strict=True)
    return torch.cat(distances), torch.cat(rows)


def _best(queries: Tensor, keys: Tensor, handicap: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of product and handicap, and their rows, `(n, k)`, largest first; `KEYS` keys at a time."""
    found = []
    for first in range(0, max(1, len(keys)), KEYS):
        there = slice(first, first + KEYS)
        scores, rows = largest(torch.addmm(handicap[there], queries, keys[there].t()), min(k, len(keys[there])))
        found.append((scores, rows + first))
    if len(found) == 1:
        return found[0]
    scores, rows = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
    scores, at = scores.topk(k)
    return scores, rows.gather(1, at)


@torch.no_grad()
def nearest_by_halves(queries: Tensor, keys: Tensor, halves: Tensor, handicap: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `nearest` gives, but for a row in ten thousand: chosen by scores in half precision, then by exact distances.

    Args:
        halves: `keys` in bfloat16.
    """
    rough, wider = handicap.to(halves.dtype), min(len(keys), CANDIDATES * k)

    def among(part: Tensor) -> tuple[Tensor, Tensor]:
        rows = _best(part.to(halves.dtype), halves, rough, wider)[1]
        distances = (part.unsqueeze(1) - keys[rows]).square().sum(-1).masked_fill(handicap[rows].isinf(), torch.inf)
        chosen, order = distances.topk(k, largest=False)
        return chosen, rows.gather(1, order)

    return _in_pieces(queries, k, SCORES // max(1, min(len(keys), KEYS), wider * keys.shape[1] // 4), among)
