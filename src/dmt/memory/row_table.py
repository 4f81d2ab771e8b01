"""The rows of an associative memory as search sees them: a working set, derived from a store and kept in step with it.

Which rows a bounded memory can do without: LRFU, between least recently and least frequently used.

What is known of stored rows beside keys and values: how warm, how old, how often read, who is pinned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dmt.memory.knn_search import FaissIndex, bf16_knn, exact_knn
from dmt.store.records import IntArray, RowBatch, RowInsert, RowUsage

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]


def decayed_score(
    scores: Float64Array, score_steps: Int64Array, step: int, decay: float
) -> Float64Array:
    """Heat as of step `now` of rows whose heat was `heat` at the steps `since`; it halves every `1 / decay` steps.

    With `decay` 0 heat is the number of uses, so the least frequently used is coldest; with 1 a use is worth more than
    all earlier ones together, so the least recently used is.

    Source: the combined recency and frequency of Lee et al. 2001, "LRFU: a spectrum of policies that subsumes the least
        recently used and least frequently used policies", with F(x) = 2^(-decay x).
    """
    return scores * np.exp2(-decay * (step - score_steps))


def eviction_order(
    scores: Float64Array, score_steps: Int64Array, step: int, decay: float, count: int
) -> Int64Array:
    """Indices of the `count` coldest rows, coldest first; of equally cold ones the earlier."""
    # In logarithms, since heat long unread would round to nothing and all such rows look alike.
    with np.errstate(divide="ignore"):
        log_scores = np.log2(scores) - decay * (step - score_steps.astype(np.float64))
    return np.argsort(log_scores, kind="stable")[:count].astype(np.int64)


@dataclass
class RowStats:
    """What is known of each place's row beside key and value: arrays over all places."""

    score: NDArray[np.float64]
    score_step: IntArray
    reads: IntArray
    last_read: NDArray[np.float64]
    entries: IntArray
    created: NDArray[np.float64]
    pinned: NDArray[np.bool_]
    used: NDArray[np.bool_]  # since usage was last taken
    tags: list[str]

    @classmethod
    def empty(cls, size: int) -> RowStats:
        """Of places that hold no rows."""
        return cls(
            score=np.zeros(size),
            score_step=np.zeros(size, np.int64),
            reads=np.zeros(size, np.int64),
            last_read=np.zeros(size),
            entries=np.zeros(size, np.int64),
            created=np.zeros(size),
            pinned=np.zeros(size, bool),
            used=np.zeros(size, bool),
            tags=[""] * size,
        )

    def select_rows(self, indices: IntArray) -> RowStats:
        """Those at the places `at`, in this order."""
        arrays = {
            name: array[indices].copy()
            for name, array in vars(self).items()
            if isinstance(array, np.ndarray)
        }
        return RowStats(**arrays, tags=[self.tags[index] for index in indices])

    def enlarge(self, size: int) -> RowStats:
        """The same, with room for more."""
        added = RowStats.empty(size - len(self.tags))
        arrays = {
            name: np.concatenate([array, getattr(added, name)])
            for name, array in vars(self).items()
            if isinstance(array, np.ndarray)
        }
        return RowStats(**arrays, tags=self.tags + added.tags)


STORED_STATS = ("score", "score_step", "entries", "created", "pinned", "reads")
"""What a store knows of a row that is kept here as it stands there."""
EXACT_INDEXES = ("exact", "bf16")
"""Ways to search that compare a query with every key."""
GROWTH_STEP = 1_024
"""Places that are made at once, at least."""


@dataclass(frozen=True)
class SearchResult:
    """What a search gives, nearest first, all `(n, k)`.

    Attributes:
        distances: squared Euclidean distances; infinite where there was no further row.
        places: where the rows lie; meaningless where the distance is infinite.
    """

    distances: Tensor
    indices: Tensor


