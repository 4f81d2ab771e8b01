"""Approximate search for slots: find candidates without comparing a token with every key in full.

A slot's contribution, where it matters, is nearly its score times the norm of its value: an inner
product of the token with one vector per slot. The inverted file indexes these vectors; the 8-bit
matrix scores all slots at a quarter of the memory traffic. The memory scores candidates exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmt.memory.search_reads import search_index

# Maps queries `(tokens, width)` and a count to slot ids `(tokens, count)`, -1 for none.
CandidateSearch = Callable[[Tensor, int], Tensor]
# Maps a slice of slot ids to one vector `(n, width)` each, so that no second copy of the table
# exists.
VectorSource = Callable[[slice], Tensor]

# Keys per cell that train an inverted file.
TRAINING_POINTS_PER_CELL = 64
# Rows of codes per product: the library may copy them, so they have to fit a processor's cache.
MATMUL_CHUNK_ROWS = 16_384
# Largest number of cells of an inverted file; a million slots have as many.
MAX_CELLS = 4_096
# Principal directions in which an index compares vectors.
PCA_DIMENSIONS = 128
# Queries up to which one thread is faster than several.
MAX_SINGLE_THREAD_QUERIES = 8
# Slots that are added to an index at once.
CHUNK_SLOTS = 16_384


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to int8 with one scale per row; no second table in float32 is made.

    Args:
        weight: `(n, width)`.

    Returns:
        Codes `(n, width)` in int8 and scales `(n,)` in float32.
    """
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
    """A matrix in int8 with one scale per row; its products round the other side to int8 too.

    Args:
        weight: `(rows, width)`.
    """

    def __init__(self, weight: Tensor) -> None:
        self.rows, self.scales = quantize_int8(weight)

    @classmethod
    def from_quantized(cls, rows: Tensor, scales: Tensor) -> Int8Matrix:
        """Wrap codes `(rows, width)` in int8 and scales `(rows,)` without copying them."""
        matrix = cls.__new__(cls)
        matrix.rows, matrix.scales = rows, scales
        return matrix

    def to(self, device: torch.device) -> Int8Matrix:
        """Return the matrix on a device."""
        return Int8Matrix.from_quantized(self.rows.to(device), self.scales.to(device))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Multiply `hidden` `(tokens, width)` with the transposed matrix: `(tokens, rows)`."""
        # In bfloat16 the largest entry would round to 128, which int8 does not have.
        hidden = hidden.float()
        hidden_scales = hidden.abs().amax(-1, keepdim=True) / 127 + torch.finfo(torch.float32).tiny
        codes = (hidden / hidden_scales).round_()
        chunks = self.rows.split(MATMUL_CHUNK_ROWS)
        if hidden.device.type == "cpu":
            int_codes = codes.to(torch.int8)
            products = [torch._int_mm(int_codes, rows.t()) for rows in chunks]
        else:  # the same whole numbers, exact in float32 up to a width of a thousand
            products = [codes @ rows.float().t() for rows in chunks]
        return (products[0] if len(products) == 1 else torch.cat(products, -1)) * (
            hidden_scales * self.scales
        )


def choose_num_cells(num_slots: int) -> int:
    """Choose the cells of an inverted file: 4 √slots, with at least 16 slots in each."""
    return max(1, min(int(4 * math.sqrt(num_slots)), num_slots // 16, MAX_CELLS))


def pca_rotation(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the principal directions of vectors, in which inner products nearly stay the same.

    Args:
        sample: `(n, width)`.

    Returns:
        The directions `(width, at most PCA_DIMENSIONS)`, largest variance first, and the sample
        rotated into them.
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
    """Build faiss's inverted file of one vector per slot, in 8 bits, by inner product.

    Args:
        get_vectors: gives the vectors, a slice of slots at a time.
        num_slots: number of vectors.
        num_probes: smallest number of cells to search; a quarter of them, at most 16, by default.
            More are searched where these would not hold twice the number of slots requested.

    Returns:
        The search.
    """
    import faiss  # loads a second OpenMP runtime, so only where an index is configured

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
    index.cp.min_points_per_centroid = 1  # otherwise faiss warns on stderr about small tables
    faiss.omp_set_num_threads(torch.get_num_threads())
    index.train(_to_faiss_array(sample))
    for start in range(0, num_slots, CHUNK_SLOTS):
        vectors = get_vectors(slice(start, start + CHUNK_SLOTS)).float()
        index.add(_to_faiss_array(vectors @ rotation))
    min_probes = num_probes or min(16, max(1, num_cells // 4))

    def search_ivf(queries: Tensor, count: int) -> Tensor:
        index.nprobe = max(min_probes, min(num_cells, math.ceil(2 * count / num_slots * num_cells)))
        # One query is done before a second thread has started. faiss and torch may share one
        # OpenMP runtime, so the number of threads is restored.
        threads = torch.get_num_threads()
        faiss.omp_set_num_threads(threads if len(queries) > MAX_SINGLE_THREAD_QUERIES else 1)
        try:
            ids = search_index(index, _to_faiss_array(queries.float() @ rotation), count)
        finally:
            faiss.omp_set_num_threads(threads)
        return torch.from_numpy(ids).to(queries.device)

    return search_ivf


def _to_faiss_array(states: Tensor) -> Any:
    """Convert to float32 for faiss, padded with zeros to the width of its vector instructions."""
    return np.ascontiguousarray(
        F.pad(states.detach().float(), (0, -states.shape[1] % 16)).cpu().numpy()
    )


# Searches that look at a part of the table, by the name that `search=` accepts.
INDEX_BUILDERS: dict[str, Callable[[VectorSource, int], CandidateSearch]] = {
    "ivf": build_ivf_search,
}
