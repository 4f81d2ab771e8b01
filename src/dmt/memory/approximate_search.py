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

from dmt.ops import linear

CandidateSearch = Callable[[Tensor, int], Tensor]
"""Vectors `(tokens, width)` and a number to slot ids `(tokens, number)`, -1 where fewer were found."""
VectorSource = Callable[[slice], Tensor]
"""Some of the slots, by number, to a vector `(n, width)` for each: so that a second copy of the table never exists."""
TRAINING_POINTS_PER_CELL = 64
"""Keys per cell from which the cells of an index are learnt."""
MATMUL_CHUNK_ROWS = 16_384
"""Rows of codes multiplied at once: the library may copy them, which are to be no more than a processor's cache holds."""
KMEANS_ITERATIONS = 8
"""Rounds of k-means."""
MAX_CELLS = 4_096
"""Cells of an inverted file, at most: a million slots have as many, ten million lie closer."""
MAX_CENTROIDS = 1_024
"""Classes of either half of product keys, at most."""
PCA_DIMENSIONS = 128
"""Directions that an index tells vectors apart by."""
MAX_SINGLE_THREAD_QUERIES = 8
"""Queries that one thread answers soonest."""
CHUNK_SLOTS = 16_384
"""Slots that are put into an index at once."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(n, width)` in int8 and what each is to be multiplied by, `(n,)` in float32; never a second table in float32."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    for code_chunk, scale_chunk, weight_chunk in zip(
        *(tensor.split(CHUNK_SLOTS) for tensor in (codes, scales, weight.detach())), strict=True
    ):
        scale_chunk.copy_(
            weight_chunk.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
        ).div_(127)
        code_chunk.copy_((weight_chunk / scale_chunk.unsqueeze(-1)).round_())
    return codes, scales


class Int8Matrix:
    """A matrix in 8 bits, one scale for each row, and its product with states that are rounded to 8 bits too.

    Args:
        weight: `(rows, width)`.
    """

    def __init__(self, weight: Tensor) -> None:
        self.rows, self.scales = quantize_int8(weight)

    @classmethod
    def from_quantized(cls, rows: Tensor, scales: Tensor) -> Int8Matrix:
        """Codes that were made before: `rows` `(rows, width)` in int8 and `scales` `(rows,)`."""
        matrix = cls.__new__(cls)
        matrix.rows, matrix.scales = rows, scales
        return matrix

    def __call__(self, hidden: Tensor) -> Tensor:
        """About `hidden (tokens, width)` times the matrix transposed, `(tokens, rows)`."""
        if hidden.device.type != "cpu":
            return hidden @ self.rows.to(hidden.dtype).t() * self.scales
        hidden_scales = hidden.abs().amax(-1, keepdim=True) / 127 + torch.finfo(torch.float32).tiny
        codes = (hidden / hidden_scales).round_().to(torch.int8)
        products = [torch._int_mm(codes, rows.t()) for rows in self.rows.split(MATMUL_CHUNK_ROWS)]
        return (products[0] if len(products) == 1 else torch.cat(products, -1)) * (
            hidden_scales * self.scales
        )


def choose_num_cells(num_slots: int) -> int:
    """Cells of an inverted file: four times the root of slots, faiss's advice; of 16 slots or more, made in minutes."""
    return max(1, min(int(4 * math.sqrt(num_slots)), num_slots // 16, MAX_CELLS))


def pca_rotation(sample: Tensor) -> tuple[Tensor, Tensor]:
    """The directions in which vectors `(n, width)` differ most, `(width, DIRECTIONS)` or fewer, most first; and the sample in them.

    Products of vectors turned so are nearly those of the vectors, and an index has less to read.
    """
    basis = (
        torch.linalg.eigh(sample.t() @ sample)
        .eigenvectors.flip(-1)[:, :PCA_DIMENSIONS]
        .contiguous()
    )
    return basis, sample @ basis


def build_ivf_search(
    get_vectors: VectorSource, num_slots: int, num_probes: int | None = None
) -> CandidateSearch:
    """faiss's inverted file of the vectors of `slots` slots, in 8 bits, by inner product.

    Args:
        probes: cells looked into, at least; a quarter of them, 16 at most, where left out. More where twice the slots
            asked for would not be in so many.
    """
    import faiss  # loads a second OpenMP runtime, so only where it is asked for

    num_cells = choose_num_cells(num_slots)
    sample = get_vectors(
        slice(None, None, max(1, num_slots // (num_cells * TRAINING_POINTS_PER_CELL)))
    ).float()
    rotation, sample = pca_rotation(sample)
    width = _to_faiss_array(sample[:1]).shape[1]
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width),
        width,
        num_cells,
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
    )
    index.cp.min_points_per_centroid = 1  # else it complains on stderr about small tables
    faiss.omp_set_num_threads(torch.get_num_threads())
    index.train(_to_faiss_array(sample))
    for chunk in _chunk_slices(num_slots):
        index.add(_to_faiss_array(get_vectors(chunk).float() @ rotation))
    min_probes = num_probes or min(16, max(1, num_cells // 4))

    def search_ivf(queries: Tensor, count: int) -> Tensor:
        index.nprobe = max(min_probes, min(num_cells, math.ceil(2 * count / num_slots * num_cells)))
        # One query is over before a second thread has begun. The number of threads is torch's too: it is put back.
        threads = torch.get_num_threads()
        faiss.omp_set_num_threads(threads if len(queries) > MAX_SINGLE_THREAD_QUERIES else 1)
        try:
            _, ids = index.search(_to_faiss_array(queries.float() @ rotation), count)
        finally:
            faiss.omp_set_num_threads(threads)
        return torch.from_numpy(ids).to(queries.device)

    return search_ivf


def build_product_key_search(
    get_vectors: VectorSource, num_slots: int, seed: int = 0
) -> CandidateSearch:
    """Product keys: half of each vector in one of so many classes, the other half in another, slots listed by pair of classes.

    A token is compared with the classes of both halves, twice the root of what there is; the pairs that promise most
    are opened in order until there are enough slots.

    Source: Lample et al. 2019, arXiv 1907.05242, for keys that are learnt as pairs; for a table of keys that exists this is the
        inverted multi-index of Babenko and Lempitsky 2012.
    """
    num_centroids = max(1, min(round(math.sqrt(num_slots)), MAX_CENTROIDS))
    rotation, sample = pca_rotation(
        get_vectors(
            slice(None, None, max(1, num_slots // (num_centroids * TRAINING_POINTS_PER_CELL)))
        ).float()
    )
    halves = (
        slice(0, None, 2),
        slice(1, None, 2),
    )  # every other direction, so that either half has as much to tell
    centroids = [_fit_kmeans(sample[:, half].contiguous(), num_centroids, seed) for half in halves]
    pair_chunks = []
    for chunk in _chunk_slices(num_slots):
        points = get_vectors(chunk).float() @ rotation
        first, second = (
            _assign_centroids(points[:, half].contiguous(), half_centroids)
            for half, half_centroids in zip(halves, centroids, strict=True)
        )
        pair_chunks.append(first * num_centroids + second)
    slot_pairs = torch.cat(pair_chunks)
    order = slot_pairs.argsort(stable=True)
    sizes = torch.bincount(slot_pairs, minlength=num_centroids * num_centroids)
    starts = sizes.cumsum(0) - sizes

    def search_product_keys(queries: Tensor, count: int) -> Tensor:
        rotated = queries.float() @ rotation
        half_scores = [
            linear(rotated[:, half].contiguous(), half_centroids)
            for half, half_centroids in zip(halves, centroids, strict=True)
        ]
        top_halves = [
            scores.topk(min(num_centroids, max(8, 2 * math.isqrt(count)))) for scores in half_scores
        ]
        pair_scores = (
            top_halves[0].values.unsqueeze(-1) + top_halves[1].values.unsqueeze(-2)
        ).flatten(1)
        pairs = (
            top_halves[0].indices.unsqueeze(-1) * num_centroids
            + top_halves[1].indices.unsqueeze(-2)
        ).flatten(1)
        pair_scores = pair_scores.masked_fill(sizes[pairs] == 0, -math.inf)
        opened_pairs = pairs.gather(1, pair_scores.topk(min(count, pair_scores.shape[1])).indices)
        return _take_listed_slots(opened_pairs, sizes, starts, order, count)

    return search_product_keys


def _take_listed_slots(
    opened_lists: Tensor, sizes: Tensor, starts: Tensor, order: Tensor, count: int
) -> Tensor:
    """The first `count` slots of the lists `opened` `(tokens, n)`, list after list, -1 where there are no more."""
    ends = sizes[opened_lists].cumsum(1)
    positions = (
        torch.arange(count, device=opened_lists.device).expand(len(opened_lists), -1).contiguous()
    )
    list_indices = torch.searchsorted(ends, positions, right=True)
    valid = list_indices < ends.shape[1]
    list_indices = list_indices.clamp_max(ends.shape[1] - 1)
    list_ids = opened_lists.gather(1, list_indices)
    offset = positions - (ends.gather(1, list_indices) - sizes[list_ids])
    return torch.where(valid, order[(starts[list_ids] + offset).clamp_max(len(order) - 1)], -1)


def _fit_kmeans(points: Tensor, num_centroids: int, seed: int) -> Tensor:
    """`(classes, width)` by k-means of `points`."""
    generator = torch.Generator().manual_seed(seed)
    centroids = points[
        torch.randperm(len(points), generator=generator)[:num_centroids].to(points.device)
    ].clone()
    for _ in range(KMEANS_ITERATIONS):
        assignments = _assign_centroids(points, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, assignments, points)
        counts = torch.bincount(assignments, minlength=len(centroids)).unsqueeze(-1)
        centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
    return centroids


def _assign_centroids(points: Tensor, centroids: Tensor) -> Tensor:
    half_squared_norms = centroids.square().sum(-1) / 2
    return torch.cat(
        [
            (linear(chunk, centroids) - half_squared_norms).argmax(-1)
            for chunk in points.split(CHUNK_SLOTS)
        ]
    )


def _chunk_slices(num_slots: int) -> list[slice]:
    return [slice(start, start + CHUNK_SLOTS) for start in range(0, num_slots, CHUNK_SLOTS)]


def _to_faiss_array(states: Tensor) -> Any:
    """For faiss, widened with zeros to what its vector instructions take at once."""
    return np.ascontiguousarray(
        F.pad(states.detach().float(), (0, -states.shape[1] % 16)).cpu().numpy()
    )


INDEX_BUILDERS: dict[str, Callable[[VectorSource, int], CandidateSearch]] = {
    "ivf": build_ivf_search,
    "product": build_product_key_search,
}
"""Searches that look at a part of the table, by the name that `memory.search` takes."""
