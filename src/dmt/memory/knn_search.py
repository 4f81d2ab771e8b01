"""Search by faiss, where a config asks for it. An index only finds places; distances are computed from the keys that are there.

What each kind can do was tried, not read (FINDINGS 4): `IndexIDMap2` keeps numbers where plain removal shifts them, `IVF`
has to be trained and removes by number, `HNSW` cannot remove at all. So rows that left an HNSW index are skipped
until they are a quarter of it, and then it is built anew.

The nearest of many rows, exactly: one product, and a choice that looks at blocks before it looks at rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

ChunkSearch = Callable[[Tensor], tuple[Tensor, Tensor]]

BLOCK_SIZE = 64
"""Scores whose largest stands for them in the first round of the choice."""
MAX_PLAIN_TOPK = 4_096
"""Rows up to which choosing at once is as fast."""
MAX_SCORES = 16_000_000
"""Scores held at once."""
KEY_CHUNK = 65_536
"""Keys compared with at once, so that there are many queries to a product however many keys there are."""
CANDIDATES_PER_NEIGHBOR = 2
"""Rows looked at exactly for each row wanted, of those that look nearest in half precision (recall .9999, EXPERIMENTS.md)."""


def blocked_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns `(n, k)` of the k largest of each row of `scores` `(n, columns)`, largest first.

    The k largest lie in the k blocks whose own largest are largest, so only those are looked into: the same answer as
    `Tensor.topk` (equal scores may come in another order), up to seven times as fast on a processor.
    """
    num_rows, num_columns = scores.shape
    aligned_columns = num_columns // BLOCK_SIZE * BLOCK_SIZE
    if num_columns <= MAX_PLAIN_TOPK or k > aligned_columns // BLOCK_SIZE:
        return tuple(scores.topk(k))  # type: ignore[return-value]
    top_blocks = (
        scores[:, :aligned_columns]
        .view(num_rows, -1, BLOCK_SIZE)
        .amax(-1)
        .topk(k, sorted=False)
        .indices
    )
    candidates = (
        top_blocks.unsqueeze(-1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=scores.device)
    ).flatten(1)
    if aligned_columns < num_columns:
        remainder = torch.arange(aligned_columns, num_columns, device=scores.device).expand(
            num_rows, -1
        )
        candidates = torch.cat([candidates, remainder], dim=1)
    values, positions = scores.gather(1, candidates).topk(k)
    return values, candidates.gather(1, positions)


