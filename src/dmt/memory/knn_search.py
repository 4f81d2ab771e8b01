"""Nearest-neighbor search over stored rows: exact, exact with a bfloat16 first pass, or by faiss.

Exact search is one matrix product and a top-k that looks at blocks of scores before it looks at
single ones. faiss only proposes rows: distances are computed from the keys themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmt.memory.search_reads import search_index

ChunkSearch = Callable[[Tensor], tuple[Tensor, Tensor]]

# Scores that their maximum represents in the first round of `blocked_topk`.
BLOCK_SIZE = 64
# Columns up to which a plain top-k is as fast.
MAX_PLAIN_TOPK = 4_096
# Scores that exist at once.
MAX_SCORES = 16_000_000
# Keys per product, so that a product has many queries however many keys there are.
KEY_CHUNK = 65_536
# Rows compared exactly for each neighbor, of those nearest in bfloat16 (recall .9999).
CANDIDATES_PER_NEIGHBOR = 2


def blocked_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest scores of each row and their columns, largest first.

    The k largest lie in the k blocks whose maxima are largest, so only those are searched: the
    result of `Tensor.topk` (equal scores may come in another order), up to seven times as fast on
    a CPU.

    Args:
        scores: `(n, columns)`.
        k: at most `columns`.

    Returns:
        Values and columns, both `(n, k)`.
    """
    num_rows, num_columns = scores.shape
    aligned_columns = num_columns // BLOCK_SIZE * BLOCK_SIZE
    if num_columns <= MAX_PLAIN_TOPK or k > aligned_columns // BLOCK_SIZE:
        return tuple(scores.topk(k))  # type: ignore[return-value]
    block_maxima = scores[:, :aligned_columns].view(num_rows, -1, BLOCK_SIZE).amax(-1)
    top_blocks = block_maxima.topk(k, sorted=False).indices
    candidates = (
        top_blocks.unsqueeze(-1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=scores.device)
    ).flatten(1)
    if aligned_columns < num_columns:
        remainder = torch.arange(aligned_columns, num_columns, device=scores.device)
        candidates = torch.cat([candidates, remainder.expand(num_rows, -1)], dim=1)
    values, positions = scores.gather(1, candidates).topk(k)
    return values, candidates.gather(1, positions)


