"""Searches that do not compare a token with every key in full: they find candidates, which the memory then scores exactly.

A slot's contribution, when it matters, is nearly its score times the length of its value: a product of the token with one
vector per slot. That is what the sublinear searches index, so they are made from the keys a memory has, whatever these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmt.memory.products import linear

Find = Callable[[Tensor, int], Tensor]
"""Vectors `(tokens, width)` and a number to slot ids `(tokens, number)`, -1 where fewer were found."""
Vectors = Callable[[slice], Tensor]
"""Some of the slots, by number, to a vector `(n, width)` for each: so that a second copy of the table never exists."""
TRAINED_ON = 64
"""Keys per cell from which the cells of an index are learnt."""
MULTIPLIED = 16_384
"""Rows of codes multiplied at once: the library may copy them, which are to be no more than a processor's cache holds."""
ROUNDS = 8
"""Rounds of k-means."""
MOST_CELLS = 4_096
"""Cells of an inverted file, at most: a million slots have as many, ten million lie closer."""
MOST_CLASSES = 1_024
"""Classes of either half of product keys, at most."""
DIRECTIONS = 128
"""Directions that an index tells vectors apart by."""
FEW = 8
"""Queries that one thread answers soonest."""
AT_ONCE = 16_384
"""Slots that are put into an index at once."""


