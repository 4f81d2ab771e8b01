"""Searches that do not compare a token with every key in full: they find candidates, which the memory then scores exactly.

A slot's contribution, when it matters, is nearly its score times the length of its value: a product of the token with one
vector per slot. That is what the sublinear searches index, so they are made from the keys a memory has, whatever these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Find = Callable[[Tensor, int], Tensor]
"""Vectors `(tokens, width)` and a number to slot ids `(tokens, number)`, -1 where fewer were found."""
TRAINED_ON = 64
"""Keys per cell from which the cells of an index are learnt."""
MULTIPLIED = 16_384
"""Rows of codes multiplied at once: the library may copy them, which are to be no more than a processor's cache holds."""
ROUNDS = 8
"""Rounds of k-means."""


class Codes:
    """A matrix in 8 bits, one scale for each row, and its product with states that are rounded to 8 bits too.

    Args:
        weight: `(rows, width)`.
    """

    def __init__(self, weight: Tensor) -> None:
        self.scales = weight.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny).float() / 127
        self.rows = (weight / self.scales.unsqueeze(-1)).round().to(torch.int8)

    @classmethod
    def kept(cls, rows: Tensor, scales: Tensor) -> Codes:
        """Codes that were made before: `rows` `(rows, width)` in int8 and `scales` `(rows,)`."""
        made = cls.__new__(cls)
        made.rows, made.scales = rows, scales
        return made

    def __call__(self, hidden: Tensor) -> Tensor:
        """About `hidden (tokens, width)` times the matrix transposed, `(tokens, rows)`."""
        if hidden.device.type != "cpu":
            return hidden @ self.rows.to(hidden.dtype).t() * self.scales
        step = hidden.abs().amax(-1, keepdim=True) / 127 + torch.finfo(torch.float32).tiny
        codes = (hidden / step).round_().to(torch.int8)
        parts = [torch._int_mm(codes, rows.t()) for rows in self.rows.split(MULTIPLIED)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)) * (step * self.scales)


def cells_for(slots: int) -> int:
    """Cells of an inverted file over so many slots: faiss's advice of a few times the root, of at least 64 slots each."""
    return max(1, min(int(4 * math.sqrt(slots)), slots // TRAINED_ON))


def ivf(vectors: Tensor, probes: int | None = None) -> Find:
    """faiss's inverted file of `vectors` `(slots, width)` in 8 bits, by inner product.

    Args:
        probes: cells looked into; an eighth of them, 48 at most, where left out.
    """
    import faiss  # loads a second OpenMP runtime, so only where it is asked for

    slots, width = vectors.shape
    cells = cells_for(slots)
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    rows = np.ascontiguousarray(vectors.detach().float().cpu().numpy())
    faiss.omp_set_num_threads(torch.get_num_threads())
    index.train(rows[:: max(1, slots // (cells * 4 * TRAINED_ON))])
    index.add(rows)
    index.nprobe = probes or min(48, max(1, cells // 8))

    def find(queries: Tensor, count: int) -> Tensor:
        _, ids = index.search(np.ascontiguousarray(queries.detach().float().cpu().numpy()), count)
        return torch.from_numpy(ids).to(queries.device)

    return find


def product(vectors: Tensor, seed: int = 0) -> Find:
    """Product keys: half of each vector in one of so many classes, the other half in another, slots listed by pair of classes.

    A token is compared with the classes of both halves, twice the root of what there is; the pairs that promise most
    are opened in order until there are enough slots.

    Source: Lample et al. 2019, arXiv 1907.05242, for keys that are learnt as pairs; for a table of keys that exists this is the
        inverted multi-index of Babenko and Lempitsky 2012.
    """
    slots, width = vectors.shape
    classes = max(1, min(round(math.sqrt(slots)), 1024))
    halves = (slice(0, width // 2), slice(width // 2, width))
    found = [_kmeans(vectors[:, half].float(), classes, seed) for half in halves]
    centres = [centre for centre, _ in found]
    pair = found[0][1] * classes + found[1][1]
    order = pair.argsort(stable=True)
    sizes = torch.bincount(pair, minlength=classes * classes)
    starts = sizes.cumsum(0) - sizes

    def find(queries: Tensor, count: int) -> Tensor:
        near = [queries[:, half].float() @ centre.t() for half, centre in zip(halves, centres, strict=True)]
        tried = min(classes, max(8, 2 * math.isqrt(count)))
        best = [each.topk(tried) for each in near]
        promise = (best[0].values.unsqueeze(-1) + best[1].values.unsqueeze(-2)).flatten(1)
        pairs = (best[0].indices.unsqueeze(-1) * classes + best[1].indices.unsqueeze(-2)).flatten(1)
        promise = promise.masked_fill(sizes[pairs] == 0, -math.inf)
        opened = pairs.gather(1, promise.topk(min(count, promise.shape[1])).indices)
        ends = sizes[opened].cumsum(1)
        places = torch.arange(count, device=queries.device).expand(len(queries), -1).contiguous()
        which = torch.searchsorted(ends, places, right=True)
        there = which < ends.shape[1]
        which = which.clamp_max(ends.shape[1] - 1)
        cell = opened.gather(1, which)
        offset = places - (ends.gather(1, which) - sizes[cell])
        return torch.where(there, order[(starts[cell] + offset).clamp_max(slots - 1)], -1)

    return find


def _kmeans(points: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centres `(classes, width)` of `points`, learnt on a sample of them, and the class of each."""
    sample = points[:: max(1, len(points) // (classes * TRAINED_ON))]
    generator = torch.Generator().manual_seed(seed)
    centres = sample[torch.randperm(len(sample), generator=generator)[:classes].to(points.device)].clone()
    for _ in range(ROUNDS):
        own = _closest(sample, centres)
        sums = torch.zeros_like(centres).index_add_(0, own, sample)
        counts = torch.bincount(own, minlength=len(centres)).unsqueeze(-1)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres, _closest(points, centres)


def _closest(points: Tensor, centres: Tensor, at_once: int = 65_536) -> Tensor:
    handicap = centres.square().sum(-1) / 2
    return torch.cat([(part @ centres.t() - handicap).argmax(-1) for part in points.split(at_once)])


INDEXES: dict[str, Callable[[Tensor], Find]] = {"ivf": ivf, "product": product}
"""Searches that look at a part of the table, by the name that `memory.search` takes."""
