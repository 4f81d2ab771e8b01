"""Which proposed rows enter a bounded memory, as what, and which rows are evicted for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmt.memory.knn_search import MAX_SCORES
from dmt.memory.row_table import RowTable, decayed_score, eviction_order
from dmt.ops import CopyTask
from dmt.store.records import FloatArray, IntArray, RowInsert, StepChanges

CPU = torch.device("cpu")
# How near two proposed rows are to each other.
FAR, NEAR, DUPLICATE = 0, 1, 2


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
        unmerged_ids: ids of the inserted rows that are one proposal unchanged, `(n,)`, on the
            device of the rows.
        unmerged_candidates: index of the proposal of each, `(n,)`, on the same device.
    """

    changes: StepChanges
    unmerged_ids: Tensor
    unmerged_candidates: Tensor


@dataclass(frozen=True)
class Comparison:
    """Proposed rows compared with the stored ones and with each other.

    Attributes:
        is_finite: `()`, whether all numbers of the proposals are.
        distances: `(n,)`, squared distance to the nearest stored row.
        indices: `(n,)`, position of that row.
        nearness: `(n, n)`, of each two proposals `FAR`, `NEAR` or `DUPLICATE`; `(0, 0)` where it is
            computed later, for the proposals alone that no stored row is near to.
    """

    is_finite: Tensor
    distances: Tensor
    indices: Tensor
    nearness: Tensor


@torch.no_grad()
def compare_proposals(
    rows: RowTable, keys: Tensor, values: Tensor, policy: InsertPolicy
) -> list[Tensor]:
    """Return the fields of a `Comparison`, on the device of the proposals."""
    is_finite = torch.isfinite(keys).all() & torch.isfinite(values).all()
    nearness = torch.zeros(0, 0, dtype=torch.uint8, device=keys.device)
    if not len(keys):
        return [is_finite, keys.new_zeros(0), rows.ids.new_zeros(0), nearness]
    matches = rows.search(keys, 1)
    # Which proposals no stored row is near to is known on the host alone. There is no float64 on
    # MPS.
    if keys.device.type not in ("cpu", "mps") and len(keys) ** 2 <= MAX_SCORES:
        nearness = _classify_distances(keys.double(), keys.double(), policy)
    return [is_finite, matches.distances[:, 0], matches.indices[:, 0], nearness]