def in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(n, width)` in int8 and what each is to be multiplied by, `(n,)` in float32; never a second table in float32."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    for code, scale, rows in zip(*(each.split(AT_ONCE) for each in (codes, scales, weight.detach())), strict=True):
        scale.copy_(rows.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)).div_(127)
        code.copy_((rows / scale.unsqueeze(-1)).round_())
    return codes, scales


class Codes:
    """A matrix in 8 bits, one scale for each row, and its product with states that are rounded to 8 bits too.

    Args:
        weight: `(rows, width)`.
    """

    def __init__(self, weight: Tensor) -> None:
        self.rows, self.scales = in_eight_bits(weight)

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
    """Cells of an inverted file: four times the root of slots, faiss's advice; of 16 slots or more, made in minutes."""
    return max(1, min(int(4 * math.sqrt(slots)), slots // 16, MOST_CELLS))


def turned(sample: Tensor) -> tuple[Tensor, Tensor]:
    """The directions in which vectors `(n, width)` differ most, `(width, DIRECTIONS)` or fewer, most first; and the sample in them.

    Products of vectors turned so are nearly those of the vectors, and an index has less to read.
    """
    basis = torch.linalg.eigh(sample.t() @ sample).eigenvectors.flip(-1)[:, :DIRECTIONS].contiguous()
    return basis, sample @ basis


def ivf(vectors: Vectors, slots: int, probes: int | None = None) -> Find:
    """faiss's inverted file of the vectors of `slots` slots, in 8 bits, by inner product.

    Args:
        probes: cells looked into, at least; a quarter of them, 16 at most, where left out. More where twice the slots
            asked for would not be in so many.
    """
    import faiss  # loads a second OpenMP runtime, so only where it is asked for

    cells = cells_for(slots)
    sample = vectors(slice(None, None, max(1, slots // (cells * TRAINED_ON)))).float()
    turn, sample = turned(sample)
    width = _numbers(sample[:1]).shape[1]
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.min_points_per_centroid = 1  # else it complains on stderr about small tables
    faiss.omp_set_num_threads(torch.get_num_threads())
    index.train(_numbers(sample))
    for part in _parts(slots):
        index.add(_numbers(vectors(part).float() @ turn))
    least = probes or min(16, max(1, cells // 4))

    def find(queries: Tensor, count: int) -> Tensor:
        index.nprobe = max(least, min(cells, math.ceil(2 * count / slots * cells)))
        # One query is over before a second thread has begun. The number of threads is torch's too: it is put back.
        threads = torch.get_num_threads()
        faiss.omp_set_num_threads(threads if len(queries) > FEW else 1)
        try:
            _, ids = index.search(_numbers(queries.float() @ turn), count)
        finally:
            faiss.omp_set_num_threads(threads)
        return torch.from_numpy(ids).to(queries.device)

    return find


def product(vectors: Vectors, slots: int, seed: int = 0) -> Find:
    """Product keys: half of each vector in one of so many classes, the other half in another, slots listed by pair of classes.

    A token is compared with the classes of both halves, twice the root of what there is; the pairs that promise most
    are opened in order until there are enough slots.

    Source: Lample et al. 2019, arXiv 1907.05242, for keys that are learnt as pairs; for a table of keys that exists this is the
        inverted multi-index of Babenko and Lempitsky 2012.
    """
    classes = max(1, min(round(math.sqrt(slots)), MOST_CLASSES))
    turn, sample = turned(vectors(slice(None, None, max(1, slots // (classes * TRAINED_ON)))).float())
    halves = (slice(0, None, 2), slice(1, None, 2))  # every other direction, so that either half has as much to tell
    centres = [_centres(sample[:, half].contiguous(), classes, seed) for half in halves]
    pairs_of = []
    for part in _parts(slots):
        points = vectors(part).float() @ turn
        first, second = (_closest(points[:, half].contiguous(), centre) for half, centre in zip(halves, centres, strict=True))
        pairs_of.append(first * classes + second)
    pair = torch.cat(pairs_of)
    order = pair.argsort(stable=True)
    sizes = torch.bincount(pair, minlength=classes * classes)
    starts = sizes.cumsum(0) - sizes

    def find(queries: Tensor, count: int) -> Tensor:
        states = queries.float() @ turn
        near = [linear(states[:, half].contiguous(), centre) for half, centre in zip(halves, centres, strict=True)]
        best = [each.topk(min(classes, max(8, 2 * math.isqrt(count)))) for each in near]
        promise = (best[0].values.unsqueeze(-1) + best[1].values.unsqueeze(-2)).flatten(1)
        pairs = (best[0].indices.unsqueeze(-1) * classes + best[1].indices.unsqueeze(-2)).flatten(1)
        promise = promise.masked_fill(sizes[pairs] == 0, -math.inf)
        opened = pairs.gather(1, promise.topk(min(count, promise.shape[1])).indices)
        return _listed(opened, sizes, starts, order, count)

    return find


def _listed(opened: Tensor, sizes: Tensor, starts: Tensor, order: Tensor, count: int) -> Tensor:
    """The first `count` slots of the lists `opened` `(tokens, n)`, list after list, -1 where there are no more."""
    ends = sizes[opened].cumsum(1)
    places = torch.arange(count, device=opened.device).expand(len(opened), -1).contiguous()
    which = torch.searchsorted(ends, places, right=True)
    there = which < ends.shape[1]
    which = which.clamp_max(ends.shape[1] - 1)
    cell = opened.gather(1, which)
    offset = places - (ends.gather(1, which) - sizes[cell])
    return torch.where(there, order[(starts[cell] + offset).clamp_max(len(order) - 1)], -1)


def _centres(points: Tensor, classes: int, seed: int) -> Tensor:
    """`(classes, width)` by k-means of `points`."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=generator)[:classes].to(points.device)].clone()
    for _ in range(ROUNDS):
        own = _closest(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, own, points)
        counts = torch.bincount(own, minlength=len(centres)).unsqueeze(-1)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


def _closest(points: Tensor, centres: Tensor) -> Tensor:
    handicap = centres.square().sum(-1) / 2
    return torch.cat([(linear(part, centres) - handicap).argmax(-1) for part in points.split(AT_ONCE)])


def _parts(slots: int) -> list[slice]:
    return [slice(first, first + AT_ONCE) for first in range(0, slots, AT_ONCE)]


def _numbers(states: Tensor) -> Any:
    """For faiss, widened with zeros to what its vector instructions take at once."""
    return np.ascontiguousarray(F.pad(states.detach().float(), (0, -states.shape[1] % 16)).cpu().numpy())


INDEXES: dict[str, Callable[[Vectors, int], Find]] = {"ivf": ivf, "product": product}
"""Searches that look at a part of the table, by the name that `memory.search` takes."""
