"""The rows of an associative memory in RAM, with their usage statistics and the search over keys.

The table is derived from a store and kept in step with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dmt.memory.knn_search import FaissIndex, bf16_knn, exact_knn
from dmt.ops import move_together
from dmt.store.records import IntArray, RowBatch, RowInsert, RowUsage

Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

# Fields of `RowStats` that a store holds under the same names.
STORED_STATS = ("score", "score_step", "entries", "created", "pinned", "reads")
# Values of `index` that compare a query with every key.
EXACT_INDEXES = ("exact", "bf16")
# Smallest number of rows allocated at once.
GROWTH_STEP = 1_024


def decayed_score(
    scores: Float64Array, score_steps: Int64Array, step: int, decay: float
) -> Float64Array:
    """Compute LRFU scores as of `step`; a score halves every `1 / decay` steps.

    With `decay` 0 the score is the number of uses, so the least frequently used row has the
    lowest; with 1 one use counts more than all earlier ones together, so the least recently used
    row has.

    Args:
        scores: `(n,)`, as of `score_steps`.
        score_steps: `(n,)`.
        step: the current step.
        decay: from 0 to 1.

    Source: Lee et al. 2001, "LRFU: a spectrum of policies that subsumes the least recently used
        and least frequently used policies", with F(x) = 2^(-decay x).
    """
    return scores * np.exp2(-decay * (step - score_steps))


def eviction_order(
    scores: Float64Array, score_steps: Int64Array, step: int, decay: float, count: int
) -> Int64Array:
    """Return the indices of the `count` lowest LRFU scores, lowest first, earlier ones on ties."""
    # In logarithms: scores that decayed for long would round to zero and all look alike.
    with np.errstate(divide="ignore"):
        log_scores = np.log2(scores) - decay * (step - score_steps.astype(np.float64))
    return np.argsort(log_scores, kind="stable")[:count].astype(np.int64)


@dataclass
class RowStats:
    """Statistics of rows, an array for each field over all positions of a table.

    Attributes:
        score: LRFU score as of `score_step`.
        score_step: step at which the score was last updated.
        reads: how often the row was read.
        last_read: seconds since 1970.
        entries: rows that were merged into it, itself included.
        created: seconds since 1970.
        pinned: whether it is never evicted or merged into.
        used: whether it was read since usage was last stored.
        tags: one per row.
    """

    score: NDArray[np.float64]
    score_step: IntArray
    reads: IntArray
    last_read: NDArray[np.float64]
    entries: IntArray
    created: NDArray[np.float64]
    pinned: NDArray[np.bool_]
    used: NDArray[np.bool_]
    tags: list[str]

    @classmethod
    def empty(cls, size: int) -> RowStats:
        """Create statistics of `size` empty positions."""
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
        """Copy the statistics at `indices`, in this order."""
        arrays = {
            name: array[indices].copy()
            for name, array in vars(self).items()
            if isinstance(array, np.ndarray)
        }
        return RowStats(**arrays, tags=[self.tags[index] for index in indices])

    def enlarge(self, size: int) -> RowStats:
        """Copy the statistics with empty positions added up to `size`."""
        added = RowStats.empty(size - len(self.tags))
        arrays = {
            name: np.concatenate([array, getattr(added, name)])
            for name, array in vars(self).items()
            if isinstance(array, np.ndarray)
        }
        return RowStats(**arrays, tags=self.tags + added.tags)


@dataclass(frozen=True)
class SearchResult:
    """What a search found, nearest first, all `(n, k)`.

    Attributes:
        distances: squared Euclidean distances; infinite where there is no further row.
        indices: positions of the rows; meaningless where the distance is infinite.
    """

    distances: Tensor
    indices: Tensor


class RowTable(nn.Module):
    """Keys, values and ids of rows at positions that do not change; an empty one has the id -1.

    Args:
        key_width: size of a key.
        value_width: size of a value.
        allocated_rows: positions to allocate; more are added when they are needed.
        index: `exact`; `bf16`, exact among those nearest in bfloat16; or a kind of faiss index.

    Raises:
        ValueError: `index` is unknown.
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
        # What the host knows of the rows, so that it does not wait for a device to tell.
        self._host_ids: IntArray | None = None
        self._index_by_id: dict[int, int] | None = None
        self._stats: RowStats | None = None

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        result = super()._apply(fn, recurse)
        self._key_offsets = self._bf16_keys = None  # of the old dtype and device
        return result

    def __getstate__(self) -> dict[str, Any]:
        # A copy builds its index and what else is derived from the rows.
        derived = dict.fromkeys(("_key_offsets", "_bf16_keys"))
        return self.__dict__ | derived | {"_index_is_current": False}

    def reset(self) -> None:
        """Remove all rows."""
        self.ids.fill_(-1)
        self._index_is_current = False
        self._key_offsets = self._bf16_keys = self._stats = None
        self._host_ids = self._index_by_id = None

    @property
    def allocated_rows(self) -> int:
        """Number of positions."""
        return len(self.ids)

    @property
    def host_ids(self) -> IntArray:
        """Copy of `ids` in the memory of the host."""
        if self._host_ids is None:
            self._host_ids = self.ids.cpu().numpy().copy()
        return self._host_ids

    @property
    def index_by_id(self) -> dict[int, int]:
        """Position of each row by its id."""
        if self._index_by_id is None:
            occupied = (self.host_ids >= 0).nonzero()[0]
            self._index_by_id = dict(
                zip(self.host_ids[occupied].tolist(), occupied.tolist(), strict=True)
            )
        return self._index_by_id

    def __len__(self) -> int:
        return len(self.index_by_id)

    @property
    def stats(self) -> RowStats:
        """Statistics of the rows."""
        if self._stats is None:
            self._stats = RowStats.empty(self.allocated_rows)
            self._stats.entries[self.host_ids >= 0] = 1
        return self._stats

    def search(self, queries: Tensor, k: int) -> SearchResult:
        """Find the k rows whose keys are nearest to each of `queries` `(n, key width)`.

        A faiss index may miss some.
        """
        queries = queries.detach().to(self.keys.dtype)
        if torch.compiler.is_compiling():  # faiss is not part of a graph
            return self._search_keys(queries, k, use_bf16=False)
        if self._index is not None and len(self) > k:
            return self._search_index(queries, k)
        return self._search_keys(queries, k, self._uses_bf16)

    def search_exact(self, queries: Tensor, k: int) -> SearchResult:
        """Find the k nearest rows without an index, to measure an index's recall."""
        return self._search_keys(queries.detach().to(self.keys.dtype), k, use_bf16=False)

    def _search_keys(self, queries: Tensor, k: int, use_bf16: bool) -> SearchResult:
        offsets = self._key_offsets
        if offsets is None or (offsets.device, offsets.dtype) != (
            self.keys.device,
            self.keys.dtype,
        ):
            offsets = (-self.keys.square().sum(-1) / 2).masked_fill(self.ids < 0, -torch.inf)
            if not torch.compiler.is_compiling():
                self._key_offsets = offsets
        num_available = min(k, self.allocated_rows)
        with torch.autocast(self.keys.device.type, enabled=False):
            if use_bf16:
                if self._bf16_keys is None or self._bf16_keys.device != self.keys.device:
                    self._bf16_keys = self.keys.bfloat16()
                distances, indices = bf16_knn(
                    queries, self.keys, self._bf16_keys, offsets, num_available
                )
            else:
                distances, indices = exact_knn(queries, self.keys, offsets, num_available)
        if num_available == k:
            return SearchResult(distances, indices)
        padding_shape = (len(queries), k - num_available)
        return SearchResult(
            torch.cat([distances, distances.new_full(padding_shape, torch.inf)], 1),
            torch.cat([indices, indices.new_zeros(padding_shape)], 1),
        )

    def _search_index(self, queries: Tensor, k: int) -> SearchResult:
        assert self._index is not None, "only called with an index"
        if not self._index_is_current:
            occupied = (self.ids >= 0).nonzero().flatten()
            self._index.build(self.keys[occupied], occupied)
            self._index_is_current = True
        raw_indices = self._index.search(queries, k)
        indices = raw_indices.clamp_min(0)
        with torch.autocast(self.keys.device.type, enabled=False):
            distances = (queries.unsqueeze(1) - self.keys[indices]).square().sum(-1)
        is_missing = (raw_indices < 0) | (self.ids[indices] < 0)
        distances, order = distances.masked_fill(is_missing, torch.inf).sort(-1)
        return SearchResult(distances, indices.gather(1, order))

    def insert_rows(self, batch: RowInsert, step: int) -> IntArray:
        """Insert rows and allocate positions where none are free.

        Args:
            batch: n rows.
            step: as of which their scores are.

        Returns:
            Their positions `(n,)`.
        """
        change = self.plan_insertion(batch, step)
        self.write_change(move_together(change, self.ids.device))
        return change[0].numpy()

    def plan_insertion(self, batch: RowInsert, step: int) -> list[Tensor]:
        """Insert rows into what the host knows; `write_change` inserts them into the tensors.

        Args:
            batch: n rows.
            step: as of which their scores are.

        Returns:
            Positions, ids, keys and values, on the CPU.
        """
        count = len(batch.ids)
        indices = self._find_free(count)
        if len(indices) < count:
            self._grow(count - len(indices))
            indices = self._find_free(count)
        stats = self.stats
        stats.score[indices], stats.score_step[indices] = batch.scores, step
        stats.reads[indices], stats.last_read[indices] = 0, 0.0
        stats.used[indices] = False
        stats.entries[indices] = 1 if batch.entries is None else batch.entries
        stats.created[indices] = 0.0 if batch.created is None else batch.created
        stats.pinned[indices] = batch.pinned
        tags = [batch.tag] * count if isinstance(batch.tag, str) else batch.tag
        for index, tag in zip(indices, tags, strict=True):
            stats.tags[index] = tag
        self.index_by_id.update(zip(batch.ids.tolist(), indices.tolist(), strict=True))
        self.host_ids[indices] = batch.ids
        arrays: tuple[Any, ...] = (indices, batch.ids, batch.keys, batch.values)
        return [_as_tensor(array) for array in arrays]

    @torch.no_grad()
    def write_change(self, change: Sequence[Tensor]) -> None:
        """Write what `plan_insertion` or `plan_removal` returned, moved to the table's device."""
        positions, ids, *states = change
        self.ids[positions] = ids
        if not states:
            if self._index_is_current and self._index is not None:
                self._index_is_current = self._index.remove(positions)
            if self._key_offsets is not None:
                self._key_offsets[positions] = -torch.inf
            return
        keys, values = states
        self.keys[positions] = keys.to(self.keys.dtype)
        self.values[positions] = values.to(self.values.dtype)
        if self._key_offsets is not None:
            self._key_offsets[positions] = -self.keys[positions].square().sum(-1) / 2
        if self._bf16_keys is not None:
            self._bf16_keys[positions] = self.keys[positions].to(self._bf16_keys.dtype)
        if self._index_is_current and self._index is not None:
            self._index_is_current = self._index.add(self.keys[positions], positions)

    def _find_free(self, count: int) -> IntArray:
        """Return the first positions without a row, `count` at most."""
        return (self.host_ids < 0).nonzero()[0][:count]

    def _grow(self, num_needed: int) -> None:
        min_size = self.allocated_rows + max(num_needed, GROWTH_STEP, self.allocated_rows // 2)
        new_size = -(-min_size // GROWTH_STEP) * GROWTH_STEP
        stats, num_added = self.stats.enlarge(new_size), new_size - self.allocated_rows
        # Touching new pages is expensive, so zeros are not written twice.
        self.keys, self.values = (
            torch.cat([tensor, _lazy_zeros(num_added, tensor)])
            if self.allocated_rows
            else _lazy_zeros(num_added, tensor)
            for tensor in (self.keys, self.values)
        )
        self.ids = torch.cat([self.ids, self.ids.new_full((num_added,), -1)])
        self._host_ids = np.concatenate([self.host_ids, np.full(num_added, -1)])
        self._stats, self._key_offsets, self._bf16_keys = stats, None, None

    def delete_rows(self, ids: Iterable[int]) -> None:
        """Remove rows.

        Args:
            ids: of the rows.

        Raises:
            KeyError: no row has one of the ids.
        """
        self.write_change(move_together(self.plan_removal(ids), self.ids.device))

    def plan_removal(self, ids: Iterable[int]) -> list[Tensor]:
        """Remove rows from what the host knows; `write_change` removes them from the tensors.

        Args:
            ids: of the rows.

        Returns:
            Positions, and -1 for the id of each, on the CPU.

        Raises:
            KeyError: no row has one of the ids.
        """
        indices = [self.index_by_id.pop(int(row_id)) for row_id in ids]
        self.host_ids[indices] = -1
        positions = torch.tensor(indices, dtype=torch.long)
        return [positions, torch.full_like(positions, -1)]

    def record_reads(
        self, indices: IntArray, weights: NDArray[np.float64], step: int, now: float, decay: float
    ) -> None:
        """Update the statistics of rows that were read.

        Args:
            indices: positions `(n,)`, once for each read.
            weights: of each read, `(n,)`.
            step: the current step.
            now: seconds since 1970.
            decay: of the LRFU score.
        """
        stats = self.stats
        unique_indices, inverse = np.unique(indices, return_inverse=True)
        scores = decayed_score(
            stats.score[unique_indices], stats.score_step[unique_indices], step, decay
        )
        stats.score[unique_indices] = scores + np.bincount(inverse, weights, len(unique_indices))
        stats.score_step[unique_indices], stats.last_read[unique_indices] = step, now
        stats.reads[unique_indices] += np.bincount(inverse, minlength=len(unique_indices))
        stats.used[unique_indices] = True

    def pop_usage(self) -> RowUsage | None:
        """Return the statistics of rows read since the last call; None where none was."""
        stats = self.stats
        used_indices = ((self.host_ids >= 0) & stats.used).nonzero()[0]
        if not len(used_indices):
            return None
        usage = RowUsage(
            self.ids_at(used_indices),
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
        """Replace all rows by those of a store, with their statistics.

        Args:
            batches: the rows.
            layout: id of the row at each position, -1 for none. With it rows get the positions
                they had, and sums over them are the same to the last bit. A row that is not in it
                is appended.
            expected_rows: how many there will be, as a hint.
        """
        self.reset()
        if expected_rows > self.allocated_rows:
            self._grow(expected_rows - self.allocated_rows)
        start = 0
        for batch in batches:  # each is copied once, to its final position
            span = slice(start, start + len(batch.ids))
            if span.stop > self.allocated_rows:
                self._grow(span.stop - self.allocated_rows)
            stats = self.stats
            for buffer, array in (
                (self.keys, batch.keys),
                (self.values, batch.values),
                (self.ids, batch.ids),
            ):
                buffer[span] = _as_tensor(array)
            for name in STORED_STATS:
                getattr(stats, name)[span] = batch.metadata[name]
            stats.last_read[span] = [
                0.0 if timestamp is None else timestamp for timestamp in batch.metadata["last_read"]
            ]
            stats.tags[span] = batch.metadata["tag"]
            start += len(batch.ids)
        self._host_ids = None
        if layout is not None:
            self._apply_layout(layout)

    def _apply_layout(self, layout: IntArray) -> None:
        index_by_id = self.index_by_id
        row_ids = [int(row_id) for row_id in layout]
        layout_ids = set(row_ids)
        row_ids += [row_id for row_id in index_by_id if row_id not in layout_ids]
        old_indices = np.array([index_by_id.get(row_id, -1) for row_id in row_ids], np.int64)
        occupied = torch.as_tensor(old_indices >= 0, device=self.ids.device)
        gather_indices = torch.as_tensor(old_indices, device=self.ids.device).clamp_min(0)
        old_stats = self.stats
        if not self.allocated_rows:  # gathering needs a position, even an empty one
            self._grow(max(1, len(row_ids)))
            old_stats, gather_indices = self.stats, gather_indices.clamp_max(0)
        self.keys = torch.where(occupied.unsqueeze(-1), self.keys[gather_indices], 0)
        self.values = torch.where(occupied.unsqueeze(-1), self.values[gather_indices], 0)
        self.ids = torch.where(occupied, self.ids[gather_indices], -1)
        self._stats = old_stats.select_rows(np.where(old_indices >= 0, old_indices, 0))
        self._host_ids = self._index_by_id = self._key_offsets = self._bf16_keys = None
        self._index_is_current = False

    def ids_at(self, indices: Sequence[int] | IntArray | Tensor) -> IntArray:
        """Return the ids of the rows at `indices`."""
        return self.host_ids[indices.cpu().numpy() if isinstance(indices, Tensor) else indices]


def _lazy_zeros(num_rows: int, like: Tensor) -> Tensor:
    """Create zeros `(num_rows, width of like)`, without touching their pages where possible."""
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return like.new_zeros(num_rows, like.shape[1])
    return torch.from_numpy(np.zeros((num_rows, like.shape[1]), np.float32))


def _as_tensor(array: NDArray[np.generic]) -> Tensor:
    """Wrap an array, maybe bytes of a database, in a tensor that is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array)
