"""What faiss reads in a search, which torch does not see, for those who count reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SearchReads:
    """What one search read.

    Attributes:
        read_bytes: bytes by type: centers of cells, and the vectors of the cells searched.
        multiply_adds: multiplications with an addition.
        index_bytes: size of the whole index.
    """

    read_bytes: dict[str, int]
    multiply_adds: int
    index_bytes: int


_observer: ContextVar[Callable[[SearchReads], None] | None] = ContextVar("observer", default=None)


@contextmanager
def observe_searches(observer: Callable[[SearchReads], None]) -> Iterator[None]:
    """Call `observer` with what each search inside the block has read."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def search_index(index: Any, queries: Any, count: int) -> Any:
    """Search a faiss index.

    Args:
        index: an inverted file, or a flat index with ids.
        queries: array `(n, width)` of float32.
        count: vectors to find for each query.

    Returns:
        Ids `(n, count)`; -1 where fewer are found.
    """
    import faiss  # loads a second OpenMP runtime, so only where an index is configured

    observer = _observer.get()
    if observer is None:
        return index.search(queries, count)[1]
    statistics = faiss.cvar.indexIVF_stats  # type: ignore[attr-defined]
    statistics.reset()
    ids = index.search(queries, count)[1]
    num_queries, vector_bytes = len(queries), index.d * 4
    if isinstance(index, faiss.IndexIVF):
        code_type = "float32" if isinstance(index, faiss.IndexIVFFlat) else "uint8"
        read_bytes = {"float32": num_queries * index.nlist * vector_bytes}
        read_bytes[code_type] = (
            read_bytes.get(code_type, 0) + int(statistics.ndis) * index.code_size
        )
        num_products = num_queries * index.nlist + int(statistics.ndis)
        index_bytes = index.nlist * vector_bytes + index.ntotal * (index.code_size + 8)
    else:
        read_bytes = {"float32": num_queries * index.ntotal * vector_bytes}
        num_products = num_queries * index.ntotal
        index_bytes = index.ntotal * (vector_bytes + 8)
    observer(SearchReads(read_bytes, num_products * index.d, index_bytes))
    return ids
