"""Search by faiss, where a config asks for it. An index only finds places; distances are computed from the keys that are there.

What each kind can do was tried, not read (FINDINGS 4): `IndexIDMap2` keeps numbers where plain removal shifts them, `IVF`
has to be trained and removes by number, `HNSW` cannot remove at all. So rows that left an HNSW index are skipped
until they are a quarter of it, and then it is built anew.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = ("flat", "ivf", "hnsw")
TRAINED_FROM = 10_000
"""Rows from which `ivf` has cells; below it compares with all."""
CELLS = 4
"""Cells of `ivf`, as a multiple of the root of the number of rows."""
PROBED = 48
"""Cells that a search looks into, however many there are: recall .98 at ten thousand rows, .998 at a million."""
LINKS = 32
"""Neighbours of a row in `hnsw`."""
LOOKED = 128
"""Candidates that `hnsw` follows in a search."""


class FaissIndex:
    """Places of rows by their keys.

    Args:
        kind: `flat`, `ivf` or `hnsw`.
        width: numbers in a key.
    """

    def __init__(self, kind: str, width: int) -> None:
        if kind not in KINDS:
            raise ValueError(f"index must be one of {', '.join(KINDS)}, got {kind}")
        self.kind, self.width = kind, width
        self._index: Any = None
        self._built_with = 0
        # hnsw numbers rows in the order they came and keeps those that left
        self._labels: list[int] = []  # the place of each
        self._label_of: dict[int, int] = {}
        self._gone: set[int] = set()

    def build(self, keys: Tensor, places: Tensor) -> None:
        """Forget everything and hold these keys `(n, width)` at these places `(n,)`."""
        import faiss  # loads a second OpenMP runtime, so only where it is asked for

        faiss.omp_set_num_threads(torch.get_num_threads())
        count = len(places)
        self._built_with = count
        self._labels, self._label_of, self._gone = [], {}, set()
        if self.kind == "hnsw":
            self._index = faiss.IndexHNSWFlat(self.width, LINKS, faiss.METRIC_L2)
            self._index.hnsw.efSearch = LOOKED
        elif self.kind == "ivf" and count >= TRAINED_FROM:
            cells = min(int(CELLS * math.sqrt(count)), count // 39)  # faiss wants 39 rows a cell to train on
            self._index = faiss.IndexIVFFlat(faiss.IndexFlatL2(self.width), self.width, cells, faiss.METRIC_L2)
            self._index.train(_floats(keys))
            self._index.nprobe = min(cells, PROBED)
        else:
            self._index = faiss.IndexIDMap2(faiss.IndexFlatL2(self.width))
        self._add(keys, places)

    def _add(self, keys: Tensor, places: Tensor) -> None:
        if not len(places):
            return
        if self.kind == "hnsw":
            self._label_of |= {place: label for label, place in enumerate(places.tolist(), len(self._labels))}
            self._labels += places.tolist()
            self._index.add(_floats(keys))
        else:
            self._index.add_with_ids(_floats(keys), places.cpu().numpy().astype(np.int64))

    def add(self, keys: Tensor, places: Tensor) -> bool:
        """Hold these too; False where the index has to be built anew instead."""
        if self._index is None or (self.kind == "ivf" and self._outgrown(len(places))):
            return False
        self._add(keys, places)
        return True

    def _outgrown(self, more: int) -> bool:
        return self._index.ntotal + more >= max(TRAINED_FROM, 2 * self._built_with)

    def remove(self, places: Tensor) -> bool:
        """Hold these no longer; False where the index has to be built anew instead."""
        if self._index is None:
            return False
        if self.kind != "hnsw":
            self._index.remove_ids(places.cpu().numpy().astype(np.int64))
            return True
        self._gone.update(self._label_of.pop(place) for place in places.tolist())
        return len(self._gone) * 4 <= len(self._labels)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Places `(n, k)` of rows near to `queries` `(n, width)`; -1 where fewer were found."""
        more = k + len(self._gone) if self.kind == "hnsw" else k
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = max(LOOKED, more)
        _, found = self._index.search(_floats(queries), more)
        if self.kind == "hnsw" and self._labels:
            there = (found >= 0) & ~np.isin(found, list(self._gone))
            order = np.argsort(~there, axis=1, kind="stable")
            found = np.take_along_axis(np.where(there, np.array(self._labels)[found], -1), order, axis=1)[:, :k]
        return torch.as_tensor(found, device=queries.device)


def _floats(states: Tensor) -> Any:
    return np.ascontiguousarray(states.detach().float().cpu().numpy())
