"""Which proposed rows enter a bounded memory, as what, and which rows are evicted for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmt.memory.knn_search import MAX_SCORES
from dmt.memory.row_table import RowTable, decayed_score, eviction_order
from dmt.ops import move_together
from dmt.store.records import FloatArray, IntArray, RowInsert, StepChanges

CPU = torch.device("cpu")


@dataclass(frozen=True)
class InsertPolicy:
    """How a memory is kept small.

    Attributes:
        min_distance: distance (keys have length 1) up to which a proposed row is a duplicate of
            the nearest one and is not inserted.
        merge_distance: distance up to which it is merged into the nearest one; no row is where it
            is not larger than `min_distance`.
        capacity: largest number of rows.
        decay: of the LRFU score, from 0 (least frequently used leaves first) to 1 (least recently
            used); the score halves every `1 / decay` steps.

    Raises:
        ValueError: a number is out of range.
    """

    min_distance: float = 0.2
    merge_distance: float = 0.55
    capacity: int = 65_536
    decay: float = 0.01

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("min_distance", "merge_distance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {self.capacity}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {self.decay}")


@dataclass(frozen=True)
class InsertResult:
    """What became of a step's proposed rows.

    Attributes:
        changes: for a store.
        unmerged_ids: ids of the inserted rows that are one proposal unchanged, `(n,)`.
        unmerged_candidates: index of the proposal of each, `(n,)`.
    """

    changes: StepChanges
    unmerged_ids: IntArray
    unmerged_candidates: IntArray


@torch.no_grad()
def apply_insert_policy(
    rows: RowTable,
    keys: Tensor,
    values: Tensor,
    tags: Sequence[str],
    policy: InsertPolicy,
    step: int,
    now: float,
    allocate_ids: Callable[[int], IntArray],
) -> InsertResult:
    """Insert those of the proposed rows that are new.

    In the order proposed: a row within `min_distance` of an existing one is dropped, one within
    `merge_distance` merged into it (the mean weighted by entries, tags joined, the oldest creation
    time, a new id; a pinned row stays unchanged), the others are inserted; of rows proposed
    together the first represents those near it. Above `capacity` the rows with the lowest score
    that are not pinned are evicted; where only pinned rows remain, the earliest proposals are
    dropped.

    Args:
        rows: changed in place.
        keys: `(n, key width)`.
        values: `(n, value width)`.
        tags: n of them.
        policy: distances and capacity.
        step: number of the current step.
        now: seconds since 1970.
        allocate_ids: returns so many new ids.

    Raises:
        ValueError: a number is not finite; nothing has changed.
    """
    # Rows are put together on the CPU, where a store takes them. Distances are computed where the
    # proposals are.
    device_keys = keys
    keys, values = move_together((keys, values), CPU)
    if not (torch.isfinite(keys).all() and torch.isfinite(values).all()):
        raise ValueError("keys and values of a memory must be finite")
    if not len(keys):
        return InsertResult(StepChanges(), np.empty(0, np.int64), np.empty(0, np.int64))
    matches = rows.search(device_keys, 1)
    nearest_distances = matches.distances[:, 0].cpu().double().sqrt()
    nearest_ids = rows.ids_at(matches.indices[:, 0]) if rows.allocated_rows else None
    leaders, leader_distances = _group_candidates(device_keys, nearest_distances, policy)
    merges: dict[int, list[int]] = {}  # row id -> candidates merged into it
    new_groups: dict[int, list[int]] = {}  # leading candidate -> candidates merged into it
    for candidate, distance in enumerate(nearest_distances.tolist()):
        if distance <= policy.min_distance:
            continue
        if distance <= policy.merge_distance:
            assert nearest_ids is not None, "a row is near"
            row_id = int(nearest_ids[candidate])
            if not rows.stats.pinned[rows.index_by_id[row_id]]:
                merges.setdefault(row_id, []).append(candidate)
        elif leaders[candidate] == candidate:
            new_groups[candidate] = [candidate]
        elif leader_distances[candidate] > policy.min_distance:
            new_groups[leaders[candidate]].append(candidate)
    inserts, removals = [], []
    if merges:
        merged = _merge_into_rows(
            rows, merges, keys, values, tags, step, now, policy.decay, allocate_ids
        )
        inserts.append(merged)
        removals.append((np.array(list(merges), np.int64), "merged"))
        rows.delete_rows(merges)
        rows.insert_rows(merged, step)
    free_rows = policy.capacity - len(rows)
    if len(new_groups) > free_rows:
        evicted_ids = _select_evictions(rows, len(new_groups) - free_rows, step, policy.decay)
        rows.delete_rows(evicted_ids)
        removals.append((evicted_ids, "evicted"))
        overflow = len(new_groups) - (policy.capacity - len(rows))
        new_groups = dict(list(new_groups.items())[max(0, overflow) :])
    unmerged_ids = unmerged_candidates = np.empty(0, np.int64)
    if new_groups:
        inserts.append(_build_new_rows(new_groups, keys, values, tags, now, allocate_ids))
        rows.insert_rows(inserts[-1], step)
        is_single = np.array([len(members) == 1 for members in new_groups.values()])
        unmerged_ids = inserts[-1].ids[is_single]
        unmerged_candidates = np.array(list(new_groups), np.int64)[is_single]
    changes = StepChanges(inserts, [removal for removal in removals if len(removal[0])])
    return InsertResult(changes, unmerged_ids, unmerged_candidates)


def _group_candidates(
    keys: Tensor, nearest_distances: Tensor, policy: InsertPolicy
) -> tuple[list[int], list[float]]:
    """Group the candidates that no stored row is near to.

    Args:
        keys: `(n, key width)`, on any device.
        nearest_distances: of each candidate to a stored row, `(n,)` on the CPU.
        policy: distances.

    Returns:
        For each candidate the first one that represents it (itself where a row is near), and the
        distance to that.
    """
    radius = max(policy.min_distance, policy.merge_distance)
    leaders, leader_distances = list(range(len(keys))), [0.0] * len(keys)
    unmatched = (nearest_distances > radius).nonzero().flatten()
    keys = keys.cpu() if keys.device.type == "mps" else keys  # which has no float64
    unmatched_keys = keys if len(unmatched) == len(keys) else keys[unmatched.to(keys.device)]
    unmatched_keys, candidates = unmatched_keys.double(), unmatched.tolist()
    assigned = np.zeros(len(candidates), bool)
    chunk_size = max(1, MAX_SCORES // max(1, len(candidates)))
    for start in range(0, len(candidates), chunk_size):
        distances = (
            torch.cdist(unmatched_keys[start : start + chunk_size], unmatched_keys).cpu().numpy()
        )
        for leader, leader_row in enumerate(distances, start):
            if assigned[leader]:
                continue
            for member in ((leader_row <= radius) & ~assigned).nonzero()[0]:
                assigned[member] = True
                leaders[candidates[member]] = candidates[leader]
                leader_distances[candidates[member]] = float(leader_row[member])
    return leaders, leader_distances


def _select_evictions(rows: RowTable, count: int, step: int, decay: float) -> IntArray:
    """Return the ids of the `count` rows with the lowest score that are not pinned."""
    stats = rows.stats
    evictable = ((rows.ids >= 0).cpu().numpy() & ~stats.pinned).nonzero()[0]
    # Of equal scores the lowest id, the oldest row, is evicted first.
    evictable = evictable[np.argsort(rows.ids_at(evictable), kind="stable")]
    order = eviction_order(stats.score[evictable], stats.score_step[evictable], step, decay, count)
    return rows.ids_at(evictable[order])


def _build_new_rows(
    new_groups: dict[int, list[int]],
    keys: Tensor,
    values: Tensor,
    tags: Sequence[str],
    now: float,
    allocate_ids: Callable[[int], IntArray],
) -> RowInsert:
    groups = [(row, members) for row, members in enumerate(new_groups.values()) if members[1:]]
    means = []
    for states in (keys, values):
        means.append(states[list(new_groups)])  # of most groups, which have one member
        for row, members in groups:
            means[-1][row] = states[members].mean(0)
    entries = np.array([len(members) for members in new_groups.values()], np.int64)
    return RowInsert(
        allocate_ids(len(new_groups)),
        _to_numpy(means[0]),
        _to_numpy(means[1]),
        entries.astype(np.float32),
        [join_tags(tags[member] for member in members) for members in new_groups.values()],
        entries,
        [now] * len(new_groups),
    )


def _merge_into_rows(
    rows: RowTable,
    merges: dict[int, list[int]],
    keys: Tensor,
    values: Tensor,
    tags: Sequence[str],
    step: int,
    now: float,
    decay: float,
    allocate_ids: Callable[[int], IntArray],
) -> RowInsert:
    indices = np.array([rows.index_by_id[row_id] for row_id in merges])
    stats = rows.stats
    added_counts = np.array([len(members) for members in merges.values()], np.int64)
    entries = stats.entries[indices] + added_counts
    candidates = [candidate for members in merges.values() for candidate in members]
    group_indices = torch.from_numpy(np.arange(len(merges)).repeat(added_counts))
    old_counts, new_counts = (
        torch.from_numpy(counts).unsqueeze(-1) for counts in (stats.entries[indices], entries)
    )
    means = []
    row_indices = torch.as_tensor(indices, device=rows.keys.device)
    stored_rows = move_together((rows.keys[row_indices], rows.values[row_indices]), CPU)
    for stored, candidate_states in zip(stored_rows, (keys, values), strict=True):
        sums = candidate_states.new_zeros(
            len(merges), candidate_states.shape[1], dtype=torch.double
        )
        sums.index_add_(0, group_indices, candidate_states[candidates].double())
        means.append((stored.double() * old_counts + sums) / new_counts)
    joined_tags = [
        join_tags([stats.tags[index], *(tags[member] for member in members)])
        for index, members in zip(indices, merges.values(), strict=True)
    ]
    scores = (
        decayed_score(stats.score[indices], stats.score_step[indices], step, decay) + added_counts
    )
    return RowInsert(
        allocate_ids(len(merges)),
        _to_numpy(means[0]),
        _to_numpy(means[1]),
        scores.astype(np.float32),
        joined_tags,
        entries,
        [float(stats.created[index]) for index in indices],
    )


def join_tags(tags: Iterable[str]) -> str:
    """Join the tags of merged rows: one line for each different one, in order."""
    lines = [line for tag in tags for line in tag.split("\n") if line]
    return "\n".join(dict.fromkeys(lines))


def _to_numpy(states: Tensor) -> FloatArray:
    return states.float().numpy()
