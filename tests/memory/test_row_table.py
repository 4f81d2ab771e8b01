"""The table of rows: exact search, bounds, and the key and value of each id."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dmt.memory.associative import straight_through_rows
from dmt.memory.insert_policy import (
    Comparison,
    InsertPolicy,
    apply_insert_policy,
    compare_proposals,
    join_tags,
)
from dmt.memory.knn_search import (
    BLOCK_SIZE,
    FAISS_KINDS,
    MAX_PLAIN_TOPK,
    bf16_knn,
    blocked_topk,
    exact_knn,
)
from dmt.memory.row_table import (
    GROWTH_STEP,
    STORED_STATS,
    RowTable,
    decayed_score,
    eviction_order,
)
from dmt.ops import run_copy_tasks
from dmt.store.records import RowBatch, RowInsert

WIDE = InsertPolicy(min_distance=0.0, merge_distance=0.0, capacity=100, decay=0.1)


def make_id_allocator():
    ids = iter(range(1, 10_000))
    return lambda count: np.array([next(ids) for _ in range(count)], np.int64)


def keys_on_line(*positions):
    """Return keys on a line, so that distances are differences of positions."""
    return torch.tensor(positions, dtype=torch.float32).unsqueeze(-1).repeat(1, 2) / 2**0.5


def insert_proposals(rows, keys, values, tags, policy, *arguments):
    comparison = Comparison(*compare_proposals(rows, keys, values, policy))
    task = apply_insert_policy(rows, keys, values, comparison, tags, policy, *arguments)
    return run_copy_tasks([task])[0]


def insert(rows, positions, policy=WIDE, step=1, allocate_ids=None, tags=None):
    values = torch.tensor(positions, dtype=torch.float32).unsqueeze(-1) * 10
    return insert_proposals(
        rows,
        keys_on_line(*positions),
        values,
        tags or [""] * len(positions),
        policy,
        step,
        5.0,
        allocate_ids,
    ).changes


def stored_positions(rows):
    return sorted(
        round(float(rows.keys[index, 0]) * 2**0.5, 3) for index in rows.index_by_id.values()
    )


@pytest.mark.parametrize(
    "columns", [7, MAX_PLAIN_TOPK, MAX_PLAIN_TOPK + BLOCK_SIZE, MAX_PLAIN_TOPK + BLOCK_SIZE + 5]
)
def test_blocked_topk_equals_topk(columns):
    scores = torch.randn(6, columns)
    scores[0, -1] = 9.0  # in the columns after the last block
    values, indices = blocked_topk(scores, 5)
    expected = scores.topk(5)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("key_chunk", [1, 6, 10, 20, 99])
def test_exact_search_equals_the_definition_and_skips_empty_rows(key_chunk, monkeypatch):
    monkeypatch.setattr("dmt.memory.knn_search.MAX_SCORES", 100)  # several chunks
    monkeypatch.setattr("dmt.memory.knn_search.KEY_CHUNK", key_chunk)
    queries, keys = torch.randn(30, 4), torch.randn(20, 4)
    key_offsets = -keys.square().sum(-1) / 2
    key_offsets[3] = -torch.inf
    distances, rows = exact_knn(queries, keys, key_offsets, 20)
    expected = torch.cdist(queries, keys).square()
    expected[:, 3] = torch.inf
    assert (rows[:, -1] == 3).all()
    assert distances[:, -1].isinf().all()
    torch.testing.assert_close(distances, expected.sort(-1).values)
    torch.testing.assert_close(expected.gather(1, rows), distances)


def test_bf16_search_finds_the_same_rows_at_exact_distances(monkeypatch):
    monkeypatch.setattr("dmt.memory.knn_search.MAX_SCORES", 4_000)  # several chunks
    monkeypatch.setattr("dmt.memory.knn_search.KEY_CHUNK", 300)
    # All distances are similar: bfloat16 alone would select wrong rows.
    center = torch.randn(32)
    queries, keys = (
        torch.nn.functional.normalize(center + 0.5 * torch.randn(n, 32), dim=-1) for n in (60, 700)
    )
    key_offsets = -keys.square().sum(-1) / 2
    key_offsets[3] = -torch.inf
    distances, rows = bf16_knn(queries, keys, keys.bfloat16(), key_offsets, 8)
    exact_distances, exact_rows = exact_knn(queries, keys, key_offsets, 8)
    torch.testing.assert_close(distances, (queries.unsqueeze(1) - keys[rows]).square().sum(-1))
    assert not (rows == 3).any()
    assert float((rows.unsqueeze(-1) == exact_rows.unsqueeze(-2)).any(-1).float().mean()) > 0.999
    assert (distances >= exact_distances - 1e-5).all()
    few, _ = bf16_knn(queries[:2], keys[:4], keys[:4].bfloat16(), key_offsets[:4], 4)
    assert few.isinf().tolist() == [[False, False, False, True]] * 2
    assert bf16_knn(queries[:0], keys, keys.bfloat16(), key_offsets, 8)[1].shape == (0, 8)


def test_straight_through_gradients_reach_queries_and_inserted_rows():
    queries, recent_keys, recent_values = (
        torch.zeros(*shape, requires_grad=True) for shape in ((2, 3), (4, 3), (4, 5))
    )
    keys, values = torch.randn(2, 3, 3), torch.randn(2, 3, 5)
    origins = torch.tensor([[2, -1, 0], [-1, 2, -1]])
    returned_keys, returned_values = straight_through_rows(
        queries, recent_keys, recent_values, keys, values, origins
    )
    assert torch.equal(returned_keys, keys)
    assert torch.equal(returned_values, values)
    key_grads, value_grads = torch.randn_like(keys), torch.randn_like(values)
    ((returned_keys * key_grads).sum() + (returned_values * value_grads).sum()).backward()
    torch.testing.assert_close(queries.grad, key_grads.sum(1))
    zero = torch.zeros(3)
    torch.testing.assert_close(
        recent_keys.grad,
        torch.stack([key_grads[0, 2], zero, key_grads[0, 0] + key_grads[1, 1], zero]),
    )
    torch.testing.assert_close(recent_values.grad[2], value_grads[0, 0] + value_grads[1, 1])
    assert not recent_values.grad[[1, 3]].any()


@pytest.mark.parametrize(("decay", "evicted"), [(0.0, 1), (1.0, 0)])
def test_lrfu_lies_between_frequency_and_recency(decay, evicted):
    """Row 0 has three early uses, row 1 one recent use."""
    scores, score_steps = np.array([3.0, 1.0]), np.array([1, 50])
    assert eviction_order(scores, score_steps, 60, decay, 1).tolist() == [evicted]


def test_scores_are_sums_of_decayed_uses_without_underflow():
    score = decayed_score(
        decayed_score(np.ones(1), np.array([3]), 7, 0.5) + 1, np.array([7]), 9, 0.5
    )
    np.testing.assert_allclose(score, 2 ** (-0.5 * 6) + 2 ** (-0.5 * 2))
    assert eviction_order(np.array([1.0, 1.0]), np.array([1_000, 0]), 100_000, 1.0, 1).tolist() == [
        1
    ]


def test_each_read_raises_the_score():
    rows, allocate_ids = RowTable(2, 1), make_id_allocator()
    insert(rows, [1, 2], allocate_ids=allocate_ids)
    rows.record_reads(np.array([0, 0, 1]), np.array([0.5, 0.25, 1.0]), step=3, now=8.0, decay=1.0)
    usage = rows.pop_usage()
    assert usage.ids.tolist() == [1, 2]
    assert usage.reads.tolist() == [2, 1]
    assert usage.last_read.tolist() == [8.0, 8.0]
    np.testing.assert_allclose(usage.scores, [0.25 + 0.75, 0.25 + 1.0])
    assert rows.pop_usage() is None


def test_rows_are_dropped_merged_or_inserted_by_distance():
    rows, allocate_ids = RowTable(2, 1), make_id_allocator()
    policy = InsertPolicy(min_distance=0.1, merge_distance=0.5, capacity=10, decay=0.1)
    insert(rows, [0.0, 4.0], policy, allocate_ids=allocate_ids, tags=["a", "b"])
    changes = insert(
        rows, [0.05, 0.4, 9.0], policy, step=2, allocate_ids=allocate_ids, tags=["x", "c", "d"]
    )
    assert stored_positions(rows) == [0.2, 4.0, 9.0]  # the mean of 0 and 0.4, one entry each
    assert [(ids.tolist(), reason) for ids, reason in changes.removals] == [([1], "merged")]
    merged, inserted = changes.inserts
    assert merged.entries.tolist() == [2]
    assert list(merged.tag) == ["a\nc"]
    assert merged.values.tolist() == [[2.0]]
    assert list(inserted.tag) == ["d"]
    insert(rows, [0.5], policy, step=3, allocate_ids=allocate_ids)
    # Weighted by entries.
    np.testing.assert_allclose(stored_positions(rows)[0], (2 * 0.2 + 0.5) / 3, atol=1e-3)
    # Three are merged into one row and one into another.
    insert(rows, [4.2, 8.8, 4.4, 4.3], policy, step=4, allocate_ids=allocate_ids)
    np.testing.assert_allclose(
        stored_positions(rows)[1:], [(4 + 4.2 + 4.4 + 4.3) / 4, 8.9], atol=1e-3
    )


def test_a_row_at_the_minimum_distance_is_a_duplicate():
    for distance, position in ((0.0, 4.0), (2.0, 2.0)):
        rows, allocate_ids = RowTable(2, 1), make_id_allocator()
        policy = InsertPolicy(
            min_distance=distance, merge_distance=distance, capacity=10, decay=0.1
        )
        insert_proposals(
            rows, torch.tensor([[4.0, 0.0]]), torch.ones(1, 1), [""], policy, 1, 5.0, allocate_ids
        )
        second = insert_proposals(
            rows,
            torch.tensor([[position, 0.0]]),
            torch.ones(1, 1),
            [""],
            policy,
            2,
            5.0,
            allocate_ids,
        )
        assert not second.changes.inserts
        assert len(rows) == 1


def test_a_merged_row_has_the_oldest_creation_time_and_the_sum_of_scores():
    rows, allocate_ids = RowTable(2, 1), make_id_allocator()
    policy = InsertPolicy(min_distance=0.0, merge_distance=0.5, capacity=10, decay=0.5)
    insert_proposals(
        rows, keys_on_line(0.0), torch.zeros(1, 1), [""], policy, 1, 100.0, allocate_ids
    )
    changes = insert_proposals(
        rows, keys_on_line(0.2), torch.zeros(1, 1), [""], policy, 3, 200.0, allocate_ids
    ).changes
    assert list(changes.inserts[0].created) == [100.0]
    np.testing.assert_allclose(changes.inserts[0].scores, [2 ** (-0.5 * 2) + 1])


def test_rows_near_an_earlier_proposed_row_are_dropped_or_merged_into_it():
    rows, allocate_ids = RowTable(2, 1), make_id_allocator()
    changes = insert(
        rows,
        [1.0, 1.05, 1.3, 7.0],
        InsertPolicy(0.1, 0.4, 10, 0.1),
        allocate_ids=allocate_ids,
        tags=["a", "b", "c", "d"],
    )
    assert stored_positions(rows) == [
        1.15,
        7.0,
    ]  # 1.05 is a duplicate of 1.0, 1.3 is merged into it
    assert changes.inserts[0].entries.tolist() == [2, 1]
    assert list(changes.inserts[0].tag) == ["a\nc", "d"]


def test_the_lowest_scores_are_evicted_and_pinned_rows_never():
    rows, allocate_ids = RowTable(2, 1), make_id_allocator()
    small = InsertPolicy(0.0, 0.0, 3, 0.0)
    insert(rows, [1, 2, 3], small, allocate_ids=allocate_ids)
    rows.stats.pinned[rows.index_by_id[1]] = True
    rows.record_reads(np.array([rows.index_by_id[2]]), np.array([5.0]), 2, 0.0, 0.0)
    changes = insert(rows, [4], small, step=3, allocate_ids=allocate_ids)
    assert stored_positions(rows) == [1, 2, 4]
    assert [(ids.tolist(), reason) for ids, reason in changes.removals] == [([3], "evicted")]
    insert(rows, [5, 6, 7, 8], small, step=4, allocate_ids=allocate_ids)
    assert stored_positions(rows) == [1, 7, 8]  # more rows than the capacity: the latest remain
    rows.stats.pinned[:] = True
    assert not insert(rows, [9], small, step=5, allocate_ids=allocate_ids).inserts
    assert stored_positions(rows) == [1, 7, 8]


def test_a_deleted_row_is_not_retrieved():
    rows = RowTable(2, 1)
    insert(rows, [1, 2, 3], allocate_ids=make_id_allocator())
    assert rows.ids_at(rows.search(keys_on_line(2.1), 1).indices[0]).tolist() == [2]
    rows.delete_rows([2])
    assert rows.ids_at(rows.search(keys_on_line(2.1), 1).indices[0]).tolist() == [3]


def test_of_equal_scores_the_oldest_row_is_evicted():
    rows, allocate_ids = RowTable(2, 1), make_id_allocator()
    small = InsertPolicy(0.0, 0.0, 3, 0.0)
    insert(rows, [1, 2, 3], small, allocate_ids=allocate_ids)
    rows.delete_rows([1])
    insert(rows, [4], small, allocate_ids=allocate_ids)  # at the index of row 1
    insert(rows, [5], small, allocate_ids=allocate_ids)
    assert stored_positions(rows) == [3, 4, 5]


def test_a_pinned_row_is_not_merged_into():
    rows, allocate_ids = RowTable(2, 1), make_id_allocator()
    policy = InsertPolicy(0.0, 0.5, 10, 0.1)
    insert(rows, [1.0], policy, allocate_ids=allocate_ids)
    rows.stats.pinned[0] = True
    assert not insert(rows, [1.2], policy, step=2, allocate_ids=allocate_ids).inserts
    assert stored_positions(rows) == [1.0]


def test_non_finite_rows_are_rejected_and_change_nothing():
    rows = RowTable(2, 1)
    with pytest.raises(ValueError, match="finite"):
        insert_proposals(
            rows,
            torch.tensor([[float("nan"), 0.0]]),
            torch.zeros(1, 1),
            [""],
            WIDE,
            1,
            0.0,
            make_id_allocator(),
        )
    assert not len(rows)


def test_missing_neighbors_are_infinitely_far():
    rows = RowTable(2, 1)
    assert rows.search(keys_on_line(1.0), 3).distances.isinf().all()
    insert(rows, [1.0, 2.0], allocate_ids=make_id_allocator())
    matches = rows.search(keys_on_line(1.1), 5)
    assert matches.distances.isinf().tolist() == [[False, False, True, True, True]]


@pytest.mark.parametrize("expected", [0, 5, 40])
def test_rows_are_loaded_from_many_batches_with_or_without_a_hint(expected, monkeypatch):
    monkeypatch.setattr("dmt.memory.row_table.GROWTH_STEP", 4)
    states = torch.randn(23, 3)

    def batches():
        for start in range(0, 23, 5):
            part = states[start : start + 5].numpy()
            offset = np.arange(start, start + len(part))
            columns = {
                "score": offset / 7,
                "score_step": offset,
                "entries": offset + 1,
                "created": offset / 3,
                "pinned": offset % 2 == 0,
                "reads": offset * 2,
            }
            yield RowBatch(
                offset + 100,
                part,
                part[:, :2],
                columns | {"last_read": [None] * len(offset), "tag": [f"t{n}" for n in offset]},
            )

    rows = RowTable(3, 2)
    for _ in range(2):  # the second time into existing memory
        rows.load_rows(batches(), expected_rows=expected)
        assert len(rows) == 23
        for row_id, index in rows.index_by_id.items():
            offset = row_id - 100
            assert torch.equal(rows.keys[index], states[offset])
            assert torch.equal(rows.values[index], states[offset, :2])
            stats = rows.stats
            assert (stats.score[index], stats.entries[index], stats.reads[index]) == (
                offset / 7,
                offset + 1,
                2 * offset,
            )
            assert (stats.tags[index], stats.pinned[index]) == (f"t{offset}", offset % 2 == 0)
        matches = rows.search(states, 1)
        assert torch.equal(rows.ids[matches.indices[:, 0]], torch.arange(23) + 100)


def test_joined_tags_are_unique_and_in_order():
    assert join_tags(["b", "a\nb", "", "c"]) == "b\na\nc"


@pytest.mark.parametrize("kind", [*FAISS_KINDS, "bf16"])
def test_an_index_finds_rows_and_never_deleted_ones(kind, monkeypatch):
    monkeypatch.setattr("dmt.memory.knn_search.IVF_MIN_ROWS", 400)
    rows, allocate_ids = RowTable(4, 1, index=kind), make_id_allocator()
    generator = torch.Generator().manual_seed(0)
    policy, queries = InsertPolicy(0, 0, 900, 1.0), torch.randn(50, 4, generator=generator)
    recalls = []
    for step in range(1, 9):  # fill, train, grow, evict, reuse
        keys = torch.randn(200, 4, generator=generator)
        insert_proposals(rows, keys, keys[:, :1], [""] * 200, policy, step, 0.0, allocate_ids)
        matches, exact = rows.search(queries, 5), rows.search_exact(queries, 5)
        assert (rows.ids[matches.indices[matches.distances.isfinite()]] >= 0).all()
        distances = (queries.unsqueeze(1) - rows.keys[matches.indices]).square().sum(-1)
        torch.testing.assert_close(
            matches.distances, distances.masked_fill(matches.distances.isinf(), torch.inf)
        )
        assert (matches.distances.diff(dim=1) >= 0).all()
        recalls += [
            len(set(a) & set(b)) / 5
            for a, b in zip(matches.indices.tolist(), exact.indices.tolist(), strict=True)
        ]
    assert len(rows) == 900
    assert np.mean(recalls) == 1 if kind == "flat" else np.mean(recalls) > 0.9


def test_an_unknown_index_is_rejected():
    with pytest.raises(ValueError, match="flat, ivf"):
        RowTable(2, 1, index="tree")


class RowTableMachine(RuleBasedStateMachine):
    """Insert, read, delete, pin and reload rows in any order; ids and bounds stay consistent."""

    @initialize(
        index=st.sampled_from(["exact", "bf16", *FAISS_KINDS]),
        capacity=st.integers(1, 23),
        merge_distance=st.sampled_from([0.0, 0.3]),
        min_distance=st.sampled_from([0.0, 0.1]),
        decay=st.floats(0, 1),
    )
    def create(self, index, capacity, merge_distance, min_distance, decay):
        self.rows, self.allocate_ids, self.step, self.index = (
            RowTable(3, 2, index=index),
            make_id_allocator(),
            0,
            index,
        )
        self.policy = InsertPolicy(min_distance, merge_distance, capacity, decay)
        self.expected, self.pinned, self.removed = {}, set(), set()

    @rule(seed=st.integers(0, 10_000), count=st.integers(0, 9), spread=st.sampled_from([0.1, 1.0]))
    def insert(self, seed, count, spread):
        self.step += 1
        generator = torch.Generator().manual_seed(seed)
        keys, values = (torch.randn(count, width, generator=generator) * spread for width in (3, 2))
        changes = insert_proposals(
            self.rows,
            keys,
            values,
            ["t"] * count,
            self.policy,
            self.step,
            float(self.step),
            self.allocate_ids,
        ).changes
        for part in changes.inserts:
            for row_id, key, value in zip(part.ids.tolist(), part.keys, part.values, strict=True):
                assert row_id not in self.expected
                assert row_id not in self.removed
                self.expected[row_id] = key, value
        for ids, _ in changes.removals:
            for row_id in ids.tolist():
                del self.expected[row_id]
                self.removed.add(row_id)

    @rule(seed=st.integers(0, 10_000))
    def read(self, seed):
        self.step += 1
        queries = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        matches = self.rows.search(queries, 4)
        is_match = matches.distances.isfinite()
        assert int(is_match.sum(1).min()) == min(4, len(self.expected))
        for query, ids, distances, valid in zip(
            queries, matches.indices, matches.distances, is_match, strict=True
        ):
            for row_id, distance in zip(
                self.rows.ids_at(ids[valid]).tolist(), distances[valid].tolist(), strict=True
            ):
                np.testing.assert_allclose(
                    ((query.numpy() - self.expected[row_id][0]) ** 2).sum(), distance, atol=1e-4
                )
        indices = matches.indices[is_match].numpy()
        self.rows.record_reads(
            indices, np.ones(len(indices)), self.step, float(self.step), self.policy.decay
        )

    @rule(which=st.integers(0, 100))
    def delete(self, which):
        unpinned = sorted(set(self.expected) - self.pinned)
        if unpinned:
            row_id = unpinned[which % len(unpinned)]
            self.rows.delete_rows([row_id])
            del self.expected[row_id]
            self.removed.add(row_id)

    @rule(which=st.integers(0, 100))
    def pin(self, which):
        if self.expected:
            row_id = sorted(self.expected)[which % len(self.expected)]
            self.rows.stats.pinned[self.rows.index_by_id[row_id]] = True
            self.pinned.add(row_id)

    @rule()
    def reload(self):
        stats, indices = (
            self.rows.stats,
            [self.rows.index_by_id[row_id] for row_id in sorted(self.expected)],
        )
        columns = {
            "score": [float(stats.score[i]) for i in indices],
            "score_step": [int(stats.score_step[i]) for i in indices],
            "tag": [stats.tags[i] for i in indices],
            "entries": [int(stats.entries[i]) for i in indices],
            "created": [float(stats.created[i]) for i in indices],
            "pinned": [bool(stats.pinned[i]) for i in indices],
            "last_read": [None] * len(indices),
            "reads": [int(stats.reads[i]) for i in indices],
        }
        self.rows = RowTable(3, 2, index=self.index)
        rows = [self.expected[row_id] for row_id in sorted(self.expected)]
        keys, values = (
            np.array([row[part] for row in rows], np.float32).reshape(len(indices), (3, 2)[part])
            for part in (0, 1)
        )
        if indices:
            self.rows.load_rows(
                [RowBatch(np.array(sorted(self.expected), np.int64), keys, values, columns)]
            )

    @invariant()
    def every_id_has_its_own_key_and_value(self):
        if not hasattr(self, "rows"):
            return
        assert set(self.rows.index_by_id) == set(self.expected)
        assert len(self.expected) <= self.policy.capacity
        assert self.pinned <= set(self.expected)
        for row_id, index in self.rows.index_by_id.items():
            assert int(self.rows.ids[index]) == row_id
            np.testing.assert_array_equal(self.rows.keys[index].numpy(), self.expected[row_id][0])
            np.testing.assert_array_equal(self.rows.values[index].numpy(), self.expected[row_id][1])


TestRowTableMachine = RowTableMachine.TestCase
TestRowTableMachine.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_table_grows_without_moving_rows():
    rows, allocate_ids = RowTable(2, 1), make_id_allocator()
    insert(rows, range(10), InsertPolicy(0, 0, 10**6, 0), allocate_ids=allocate_ids)
    before = dict(rows.index_by_id)
    batch = RowInsert(
        allocate_ids(GROWTH_STEP * 2),
        np.ones((GROWTH_STEP * 2, 2)),
        np.zeros((GROWTH_STEP * 2, 1)),
        np.ones(GROWTH_STEP * 2, np.float32),
    )
    rows.insert_rows(batch, step=2)
    assert {row_id: rows.index_by_id[row_id] for row_id in before} == before
    assert len(rows) == 10 + GROWTH_STEP * 2
    assert rows.stats.tags == [""] * rows.allocated_rows


def test_the_host_knows_the_ids_of_the_table():
    rows, allocate_ids = RowTable(2, 1, allocated_rows=3), make_id_allocator()
    insert(rows, range(5), allocate_ids=allocate_ids)  # more than are allocated
    rows.delete_rows([2, 4])
    insert(rows, [7.0], allocate_ids=allocate_ids)
    assert sorted(rows.host_ids[rows.host_ids >= 0]) == [1, 3, 5, 6]
    assert rows.host_ids.tolist() == rows.ids.tolist()
    columns = {name: [0] for name in STORED_STATS} | {"last_read": [None], "tag": [""]}
    batches = [RowBatch(np.array([9]), np.ones((1, 2)), np.ones((1, 1)), columns)]
    for layout in (None, np.array([-1, 9])):
        rows.load_rows(batches, layout)
        assert rows.index_by_id == {9: 0 if layout is None else 1}
        assert rows.host_ids.tolist() == rows.ids.tolist()
    assert rows.ids_at(torch.tensor([1])).tolist() == [9]
    rows.reset()
    assert set(rows.host_ids) == {-1}