@torch.no_grad()
def apply_insert_policy(
    rows: RowTable,
    keys: Tensor,
    values: Tensor,
    comparison: Comparison,
    tags: Sequence[str],
    policy: InsertPolicy,
    step: int,
    now: float,
    allocate_ids: Callable[[int], IntArray],
) -> CopyTask[InsertResult]:
    """Insert those of the proposed rows that are new.

    In the order proposed: a row within `min_distance` of an existing one is dropped, one within
    `merge_distance` merged into it (the mean weighted by entries, tags joined, the oldest creation
    time, a new id; a pinned row stays unchanged), the others are inserted; of rows proposed
    together the first represents those near it. Above `capacity` the rows with the lowest score
    that are not pinned are evicted; where only pinned rows remain, the earliest proposals are
    dropped.

    New rows are put together on the CPU, where a store takes them.

    Args:
        rows: changed in place.
        keys: `(n, key width)`.
        values: `(n, value width)`.
        comparison: what `compare_proposals` returned, on the CPU.
        tags: n of them.
        policy: distances and capacity.
        step: number of the current step.
        now: seconds since 1970.
        allocate_ids: returns so many new ids.

    Raises:
        ValueError: a number is not finite; nothing has changed.
    """
    if not comparison.is_finite:
        raise ValueError("keys and values of a memory must be finite")
    device = rows.ids.device
    if not len(keys):
        return InsertResult(StepChanges(), rows.ids.new_zeros(0), rows.ids.new_zeros(0))
    merges, new_groups = _sort_proposals(rows, keys, comparison, policy)
    proposals = [
        proposal for group in (*merges.values(), *new_groups.values()) for proposal in group
    ]
    positions = [rows.index_by_id[row_id] for row_id in merges]
    proposed, stored = yield [_to_indices(proposals), _to_indices(positions)], device
    states = yield [keys[proposed], values[proposed], rows.keys[stored], rows.values[stored]], CPU
    num_merged = sum(map(len, merges.values()))
    merged_states = [part[:num_merged] for part in states[:2]]
    new_states = [part[num_merged:] for part in states[:2]]
    inserts, removals, row_changes = [], [], []
    if merges:
        merged = _merge_into_rows(
            rows, merges, merged_states, states[2:], tags, step, now, policy.decay, allocate_ids
        )
        inserts.append(merged)
        removals.append((np.array(list(merges), np.int64), "merged"))
        row_changes += [rows.plan_removal(merges), rows.plan_insertion(merged, step)]
    free_rows = policy.capacity - len(rows)
    if len(new_groups) > free_rows:
        evicted_ids = _select_evictions(rows, len(new_groups) - free_rows, step, policy.decay)
        row_changes.append(rows.plan_removal(evicted_ids))
        removals.append((evicted_ids, "evicted"))
        overflow = max(0, len(new_groups) - (policy.capacity - len(rows)))
        groups = list(new_groups.items())
        num_dropped = sum(len(group) for _, group in groups[:overflow])
        new_groups = dict(groups[overflow:])
        new_states = [part[num_dropped:] for part in new_states]
    unmerged_ids = unmerged_candidates = np.empty(0, np.int64)
    if new_groups:
        inserts.append(_build_new_rows(new_groups, new_states, tags, now, allocate_ids))
        row_changes.append(rows.plan_insertion(inserts[-1], step))
        is_single = np.array([len(group) == 1 for group in new_groups.values()])
        unmerged_ids = inserts[-1].ids[is_single]
        unmerged_candidates = np.array(list(new_groups), np.int64)[is_single]
    unmerged = [torch.from_numpy(unmerged_ids), torch.from_numpy(unmerged_candidates)]
    *moved, ids, candidates = yield (
        [*(tensor for change in row_changes for tensor in change), *unmerged],
        device,
    )
    tensors = iter(moved)
    for change in row_changes:
        rows.write_change([next(tensors) for _ in change])
    changes = StepChanges(inserts, [removal for removal in removals if len(removal[0])])
    return InsertResult(changes, ids, candidates)


