"""Rows in memory: found exactly, bounded, each number its own key and value whatever happened; gradients straight through."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from dmt.memory.associative import straight_through_rows
from dmt.memory.insert_policy import InsertPolicy, apply_insert_policy, join_tags
from dmt.memory.knn_search import (
    BLOCK_SIZE,
    FAISS_KINDS,
    MAX_PLAIN_TOPK,
    bf16_knn,
    blocked_topk,
    exact_knn,
)
from dmt.memory.row_table import GROWTH_STEP, RowTable, decayed_score, eviction_order
from dmt.store.records import RowBatch, RowInsert

WIDE = InsertPolicy(min_distance=0.0, merge_distance=0.0, capacity=100, decay=0.1)


def make_id_allocator():
    given = iter(range(1, 10_000))
    return lambda count: np.array([next(given) for _ in range(count)], np.int64)


def keys_on_line(*positions):
    """Keys on a keys_on_line, so that distances are differences."""
    return torch.tensor(positions, dtype=torch.float32).unsqueeze(-1).repeat(1, 2) / 2**0.5


def insert(rows, positions, policy=WIDE, step=1, take=None, tags=None):
    values = torch.tensor(positions, dtype=torch.float32).unsqueeze(-1) * 10
    return apply_insert_policy(
        rows,
        keys_on_line(*positions),
        values,
        tags or [""] * len(positions),
        policy,
        step,
        5.0,
        take,
    ).changes


def stored_positions(rows):
    return sorted(
        round(float(rows.keys[place, 0]) * 2**0.5, 3) for place in rows.index_by_id.values()
    )


@pytest.mark.parametrize(
    "columns", [7, MAX_PLAIN_TOPK, MAX_PLAIN_TOPK + BLOCK_SIZE, MAX_PLAIN_TOPK + BLOCK_SIZE + 5]
)
def test_blocked_topk_equals_topk(columns):
    scores = torch.randn(6, columns)
    scores[0, -1] = 9.0  # in the piece that no block covers
    values, at = blocked_topk(scores, 5)
    wanted = scores.topk(5)
    assert torch.equal(values, wanted.values)
    assert torch.equal(at, wanted.indices)


@pytest.mark.parametrize("keys_at_once", [1, 6, 10, 20, 99])
def test_exact_search_equals_the_definition_and_skips_empty_rows(keys_at_once, monkeypatch):
    monkeypatch.setattr("dmt.memory.knn_search.MAX_SCORES", 100)  # several pieces
    monkeypatch.setattr("dmt.memory.knn_search.KEY_CHUNK", keys_at_once)
    queries, keys = torch.randn(30, 4), torch.randn(20, 4)
    handicap = -keys.square().sum(-1) / 2
    handicap[3] = -torch.inf
    distances, rows = exact_knn(queries, keys, handicap, 20)
    wanted = torch.cdist(queries, keys).square()
    wanted[:, 3] = torch.inf
    assert (rows[:, -1] == 3).all()
    assert distances[:, -1].isinf().all()
    torch.testing.assert_close(distances, wanted.sort(-1).values)
    torch.testing.assert_close(wanted.gather(1, rows), distances)


def test_bf16_search_finds_the_same_rows_at_exact_distances(monkeypatch):
    monkeypatch.setattr("dmt.memory.knn_search.MAX_SCORES", 4_000)  # several pieces
    monkeypatch.setattr("dmt.memory.knn_search.KEY_CHUNK", 300)
    centre = torch.randn(
        32
    )  # all are about as far as each other: half precision alone would take wrong ones
    queries, keys = (
        torch.nn.functional.normalize(centre + 0.5 * torch.randn(n, 32), dim=-1) for n in (60, 700)
    )
    handicap = -keys.square().sum(-1) / 2
    handicap[3] = -torch.inf
    distances, rows = bf16_knn(queries, keys, keys.bfloat16(), handicap, 8)
    wanted, exact = exact_knn(queries, keys, handicap, 8)
    torch.testing.assert_close(distances, (queries.unsqueeze(1) - keys[rows]).square().sum(-1))
    assert not (rows == 3).any()
    assert float((rows.unsqueeze(-1) == exact.unsqueeze(-2)).any(-1).float().mean()) > 0.999
    assert (distances >= wanted - 1e-5).all()
    few, _ = bf16_knn(queries[:2], keys[:4], keys[:4].bfloat16(), handicap[:4], 4)
    assert few.isinf().tolist() == [[False, False, False, True]] * 2
    assert bf16_knn(queries[:0], keys, keys.bfloat16(), handicap, 8)[1].shape == (0, 8)


def test_straight_through_gradients_reach_queries_and_inserted_rows():
    queries, kept_keys, kept_values = (
        torch.zeros(*shape, requires_grad=True) for shape in ((2, 3), (4, 3), (4, 5))
    )
    keys, values = torch.randn(2, 3, 3), torch.randn(2, 3, 5)
    origin = torch.tensor([[2, -1, 0], [-1, 2, -1]])
    back_keys, back_values = straight_through_rows(
        queries, kept_keys, kept_values, keys, values, origin
    )
    assert torch.equal(back_keys, keys)
    assert torch.equal(back_values, values)
    of_keys, of_values = torch.randn_like(keys), torch.randn_like(values)
    ((back_keys * of_keys).sum() + (back_values * of_values).sum()).backward()
    torch.testing.assert_close(queries.grad, of_keys.sum(1))
    nobody = torch.zeros(3)
    torch.testing.assert_close(
        kept_keys.grad, torch.stack([of_keys[0, 2], nobody, of_keys[0, 0] + of_keys[1, 1], nobody])
    )
    torch.testing.assert_close(kept_values.grad[2], of_values[0, 0] + of_values[1, 1])
    assert not kept_values.grad[[1, 3]].any()


@pytest.mark.parametrize(("decay", "out"), [(0.0, 1), (1.0, 0)])
def test_lrfu_lies_between_frequency_and_recency(decay, out):
    """Row 0 was used three times long ago, row 1 once just now."""
    heat, since = np.array([3.0, 1.0]), np.array([1, 50])
    assert eviction_order(heat, since, 60, decay, 1).tolist() == [out]


def test_scores_are_sums_of_decayed_uses_without_underflow():
    heat = decayed_score(
        decayed_score(np.ones(1), np.array([3]), 7, 0.5) + 1, np.array([7]), 9, 0.5
    )
    np.testing.assert_allclose(heat, 2 ** (-0.5 * 6) + 2 ** (-0.5 * 2))
    assert eviction_order(np.array([1.0, 1.0]), np.array([1_000, 0]), 100_000, 1.0, 1).tolist() == [
        1
    ]


def test_each_read_raises_the_score():
    rows, take = RowTable(2, 1), make_id_allocator()
    insert(rows, [1, 2], take=take)
    rows.record_reads(np.array([0, 0, 1]), np.array([0.5, 0.25, 1.0]), step=3, now=8.0, decay=1.0)
    usage = rows.pop_usage()
    assert usage.ids.tolist() == [1, 2]
    assert usage.reads.tolist() == [2, 1]
    assert usage.last_read.tolist() == [8.0, 8.0]
    np.testing.assert_allclose(usage.scores, [0.25 + 0.75, 0.25 + 1.0])
    assert rows.pop_usage() is None


def test_rows_are_dropped_merged_or_inserted_by_distance():
    rows, take = RowTable(2, 1), make_id_allocator()
    policy = InsertPolicy(min_distance=0.1, merge_distance=0.5, capacity=10, decay=0.1)
    insert(rows, [0.0, 4.0], policy, take=take, tags=["a", "b"])
    changes = insert(rows, [0.05, 0.4, 9.0], policy, step=2, take=take, tags=["x", "c", "d"])
    assert stored_positions(rows) == [0.2, 4.0, 9.0]  # the mean of 0 and 0.4, one entry each
    assert [(ids.tolist(), why) for ids, why in changes.removals] == [([1], "merged")]
    merged, new = changes.inserts
    assert merged.entries.tolist() == [2]
    assert list(merged.tag) == ["a\nc"]
    assert merged.values.tolist() == [[2.0]]
    assert list(new.tag) == ["d"]
    insert(rows, [0.5], policy, step=3, take=take)
    np.testing.assert_allclose(
        stored_positions(rows)[0], (2 * 0.2 + 0.5) / 3, atol=1e-3
    )  # weighted by entries
    insert(
        rows, [4.2, 8.8, 4.4, 4.3], policy, step=4, take=take
    )  # several join one, and another joins another
    np.testing.assert_allclose(
        stored_positions(rows)[1:], [(4 + 4.2 + 4.4 + 4.3) / 4, 8.9], atol=1e-3
    )


def test_a_row_at_the_minimum_distance_is_a_duplicate():
    for novelty, position in ((0.0, 4.0), (2.0, 2.0)):
        rows, take = RowTable(2, 1), make_id_allocator()
        policy = InsertPolicy(min_distance=novelty, merge_distance=novelty, capacity=10, decay=0.1)
        apply_insert_policy(
            rows, torch.tensor([[4.0, 0.0]]), torch.ones(1, 1), [""], policy, 1, 5.0, take
        )
        again = apply_insert_policy(
            rows, torch.tensor([[position, 0.0]]), torch.ones(1, 1), [""], policy, 2, 5.0, take
        )
        assert not again.changes.inserts
        assert len(rows) == 1


def test_a_merged_row_has_the_oldest_creation_time_and_the_sum_of_scores():
    rows, take = RowTable(2, 1), make_id_allocator()
    policy = InsertPolicy(min_distance=0.0, merge_distance=0.5, capacity=10, decay=0.5)
    apply_insert_policy(rows, keys_on_line(0.0), torch.zeros(1, 1), [""], policy, 1, 100.0, take)
    changes = apply_insert_policy(
        rows, keys_on_line(0.2), torch.zeros(1, 1), [""], policy, 3, 200.0, take
    ).changes
    assert list(changes.inserts[0].created) == [100.0]
    np.testing.assert_allclose(changes.inserts[0].scores, [2 ** (-0.5 * 2) + 1])


def test_of_rows_proposed_together_the_first_represents_those_near_it():
    rows, take = RowTable(2, 1), make_id_allocator()
    changes = insert(
        rows,
        [1.0, 1.05, 1.3, 7.0],
        InsertPolicy(0.1, 0.4, 10, 0.1),
        take=take,
        tags=["a", "b", "c", "d"],
    )
    assert stored_positions(rows) == [1.15, 7.0]  # 1.05 is known once 1.0 is there, 1.3 joins it
    assert changes.inserts[0].entries.tolist() == [2, 1]
    assert list(changes.inserts[0].tag) == ["a\nc", "d"]


def test_the_lowest_scores_are_evicted_and_pinned_rows_never():
    rows, take = RowTable(2, 1), make_id_allocator()
    small = InsertPolicy(0.0, 0.0, 3, 0.0)
    insert(rows, [1, 2, 3], small, take=take)
    rows.stats.pinned[rows.index_by_id[1]] = True
    rows.record_reads(np.array([rows.index_by_id[2]]), np.array([5.0]), 2, 0.0, 0.0)
    changes = insert(rows, [4], small, step=3, take=take)
    assert stored_positions(rows) == [1, 2, 4]
    assert [(ids.tolist(), why) for ids, why in changes.removals] == [([3], "evicted")]
    insert(rows, [5, 6, 7, 8], small, step=4, take=take)
    assert stored_positions(rows) == [1, 7, 8]  # more than there is room for: the latest
    rows.stats.pinned[:] = True
    assert not insert(rows, [9], small, step=5, take=take).inserts
    assert stored_positions(rows) == [1, 7, 8]


def test_a_deleted_row_is_not_found():
    rows = RowTable(2, 1)
    insert(rows, [1, 2, 3], take=make_id_allocator())
    assert rows.ids_at(rows.search(keys_on_line(2.1), 1).indices[0]).tolist() == [2]
    rows.delete_rows([2])
    assert rows.ids_at(rows.search(keys_on_line(2.1), 1).indices[0]).tolist() == [3]


def test_of_equal_scores_the_oldest_row_is_evicted():
    rows, take = RowTable(2, 1), make_id_allocator()
    small = InsertPolicy(0.0, 0.0, 3, 0.0)
    insert(rows, [1, 2, 3], small, take=take)
    rows.delete_rows([1])
    insert(rows, [4], small, take=take)  # where row 1 lay
    insert(rows, [5], small, take=take)
    assert stored_positions(rows) == [3, 4, 5]


def test_a_pinned_row_is_not_merged_into():
    rows, take = RowTable(2, 1), make_id_allocator()
    policy = InsertPolicy(0.0, 0.5, 10, 0.1)
    insert(rows, [1.0], policy, take=take)
    rows.stats.pinned[0] = True
    assert not insert(rows, [1.2], policy, step=2, take=take).inserts
    assert stored_positions(rows) == [1.0]


def test_non_finite_rows_are_rejected_and_change_nothing():
    rows = RowTable(2, 1)
    with pytest.raises(ValueError, match="finite"):
        apply_insert_policy(
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
    insert(rows, [1.0, 2.0], take=make_id_allocator())
    found = rows.search(keys_on_line(1.1), 5)
    assert found.distances.isinf().tolist() == [[False, False, True, True, True]]


@pytest.mark.parametrize("expected", [0, 5, 40])
def test_rows_are_loaded_from_many_batches_with_or_without_a_hint(expected, monkeypatch):
    monkeypatch.setattr("dmt.memory.row_table.GROWTH_STEP", 4)
    states = torch.randn(23, 3)

    def pages():
        for start in range(0, 23, 5):
            part = states[start : start + 5].numpy()
            at = np.arange(start, start + len(part))
            about = {
                "score": at / 7,
                "score_step": at,
                "entries": at + 1,
                "created": at / 3,
                "pinned": at % 2 == 0,
                "reads": at * 2,
            }
            yield RowBatch(
                at + 100,
                part,
                part[:, :2],
                about | {"last_read": [None] * len(at), "tag": [f"t{n}" for n in at]},
            )

    rows = RowTable(3, 2)
    for _ in range(2):  # the second time in place
        rows.load_rows(pages(), expected_rows=expected)
        assert len(rows) == 23
        for number, place in rows.index_by_id.items():
            at = number - 100
            assert torch.equal(rows.keys[place], states[at])
            assert torch.equal(rows.values[place], states[at, :2])
            known = rows.stats
            assert (known.score[place], known.entries[place], known.reads[place]) == (
                at / 7,
                at + 1,
                2 * at,
            )
            assert (known.tags[place], known.pinned[place]) == (f"t{at}", at % 2 == 0)
        found = rows.search(states, 1)
        assert torch.equal(rows.ids[found.indices[:, 0]], torch.arange(23) + 100)


def test_joined_tags_are_unique_and_in_order():
    assert join_tags(["b", "a\nb", "", "c"]) == "b\na\nc"


@pytest.mark.parametrize("kind", [*FAISS_KINDS, "bf16"])
def test_an_index_finds_rows_and_never_deleted_ones(kind, monkeypatch):
    monkeypatch.setattr("dmt.memory.knn_search.IVF_MIN_ROWS", 400)
    rows, take = RowTable(4, 1, index=kind), make_id_allocator()
    generator = torch.Generator().manual_seed(0)
    policy, queries = InsertPolicy(0, 0, 900, 1.0), torch.randn(50, 4, generator=generator)
    hits = []
    for step in range(1, 9):  # fills up, trains, outgrows itself, evicts, takes places again
        keys = torch.randn(200, 4, generator=generator)
        apply_insert_policy(rows, keys, keys[:, :1], [""] * 200, policy, step, 0.0, take)
        found, exact = rows.search(queries, 5), rows.search_exact(queries, 5)
        assert (rows.ids[found.indices[found.distances.isfinite()]] >= 0).all()
        wanted = (queries.unsqueeze(1) - rows.keys[found.indices]).square().sum(-1)
        torch.testing.assert_close(
            found.distances, wanted.masked_fill(found.distances.isinf(), torch.inf)
        )
        assert (found.distances.diff(dim=1) >= 0).all()
        hits += [
            len(set(a) & set(b)) / 5
            for a, b in zip(found.indices.tolist(), exact.indices.tolist(), strict=True)
        ]
    assert len(rows) == 900
    assert np.mean(hits) == 1 if kind == "flat" else np.mean(hits) > 0.9


def test_an_unknown_index_is_rejected():
    with pytest.raises(ValueError, match="flat, ivf"):
        RowTable(2, 1, index="tree")


class RowTableMachine(RuleBasedStateMachine):
    """Any sequence of offers, reads, removals, pins and rebuilds: each number has its own key and value, bounds hold."""

    written = Bundle("written")

    @initialize(
        index=st.sampled_from(["exact", "bf16", *FAISS_KINDS]),
        capacity=st.integers(1, 23),
        recombine=st.sampled_from([0.0, 0.3]),
        novelty=st.sampled_from([0.0, 0.1]),
        decay=st.floats(0, 1),
    )
    def begin(self, index, capacity, recombine, novelty, decay):
        self.rows, self.take, self.step, self.index = (
            RowTable(3, 2, index=index),
            make_id_allocator(),
            0,
            index,
        )
        self.policy = InsertPolicy(novelty, recombine, capacity, decay)
        self.known, self.pinned, self.left = {}, set(), set()

    @rule(seed=st.integers(0, 10_000), count=st.integers(0, 9), spread=st.sampled_from([0.1, 1.0]))
    def offer(self, seed, count, spread):
        self.step += 1
        generator = torch.Generator().manual_seed(seed)
        keys, values = (torch.randn(count, width, generator=generator) * spread for width in (3, 2))
        changes = apply_insert_policy(
            self.rows,
            keys,
            values,
            ["t"] * count,
            self.policy,
            self.step,
            float(self.step),
            self.take,
        ).changes
        for part in changes.inserts:
            for number, key, value in zip(part.ids.tolist(), part.keys, part.values, strict=True):
                assert number not in self.known
                assert number not in self.left
                self.known[number] = key, value
        for ids, _ in changes.removals:
            for number in ids.tolist():
                del self.known[number]
                self.left.add(number)

    @rule(seed=st.integers(0, 10_000))
    def read(self, seed):
        self.step += 1
        queries = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        found = self.rows.search(queries, 4)
        there = found.distances.isfinite()
        assert int(there.sum(1).min()) == min(4, len(self.known))
        for query, ids, distances, real in zip(
            queries, found.indices, found.distances, there, strict=True
        ):
            for number, distance in zip(
                self.rows.ids_at(ids[real]).tolist(), distances[real].tolist(), strict=True
            ):
                np.testing.assert_allclose(
                    ((query.numpy() - self.known[number][0]) ** 2).sum(), distance, atol=1e-4
                )
        places = found.indices[there].numpy()
        self.rows.record_reads(
            places, np.ones(len(places)), self.step, float(self.step), self.policy.decay
        )

    @rule(which=st.integers(0, 100))
    def forget(self, which):
        loose = sorted(set(self.known) - self.pinned)
        if loose:
            number = loose[which % len(loose)]
            self.rows.delete_rows([number])
            del self.known[number]
            self.left.add(number)

    @rule(which=st.integers(0, 100))
    def pin(self, which):
        if self.known:
            number = sorted(self.known)[which % len(self.known)]
            self.rows.stats.pinned[self.rows.index_by_id[number]] = True
            self.pinned.add(number)

    @rule()
    def rebuild(self):
        known, at = (
            self.rows.stats,
            [self.rows.index_by_id[number] for number in sorted(self.known)],
        )
        about = {
            "score": [float(known.score[i]) for i in at],
            "score_step": [int(known.score_step[i]) for i in at],
            "tag": [known.tags[i] for i in at],
            "entries": [int(known.entries[i]) for i in at],
            "created": [float(known.created[i]) for i in at],
            "pinned": [bool(known.pinned[i]) for i in at],
            "last_read": [None] * len(at),
            "reads": [int(known.reads[i]) for i in at],
        }
        self.rows = RowTable(3, 2, index=self.index)
        rows = [self.known[number] for number in sorted(self.known)]
        keys, values = (
            np.array([row[part] for row in rows], np.float32).reshape(len(at), (3, 2)[part])
            for part in (0, 1)
        )
        if at:
            self.rows.load_rows(
                [RowBatch(np.array(sorted(self.known), np.int64), keys, values, about)]
            )

    @invariant()
    def every_number_has_its_own_key_and_value(self):
        if not hasattr(self, "rows"):
            return
        assert set(self.rows.index_by_id) == set(self.known)
        assert len(self.known) <= self.policy.capacity
        assert self.pinned <= set(self.known)
        for number, place in self.rows.index_by_id.items():
            assert int(self.rows.ids[place]) == number
            np.testing.assert_array_equal(self.rows.keys[place].numpy(), self.known[number][0])
            np.testing.assert_array_equal(self.rows.values[place].numpy(), self.known[number][1])


TestRowTableMachine = RowTableMachine.TestCase
TestRowTableMachine.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_table_grows_without_moving_rows():
    rows, take = RowTable(2, 1), make_id_allocator()
    insert(rows, range(10), InsertPolicy(0, 0, 10**6, 0), take=take)
    before = dict(rows.index_by_id)
    many = RowInsert(
        take(GROWTH_STEP * 2),
        np.ones((GROWTH_STEP * 2, 2)),
        np.zeros((GROWTH_STEP * 2, 1)),
        np.ones(GROWTH_STEP * 2, np.float32),
    )
    rows.insert_rows(many, step=2)
    assert {number: rows.index_by_id[number] for number in before} == before
    assert len(rows) == 10 + GROWTH_STEP * 2
    assert rows.stats.tags == [""] * rows.allocated_rows
