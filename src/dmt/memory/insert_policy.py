"""Which of the rows offered to a bounded memory come in, as what, and who leaves for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmt.memory.knn_search import MAX_SCORES
from dmt.memory.row_table import RowTable, decayed_score, eviction_order
from dmt.store.records import FloatArray, IntArray, RowInsert, StepChanges


@dataclass(frozen=True)
class InsertPolicy:
    """How a memory is kept small.

    Attributes:
        novelty: distance up to which an offered row is known already and left out.
        recombine: distance up to which it is merged into the row it is near to; nothing is where it is not over `novelty`.
        capacity: most rows held.
        decay: LRFU's, from 0 (frequency) to 1 (recency); heat halves every `1 / decay` steps.
    """

    min_distance: float
    merge_distance: float
    capacity: int
    decay: float


@dataclass(frozen=True)
class InsertResult:
    """What came of a step's offers.

    Attributes:
        changes: what is to be written down.
        alone: numbers of the rows that are one offer as it was made, `(n,)`.
        offers: which offer each of those was, `(n,)`.
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
    """Let in what is new among `keys` `(n, key width)` and `values` `(n, value width)`; `rows` are changed.

    In the order offered: what is within `novelty` of a row is left out, what is within `recombine` merged into it (the
    mean weighted by entries, tags joined, the oldest creation kept, under a new number; a pinned row stays as it is), the
    rest comes in, and of those offered together the first stands for the ones near it. Over `capacity` the coldest
    that are not pinned leave; where only pinned rows are left, the earliest offered stay out.

    Raises:
        ValueError: a number is not finite; nothing has changed.
    """
    if not (torch.isfinite(keys).all() and torch.isfinite(values).all()):
        raise ValueError("keys and values of a memory must be finite")
    if not len(keys):
        return InsertResult(StepChanges(), np.empty(0, np.int64), np.empty(0, np.int64))
    matches = rows.search(keys, 1)
    nearest_distances, nearest_ids = (
        matches.distances[:, 0].double().sqrt(),
        rows.ids_at(matches.indices[:, 0]) if rows.allocated_rows else None,
    )
    leaders, leader_distances = _group_candidates(keys, nearest_distances, policy)
    merges: dict[int, list[int]] = {}  # row number: offers that join it
    new_groups: dict[int, list[int]] = {}  # offer that leads: offers that join it
    for candidate, distance in enumerate(nearest_distances.tolist()):
        if distance <= policy.min_distance:
            continue
        if distance <= policy.merge_distance:
            assert nearest_ids is not None, "something was near"
            if not rows.stats.pinned[rows.index_by_id[int(nearest_ids[candidate])]]:
                merges.setdefault(int(nearest_ids[candidate]), []).append(candidate)
        elif leaders[candidate] == candidate:
            new_groups[candidate] = [candidate]
        elif leader_distances[candidate] > policy.min_distance:
            new_groups[leaders[candidate]].append(candidate)
    inserts, removals = [], []
    if merges:
        inserts.append(
            _merge_into_rows(
                rows, merges, keys, values, tags, step, now, policy.decay, allocate_ids
            )
        )
        removals.append((np.array(list(merges), np.int64), "merged"))
        rows.delete_rows(merges)
        rows.insert_rows(inserts[-1], step)
    free_rows = policy.capacity - len(rows)
    if len(new_groups) > free_rows:
        evicted_ids = _select_evictions(rows, len(new_groups) - free_rows, step, policy.decay)
        rows.delete_rows(evicted_ids)
        removals.append((evicted_ids, "evicted"))
        overflow = len(new_groups) - (policy.capacity - len(rows))
        new_groups = dict(list(new_groups.items())[max(0, overflow) :])
    if new_groups:
        inserts.append(_build_new_rows(new_groups, keys, values, tags, now, allocate_ids))
        rows.insert_rows(inserts[-1], step)
    single_positions = [
        position for position, members in enumerate(new_groups.values()) if len(members) == 1
    ]
    unmerged_ids = inserts[-1].ids[single_positions] if new_groups else np.empty(0, np.int64)
    unmerged_candidates = (
        np.array(list(new_groups), np.int64)[single_positions]
        if new_groups
        else np.empty(0, np.int64)
    )
    return InsertResult(
        StepChanges(inserts, [removal for removal in removals if len(removal[0])]),
        unmerged_ids,
        unmerged_candidates,
    )