def _sort_proposals(
    rows: RowTable, keys: Tensor, comparison: Comparison, policy: InsertPolicy
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Return the proposals that are merged into a stored row, and those that become new rows.

    Returns:
        Indices of proposals by the id of the stored row, and by the first proposal of a new row.
    """
    nearest_distances = comparison.distances.double().sqrt()
    nearest_ids = rows.ids_at(comparison.indices) if rows.allocated_rows else None
    leaders, is_duplicate = _group_proposals(keys, comparison.nearness, nearest_distances, policy)
    merges: dict[int, list[int]] = {}
    new_groups: dict[int, list[int]] = {}
    for proposal, distance in enumerate(nearest_distances.tolist()):
        if distance <= policy.min_distance:
            continue
        if distance <= policy.merge_distance:
            assert nearest_ids is not None, "a row is near"
            row_id = int(nearest_ids[proposal])
            if not rows.stats.pinned[rows.index_by_id[row_id]]:
                merges.setdefault(row_id, []).append(proposal)
        elif leaders[proposal] == proposal:
            new_groups[proposal] = [proposal]
        elif not is_duplicate[proposal]:
            new_groups[leaders[proposal]].append(proposal)
    return merges, new_groups


def _group_proposals(
    keys: Tensor, nearness: Tensor, nearest_distances: Tensor, policy: InsertPolicy
) -> tuple[list[int], list[bool]]:
    """Group the proposals that no stored row is near to.

    Args:
        keys: `(n, key width)`, on any device.
        nearness: of a `Comparison`.
        nearest_distances: of each proposal to a stored row, `(n,)` on the CPU.
        policy: distances.

    Returns:
        For each proposal the first one that represents it (itself where a row is near), and
        whether it is a duplicate of that.
    """
    leaders, is_duplicate = list(range(len(keys))), [False] * len(keys)
    radius = max(policy.min_distance, policy.merge_distance)
    unmatched = (nearest_distances > radius).nonzero().flatten()
    candidates = unmatched.tolist()
    assigned = np.zeros(len(candidates), bool)
    for leader, row in enumerate(_iterate_nearness(keys, nearness, unmatched, policy)):
        if assigned[leader]:
            continue
        for member in ((row != FAR) & ~assigned).nonzero()[0]:
            assigned[member] = True
            leaders[candidates[member]] = candidates[leader]
            is_duplicate[candidates[member]] = row[member] == DUPLICATE
    return leaders, is_duplicate


def _iterate_nearness(
    keys: Tensor, nearness: Tensor, selected: Tensor, policy: InsertPolicy
) -> Iterator[NDArray[np.uint8]]:
    """Yield of each selected proposal how near the selected ones are to it, `(selected,)`."""
    if len(nearness):
        yield from nearness[selected][:, selected].numpy()
        return
    keys = keys.cpu() if keys.device.type == "mps" else keys
    keys = keys if len(selected) == len(keys) else keys[selected.to(keys.device)]
    keys = keys.double()
    for chunk in keys.split(max(1, MAX_SCORES // max(1, len(keys)))):
        yield from _classify_distances(chunk, keys, policy).cpu().numpy()


def _classify_distances(keys: Tensor, others: Tensor, policy: InsertPolicy) -> Tensor:
    """Return how near each of `others` `(m, width)` is to each of `keys` `(n, width)`, `(n, m)`."""
    distances = torch.cdist(keys, others)
    is_near = distances <= max(policy.min_distance, policy.merge_distance)
    return is_near.byte() + (distances <= policy.min_distance).byte()


def _select_evictions(rows: RowTable, count: int, step: int, decay: float) -> IntArray:
    """Return the ids of the `count` rows with the lowest score that are not pinned."""
    stats = rows.stats
    evictable = ((rows.host_ids >= 0) & ~stats.pinned).nonzero()[0]
    # Of equal scores the lowest id, the oldest row, is evicted first.
    evictable = evictable[np.argsort(rows.ids_at(evictable), kind="stable")]
    order = eviction_order(stats.score[evictable], stats.score_step[evictable], step, decay, count)
    return rows.ids_at(evictable[order])


def _build_new_rows(
    new_groups: dict[int, list[int]],
    proposed_states: Sequence[Tensor],
    tags: Sequence[str],
    now: float,
    allocate_ids: Callable[[int], IntArray],
) -> RowInsert:
    """Make a row of each group of proposals, from their keys and values in the same order."""
    sizes = [len(members) for members in new_groups.values()]
    starts = np.cumsum([0, *sizes[:-1]])
    means = []
    for states in proposed_states:
        means.append(states[starts])  # of most groups, which have one member
        for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            if size > 1:
                means[-1][row] = states[start : start + size].mean(0)
    entries = np.array(sizes, np.int64)
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
    proposed_states: Sequence[Tensor],
    stored_states: Sequence[Tensor],
    tags: Sequence[str],
    step: int,
    now: float,
    decay: float,
    allocate_ids: Callable[[int], IntArray],
) -> RowInsert:
    """Merge proposals into stored rows, from their keys and values, both in the order of `merges`.

    The rows are not changed.
    """
    indices = np.array([rows.index_by_id[row_id] for row_id in merges])
    stats = rows.stats
    added_counts = np.array([len(members) for members in merges.values()], np.int64)
    entries = stats.entries[indices] + added_counts
    group_indices = torch.from_numpy(np.arange(len(merges)).repeat(added_counts))
    old_counts, new_counts = (
        torch.from_numpy(counts).unsqueeze(-1) for counts in (stats.entries[indices], entries)
    )
    means = []
    for stored, proposed in zip(stored_states, proposed_states, strict=True):
        sums = proposed.new_zeros(len(merges), proposed.shape[1], dtype=torch.double)
        sums.index_add_(0, group_indices, proposed.double())
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


def _to_indices(indices: Sequence[int]) -> Tensor:
    return torch.tensor(indices, dtype=torch.long)


def _to_numpy(states: Tensor) -> FloatArray:
    return states.float().numpy()