class RowTable(nn.Module):
    """Keys, values and numbers of rows at places that do not move; a place without a row has the number -1.

    Args:
        key_width: numbers in a key.
        value_width: numbers in a value.
        places: room at the start; more is made when it is needed.
        index: `exact`; `half`, exact among those that look nearest in half precision; or a kind of faiss index.
    """

    def __init__(
        self, key_width: int, value_width: int, allocated_rows: int = 0, index: str = "exact"
    ) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.ids: Tensor
        self.register_buffer("keys", torch.zeros(allocated_rows, key_width))
        self.register_buffer("values", torch.zeros(allocated_rows, value_width))
        self.register_buffer("ids", torch.full((allocated_rows,), -1))
        self.index = index
        self._index = None if index in EXACT_INDEXES else FaissIndex(index, key_width)
        self._uses_bf16 = index == "bf16"
        self._bf16_keys: Tensor | None = None
        self._index_is_current = False
        self._key_offsets: Tensor | None = None
        self._index_by_id: dict[int, int] | None = None
        self._stats: RowStats | None = None

    def reset(self) -> None:
        """No rows."""
        self.ids.fill_(-1)
        self._index_is_current = False
        self._key_offsets = self._bf16_keys = self._index_by_id = self._stats = None

    @property
    def allocated_rows(self) -> int:
        """Rows there is room for now."""
        return len(self.ids)

    @property
    def index_by_id(self) -> dict[int, int]:
        """Where the row of each number lies."""
        if self._index_by_id is None:
            occupied = (self.ids >= 0).nonzero().flatten()
            self._index_by_id = dict(
                zip(self.ids[occupied].tolist(), occupied.tolist(), strict=True)
            )
        return self._index_by_id

    def __len__(self) -> int:
        return len(self.index_by_id)

    @property
    def stats(self) -> RowStats:
        """What is known of the rows beside keys and values."""
        if self._stats is None:
            self._stats = RowStats.empty(self.allocated_rows)
            self._stats.entries[(self.ids >= 0).cpu().numpy()] = 1
        return self._stats

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """The k rows whose keys are nearest to each of `queries` `(n, key width)`; by an index, rows near to it."""
        if self._index is not None and len(self) > k:
            return self._search_index(queries.detach().to(self.keys.dtype), k)
        offsets = self._key_offsets
        if offsets is None or (offsets.device, offsets.dtype) != (self.keys.device, self.keys.dtype):
            self._key_offsets = (-self.keys.square().sum(-1) / 2).masked_fill(
                self.ids < 0, -torch.inf
            )
        cast_queries, num_available = (
            queries.detach().to(self.keys.dtype),
            min(k, self.allocated_rows),
        )
        with torch.autocast(self.keys.device.type, enabled=False):
            if self._uses_bf16:
                if self._bf16_keys is None or self._bf16_keys.device != self.keys.device:
                    self._bf16_keys = self.keys.bfloat16()
                distances, indices = bf16_knn(
                    cast_queries, self.keys, self._bf16_keys, self._key_offsets, num_available
                )
            else:
                distances, indices = exact_knn(
                    cast_queries, self.keys, self._key_offsets, num_available
                )
        if num_available == k:
            return SearchResult(distances, indices)
        padding_shape = (len(queries), k - num_available)
        return SearchResult(
            torch.cat([distances, distances.new_full(padding_shape, torch.inf)], 1),
            torch.cat([indices, indices.new_zeros(padding_shape)], 1),
        )

    def _search_index(self, queries: Tensor, k: int) -> SearchResult:
        assert self._index is not None, "asked for where there is one"
        if not self._index_is_current:
            occupied = (self.ids >= 0).nonzero().flatten()
            self._index.build(self.keys[occupied], occupied)
            self._index_is_current = True
        raw_indices = self._index.search(queries, k)
        indices = raw_indices.clamp_min(0)
        with torch.autocast(self.keys.device.type, enabled=False):
            distances = (queries.unsqueeze(1) - self.keys[indices]).square().sum(-1)
        distances, order = distances.masked_fill(
            (raw_indices < 0) | (self.ids[indices] < 0), torch.inf
        ).sort(-1)
        return SearchResult(distances, indices.gather(1, order))

    def search_exact(self, queries: Tensor, k: int) -> SearchResult:
        """`search` without an index, to tell an index's recall."""
        previous = self._index, self._uses_bf16
        self._index, self._uses_bf16 = None, False
        try:
            return self.search(queries, k)
        finally:
            self._index, self._uses_bf16 = previous

    @torch.no_grad()
    def insert_rows(self, batch: RowInsert, step: int) -> IntArray:
        """Add rows and make room where there is none; their places `(n,)`."""
        count = len(batch.ids)
        free = (self.ids < 0).nonzero().flatten()[:count]
        if len(free) < count:
            self._grow(count - len(free))
            free = (self.ids < 0).nonzero().flatten()[:count]
        self.keys[free] = torch.as_tensor(batch.keys).to(self.keys)
        self.values[free] = torch.as_tensor(batch.values).to(self.values)
        self.ids[free] = torch.as_tensor(batch.ids).to(self.ids)
        if self._key_offsets is not None:
            self._key_offsets[free] = -self.keys[free].square().sum(-1) / 2
        if self._bf16_keys is not None:
            self._bf16_keys[free] = self.keys[free].to(self._bf16_keys.dtype)
        if self._index_is_current and self._index is not None:
            self._index_is_current = self._index.add(self.keys[free], free)
        indices = free.cpu().numpy()
        stats = self.stats
        (
            stats.score[indices],
            stats.score_step[indices],
            stats.reads[indices],
            stats.last_read[indices],
        ) = batch.scores, step, 0, 0.0
        stats.used[indices] = False
        stats.entries[indices] = 1 if batch.entries is None else batch.entries
        stats.created[indices] = 0.0 if batch.created is None else batch.created
        stats.pinned[indices] = batch.pinned
        for index, tag in zip(
            indices, [batch.tag] * count if isinstance(batch.tag, str) else batch.tag, strict=True
        ):
            stats.tags[index] = tag
        self.index_by_id.update(zip(batch.ids.tolist(), indices.tolist(), strict=True))
        return indices

    def _grow(self, num_needed: int) -> None:
        new_size = (
            -(
                -(self.allocated_rows + max(num_needed, GROWTH_STEP, self.allocated_rows // 2))
                // GROWTH_STEP
            )
            * GROWTH_STEP
        )
        stats, num_added = self.stats.enlarge(new_size), new_size - self.allocated_rows
        self.keys, self.values = (  # new pages are costly, so nothing is made twice
            torch.cat([tensor, _lazy_zeros(num_added, tensor)])
            if self.allocated_rows
            else _lazy_zeros(num_added, tensor)
            for tensor in (self.keys, self.values)
        )
        self.ids = torch.cat([self.ids, self.ids.new_full((num_added,), -1)])
        self._stats, self._key_offsets, self._bf16_keys = stats, None, None

    @torch.no_grad()
    def delete_rows(self, ids: Iterable[int]) -> None:
        """Take rows out; numbers that are not there are an error.

        Raises:
            KeyError: no row has one of these numbers.
        """
        indices = [self.index_by_id.pop(int(row_id)) for row_id in ids]
        self.ids[indices] = -1
        if self._index_is_current and self._index is not None:
            self._index_is_current = self._index.remove(torch.as_tensor(indices))
        if self._key_offsets is not None:
            self._key_offsets[indices] = -torch.inf

    def record_reads(
        self, indices: IntArray, weights: NDArray[np.float64], step: int, now: float, decay: float
    ) -> None:
        """Note that rows were read: `places` and how much each counted, both `(n,)`, a place once for each read."""
        stats = self.stats
        unique_indices, inverse = np.unique(indices, return_inverse=True)
        added = np.bincount(inverse, weights, len(unique_indices))
        stats.score[unique_indices] = (
            decayed_score(
                stats.score[unique_indices], stats.score_step[unique_indices], step, decay
            )
            + added
        )
        stats.score_step[unique_indices], stats.last_read[unique_indices] = step, now
        stats.reads[unique_indices] += np.bincount(inverse, minlength=len(unique_indices))
        stats.used[unique_indices] = True

    def pop_usage(self) -> RowUsage | None:
        """How rows have been used since this was last asked; None where none has."""
        stats = self.stats
        used_indices = ((self.ids >= 0).cpu().numpy() & stats.used).nonzero()[0]
        if not len(used_indices):
            return None
        ids = self.ids[torch.as_tensor(used_indices, device=self.ids.device)].cpu().numpy()
        usage = RowUsage(
            ids,
            stats.reads[used_indices],
            stats.last_read[used_indices],
            stats.score[used_indices].astype(np.float32),
            stats.score_step[used_indices],
        )
        stats.used[used_indices] = False
        return usage

    @torch.no_grad()
    def load_rows(
        self, batches: Iterable[RowBatch], layout: IntArray | None = None, expected_rows: int = 0
    ) -> None:
        """Hold these rows and no others, with what the store knows of them; `expected` of them, as a hint.

        With `places`, the number of the row at each place (-1 for none), they lie where they lay: sums over them are then
        the same to the last bit. A row that `places` does not name is added behind them.
        """
        self.reset()
        if expected_rows > self.allocated_rows:
            self._grow(expected_rows - self.allocated_rows)
        start = 0
        for batch in batches:  # each is copied once, to where it stays
            span = slice(start, start + len(batch.ids))
            if span.stop > self.allocated_rows:
                self._grow(span.stop - self.allocated_rows)
            stats = self.stats
            for buffer, array in (
                (self.keys, batch.keys),
                (self.values, batch.values),
                (self.ids, batch.ids),
            ):
                buffer[span] = (
                    torch.tensor(array).to(buffer) if buffer.is_cuda else _as_tensor(array)
                )
            for name in STORED_STATS:
                getattr(stats, name)[span] = batch.metadata[name]
            stats.last_read[span] = [
                0.0 if timestamp is None else timestamp for timestamp in batch.metadata["last_read"]
            ]
            stats.tags[span] = batch.metadata["tag"]
            start += len(batch.ids)
        if layout is not None:
            self._apply_layout(layout)

    def _apply_layout(self, layout: IntArray) -> None:
        index_by_id = self.index_by_id
        row_ids = [int(row_id) for row_id in layout]
        layout_ids = set(row_ids)
        unplaced_ids = [row_id for row_id in index_by_id if row_id not in layout_ids]
        row_ids += unplaced_ids
        old_indices = np.array([index_by_id.get(row_id, -1) for row_id in row_ids], np.int64)
        occupied = torch.as_tensor(old_indices >= 0, device=self.ids.device)
        gather_indices = torch.as_tensor(old_indices, device=self.ids.device).clamp_min(0)
        old_stats = self.stats
        if not self.allocated_rows:  # nothing to take from
            self._grow(max(1, len(row_ids)))
            old_stats, gather_indices = self.stats, gather_indices.clamp_max(0)
        self.keys = torch.where(occupied.unsqueeze(-1), self.keys[gather_indices], 0)
        self.values = torch.where(occupied.unsqueeze(-1), self.values[gather_indices], 0)
        self.ids = torch.where(occupied, self.ids[gather_indices], -1)
        self._stats = old_stats.select_rows(np.where(old_indices >= 0, old_indices, 0))
        self._index_by_id = self._key_offsets = self._bf16_keys = None
        self._index_is_current = False

    def ids_at(self, indices: Sequence[int] | IntArray | Tensor) -> IntArray:
        """Numbers of the rows at `places`."""
        return self.ids[torch.as_tensor(indices, device=self.ids.device)].cpu().numpy()


def _lazy_zeros(num_rows: int, like: Tensor) -> Tensor:
    """Zeros `(rows, width of like)` that take no memory before they are written to, where the system can do that."""
    if like.is_cuda or like.dtype != torch.float32:
        return like.new_zeros(num_rows, like.shape[1])
    return torch.from_numpy(np.zeros((num_rows, like.shape[1]), np.float32))


def _as_tensor(array: NDArray[np.generic]) -> Tensor:
    """An array that may be bytes of a database, as a tensor that is only read from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)