@torch.no_grad()
def exact_knn(queries: Tensor, keys: Tensor, key_offsets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Squared Euclidean distances and row numbers `(n, k)` of the keys nearest to each query, nearest first.

    Args:
        queries: `(n, width)`.
        keys: `(rows, width)`.
        handicap: `(rows,)`: minus half the squared length of each key; minus infinity for a row that is not there,
            which then comes last, at an infinite distance.
        k: at most `rows`.
    """

    def search_chunk(chunk: Tensor) -> tuple[Tensor, Tensor]:
        scores, rows = _topk_inner_products(chunk, keys, key_offsets, k)
        return (chunk.square().sum(-1, keepdim=True) - 2 * scores).clamp_min(0), rows

    return _search_in_chunks(
        queries, k, MAX_SCORES // max(1, min(len(keys), KEY_CHUNK)), search_chunk
    )


def _search_in_chunks(
    queries: Tensor, k: int, chunk_size: int, search_chunk: ChunkSearch
) -> tuple[Tensor, Tensor]:
    """Distances and rows `(n, k)` that `among` finds for so many queries at once."""
    if not len(queries):
        return queries.new_empty(0, k), torch.empty(0, k, dtype=torch.long, device=queries.device)
    distances, rows = zip(*map(search_chunk, queries.split(max(1, chunk_size))), strict=True)
    return torch.cat(distances), torch.cat(rows)


def _topk_inner_products(
    queries: Tensor, keys: Tensor, key_offsets: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest of product and handicap, and their rows, `(n, k)`, largest first; `KEYS` keys at a time."""
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
    """What `nearest` gives, but for a row in ten thousand: chosen by scores in half precision, then by exact distances.

    Args:
        halves: `keys` in bfloat16.
    """
    bf16_offsets, num_candidates = (
        key_offsets.to(bf16_keys.dtype),
        min(len(keys), CANDIDATES_PER_NEIGHBOR * k),
    )

    def search_chunk(chunk: Tensor) -> tuple[Tensor, Tensor]:
        rows = _topk_inner_products(
            chunk.to(bf16_keys.dtype), bf16_keys, bf16_offsets, num_candidates
        )[1]
        distances = (
            (chunk.unsqueeze(1) - keys[rows])
            .square()
            .sum(-1)
            .masked_fill(key_offsets[rows].isinf(), torch.inf)
        )
        nearest_distances, order = distances.topk(k, largest=False)
        return nearest_distances, rows.gather(1, order)

    return _search_in_chunks(
        queries,
        k,
        MAX_SCORES // max(1, min(len(keys), KEY_CHUNK), num_candidates * keys.shape[1] // 4),
        search_chunk,
    )


FAISS_KINDS = ("flat", "ivf", "hnsw")
IVF_MIN_ROWS = 10_000
"""Rows from which `ivf` has cells; below it compares with all."""
IVF_CELLS_FACTOR = 4
"""Cells of `ivf`, as a multiple of the root of the number of rows."""
IVF_PROBES = 48
"""Cells that a search looks into, however many there are: recall .98 at ten thousand rows, .998 at a million."""
HNSW_LINKS = 32
"""Neighbours of a row in `hnsw`."""
HNSW_EF_SEARCH = 128
"""Candidates that `hnsw` follows in a search."""


class FaissIndex:
    """Places of rows by their keys.

    Args:
        kind: `flat`, `ivf` or `hnsw`.
        width: numbers in a key.
    """

    def __init__(self, kind: str, width: int) -> None:
        if kind not in FAISS_KINDS:
            raise ValueError(f"index must be one of {', '.join(FAISS_KINDS)}, got {kind}")
        self.kind, self.width = kind, width
        self._index: Any = None
        self._built_count = 0
        # hnsw numbers rows in the order they came and keeps those that left
        self._row_of_label: list[int] = []  # the place of each
        self._label_of_row: dict[int, int] = {}
        self._deleted_labels: set[int] = set()

    def build(self, keys: Tensor, indices: Tensor) -> None:
        """Forget everything and hold these keys `(n, width)` at these places `(n,)`."""
        import faiss  # loads a second OpenMP runtime, so only where it is asked for

        faiss.omp_set_num_threads(torch.get_num_threads())
        count = len(indices)
        self._built_count = count
        self._row_of_label, self._label_of_row, self._deleted_labels = [], {}, set()
        if self.kind == "hnsw":
            self._index = faiss.IndexHNSWFlat(self.width, HNSW_LINKS, faiss.METRIC_L2)
            self._index.hnsw.efSearch = HNSW_EF_SEARCH
        elif self.kind == "ivf" and count >= IVF_MIN_ROWS:
            num_cells = min(
                int(IVF_CELLS_FACTOR * math.sqrt(count)), count // 39
            )  # faiss wants 39 rows a cell to train on
            self._index = faiss.IndexIVFFlat(
                faiss.IndexFlatL2(self.width), self.width, num_cells, faiss.METRIC_L2
            )
            self._index.train(_to_float32_array(keys))
            self._index.nprobe = min(num_cells, IVF_PROBES)
        else:
            self._index = faiss.IndexIDMap2(faiss.IndexFlatL2(self.width))
        self._insert(keys, indices)

    def _insert(self, keys: Tensor, indices: Tensor) -> None:
        if not len(indices):
            return
        if self.kind == "hnsw":
            self._label_of_row |= {
                index: label
                for label, index in enumerate(indices.tolist(), len(self._row_of_label))
            }
            self._row_of_label += indices.tolist()
            self._index.add(_to_float32_array(keys))
        else:
            self._index.add_with_ids(
                _to_float32_array(keys), indices.cpu().numpy().astype(np.int64)
            )

    def add(self, keys: Tensor, indices: Tensor) -> bool:
        """Hold these too; False where the index has to be built anew instead."""
        if self._index is None or (self.kind == "ivf" and self._needs_retraining(len(indices))):
            return False
        self._insert(keys, indices)
        return True

    def _needs_retraining(self, num_added: int) -> bool:
        return self._index.ntotal + num_added >= max(IVF_MIN_ROWS, 2 * self._built_count)

    def remove(self, indices: Tensor) -> bool:
        """Hold these no longer; False where the index has to be built anew instead."""
        if self._index is None:
            return False
        if self.kind != "hnsw":
            self._index.remove_ids(indices.cpu().numpy().astype(np.int64))
            return True
        self._deleted_labels.update(self._label_of_row.pop(index) for index in indices.tolist())
        return len(self._deleted_labels) * 4 <= len(self._row_of_label)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Places `(n, k)` of rows near to `queries` `(n, width)`; -1 where fewer were found."""
        num_results = k + len(self._deleted_labels) if self.kind == "hnsw" else k
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = max(HNSW_EF_SEARCH, num_results)
        _, labels = self._index.search(_to_float32_array(queries), num_results)
        if self.kind == "hnsw" and self._row_of_label:
            valid = (labels >= 0) & ~np.isin(labels, list(self._deleted_labels))
            order = np.argsort(~valid, axis=1, kind="stable")
            labels = np.take_along_axis(
                np.where(valid, np.array(self._row_of_label)[labels], -1), order, axis=1
            )[:, :k]
        return torch.as_tensor(labels, device=queries.device)


def _to_float32_array(states: Tensor) -> Any:
    return np.ascontiguousarray(states.detach().float().cpu().numpy())