@torch.no_grad()
def exact_knn(queries: Tensor, keys: Tensor, key_offsets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the keys nearest to each query, nearest first.

    Args:
        queries: `(n, width)`.
        keys: `(rows, width)`.
        key_offsets: `(rows,)`: minus half the squared norm of each key; minus infinity for an
            empty row, which then comes last, at an infinite distance.
        k: at most `rows`.

    Returns:
        Squared Euclidean distances and row indices, both `(n, k)`.
    """

    def search_chunk(chunk: Tensor) -> tuple[Tensor, Tensor]:
        scores, rows = _topk_inner_products(chunk, keys, key_offsets, k)
        return (chunk.square().sum(-1, keepdim=True) - 2 * scores).clamp_min(0), rows

    chunk_size = MAX_SCORES // max(1, min(len(keys), KEY_CHUNK))
    return _search_in_chunks(queries, k, chunk_size, search_chunk)


def _search_in_chunks(
    queries: Tensor, k: int, chunk_size: int, search_chunk: ChunkSearch
) -> tuple[Tensor, Tensor]:
    """Concatenate the distances and rows `(n, k)` of chunks of queries."""
    if torch.compiler.is_compiling():  # the number of chunks would be fixed
        return search_chunk(queries)
    if not len(queries):
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.long, device=queries.device)
    distances, rows = zip(*map(search_chunk, queries.split(max(1, chunk_size))), strict=True)
    return torch.cat(distances), torch.cat(rows)


def _topk_inner_products(
    queries: Tensor, keys: Tensor, key_offsets: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k largest of inner product plus offset, and their rows, `(n, k)`, descending."""
    parts = []
    for start in range(0, max(1, len(keys)), KEY_CHUNK):
        span = slice(start, start + KEY_CHUNK)
        scores, rows = blocked_topk(
            torch.addmm(key_offsets[span], queries, keys[span].t()), min(k, len(keys[span]))
        )
        parts.append((scores, rows + start))
    if len(parts) == 1:
        return parts[0]
    scores, rows = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
    scores, positions = scores.topk(k)
    return scores, rows.gather(1, positions)


@torch.no_grad()
def bf16_knn(
    queries: Tensor, keys: Tensor, bf16_keys: Tensor, key_offsets: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Find the keys nearest to each query: candidates by bfloat16 scores, then exact distances.

    Misses about one row in ten thousand.

    Args:
        queries: `(n, width)`.
        keys: `(rows, width)`.
        bf16_keys: `keys` in bfloat16.
        key_offsets: as in `exact_knn`.
        k: at most `rows`.

    Returns:
        Squared Euclidean distances and row indices, both `(n, k)`.
    """
    bf16_offsets = key_offsets.to(bf16_keys.dtype)
    num_candidates = min(len(keys), CANDIDATES_PER_NEIGHBOR * k)

    def search_chunk(chunk: Tensor) -> tuple[Tensor, Tensor]:
        rows = _topk_inner_products(
            chunk.to(bf16_keys.dtype), bf16_keys, bf16_offsets, num_candidates
        )[1]
        distances = (chunk.unsqueeze(1) - keys[rows]).square().sum(-1)
        distances = distances.masked_fill(key_offsets[rows].isinf(), torch.inf)
        nearest_distances, order = distances.topk(k, largest=False)
        return nearest_distances, rows.gather(1, order)

    chunk_size = MAX_SCORES // max(
        1, min(len(keys), KEY_CHUNK), num_candidates * keys.shape[1] // 4
    )
    return _search_in_chunks(queries, k, chunk_size, search_chunk)


# Kinds of faiss index that `index=` accepts.
FAISS_KINDS = ("flat", "ivf")
# Rows from which `ivf` has cells; below that it compares with all rows.
IVF_MIN_ROWS = 10_000
# Cells of `ivf`, as a multiple of the square root of the number of rows.
IVF_CELLS_FACTOR = 4
# Cells searched, however many there are: recall .98 at ten thousand rows, .998 at a million.
IVF_PROBES = 48


class FaissIndex:
    """A faiss index over the keys of rows, which it identifies by their positions in a table.

    `IndexIDMap2` keeps ids, which plain removal would shift; `ivf` has to be trained and removes
    by id.

    Args:
        kind: `flat` or `ivf`.
        width: size of a key.

    Raises:
        ValueError: `kind` is neither.
    """

    def __init__(self, kind: str, width: int) -> None:
        if kind not in FAISS_KINDS:
            raise ValueError(f"index must be one of {', '.join(FAISS_KINDS)}, got {kind}")
        self.kind, self.width = kind, width
        self._index: Any = None
        self._built_count = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return FaissIndex, (self.kind, self.width)

    def build(self, keys: Tensor, indices: Tensor) -> None:
        """Replace the contents.

        Args:
            keys: `(n, width)`.
            indices: `(n,)` positions of their rows.
        """
        import faiss  # loads a second OpenMP runtime, so only where an index is configured

        faiss.omp_set_num_threads(torch.get_num_threads())
        count = len(indices)
        self._built_count = count
        if self.kind == "ivf" and count >= IVF_MIN_ROWS:
            # faiss requires 39 rows per cell for training.
            num_cells = min(int(IVF_CELLS_FACTOR * math.sqrt(count)), count // 39)
            self._index = faiss.IndexIVFFlat(
                faiss.IndexFlatL2(self.width), self.width, num_cells, faiss.METRIC_L2
            )
            self._index.train(_to_float32_array(keys))
            self._index.nprobe = min(num_cells, IVF_PROBES)
        else:
            self._index = faiss.IndexIDMap2(faiss.IndexFlatL2(self.width))
        self._insert(keys, indices)

    def _insert(self, keys: Tensor, indices: Tensor) -> None:
        if len(indices):
            self._index.add_with_ids(
                _to_float32_array(keys), indices.cpu().numpy().astype(np.int64)
            )

    def add(self, keys: Tensor, indices: Tensor) -> bool:
        """Add keys `(n, width)` of the rows at `indices` `(n,)`.

        Returns:
            False where the index has to be built again instead.
        """
        if self._index is None or (self.kind == "ivf" and self._needs_retraining(len(indices))):
            return False
        self._insert(keys, indices)
        return True

    def _needs_retraining(self, num_added: int) -> bool:
        return self._index.ntotal + num_added >= max(IVF_MIN_ROWS, 2 * self._built_count)

    def remove(self, indices: Tensor) -> bool:
        """Remove the rows at `indices` `(n,)`.

        Returns:
            False where the index has to be built again instead.
        """
        if self._index is None:
            return False
        self._index.remove_ids(indices.cpu().numpy().astype(np.int64))
        return True

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Find the positions `(n, k)` of rows near `queries` `(n, width)`; -1 where fewer exist."""
        labels = search_index(self._index, _to_float32_array(queries), k)
        return torch.as_tensor(labels, device=queries.device)


def _to_float32_array(states: Tensor) -> Any:
    return np.ascontiguousarray(states.detach().float().cpu().numpy())