def _group_candidates(
    keys: Tensor, nearest_distances: Tensor, policy: InsertPolicy
) -> tuple[list[int], list[float]]:
    """For each offer that no stored row is near to, the first such offer that stands for it, and how far that is."""
    radius = max(policy.min_distance, policy.merge_distance)
    leaders, leader_distances = list(range(len(keys))), [0.0] * len(keys)
    unmatched = (nearest_distances > radius).nonzero().flatten()
    unmatched_keys, candidates = keys[unmatched].double(), unmatched.tolist()
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
                leaders[candidates[member]], leader_distances[candidates[member]] = (
                    candidates[leader],
                    float(leader_row[member]),
                )
    return leaders, leader_distances


def _select_evictions(rows: RowTable, count: int, step: int, decay: float) -> IntArray:
    """Numbers of the `count` coldest rows that are not pinned, or of as many as there are."""
    stats = rows.stats
    evictable = ((rows.ids >= 0).cpu().numpy() & ~stats.pinned).nonzero()[0]
    evictable = evictable[
        np.argsort(rows.ids_at(evictable), kind="stable")
    ]  # of equally cold ones the oldest leaves
    return rows.ids_at(
        evictable[
            eviction_order(stats.score[evictable], stats.score_step[evictable], step, decay, count)
        ]
    )


def _build_new_rows(
    new_groups: dict[int, list[int]],
    keys: Tensor,
    values: Tensor,
    tags: Sequence[str],
    now: float,
    allocate_ids: Callable[[int], IntArray],
) -> RowInsert:
    mean_keys, mean_values = (
        torch.stack([states[members].mean(0) for members in new_groups.values()])
        for states in (keys, values)
    )
    entries = np.array([len(members) for members in new_groups.values()], np.int64)
    joined_tags = [join_tags(tags[member] for member in members) for members in new_groups.values()]
    created = [now] * len(new_groups)
    scores = entries.astype(np.float32)
    return RowInsert(
        allocate_ids(len(new_groups)),
        _to_numpy(mean_keys),
        _to_numpy(mean_values),
        scores,
        joined_tags,
        entries,
        created,
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
    indices = np.array([rows.index_by_id[number] for number in merges])
    stats = rows.stats
    added_counts = np.array([len(members) for members in merges.values()], np.int64)
    entries = stats.entries[indices] + added_counts
    merged_means = []
    candidates = torch.tensor(
        [offer for members in merges.values() for offer in members], device=keys.device
    )
    group_indices = (
        torch.arange(len(merges)).repeat_interleave(torch.as_tensor(added_counts)).to(keys.device)
    )
    for stored, candidate_states in ((rows.keys, keys), (rows.values, values)):
        sums = candidate_states.new_zeros(
            len(merges), candidate_states.shape[1], dtype=torch.double
        )
        sums.index_add_(0, group_indices, candidate_states[candidates].double())
        old_counts, new_counts = (
            torch.as_tensor(number, device=keys.device).unsqueeze(-1)
            for number in (stats.entries[indices], entries)
        )
        merged_means.append(
            (stored[torch.as_tensor(indices)].double() * old_counts + sums) / new_counts
        )
    joined_tags = [
        join_tags([stats.tags[index], *(tags[member] for member in members)])
        for index, members in zip(indices, merges.values(), strict=True)
    ]
    scores = (
        decayed_score(stats.score[indices], stats.score_step[indices], step, decay) + added_counts
    )
    created = [float(stats.created[index]) for index in indices]
    new_ids = allocate_ids(len(merges))
    return RowInsert(
        new_ids,
        _to_numpy(merged_means[0]),
        _to_numpy(merged_means[1]),
        scores.astype(np.float32),
        joined_tags,
        entries,
        created,
    )


def join_tags(tags: Iterable[str]) -> str:
    """One tag for a row that several tags led to: each once, a line each, in the order they came."""
    lines = [line for tag in tags for line in tag.split("\n") if line]
    return "\n".join(dict.fromkeys(lines))


def _to_numpy(states: Tensor) -> FloatArray:
    return states.float().cpu().numpy()
