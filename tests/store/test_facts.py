"""The tables of facts, in SQLite and PostgreSQL: selection, subjects, usage, moments."""

import time
from dataclasses import replace

import numpy as np
import pytest
from test_rows import MODEL, postgresql, store_url  # noqa: F401  (fixtures)

from dmt.errors import UserError
from dmt.store import RowStore, facts
from dmt.store.facts import FactTable
from dmt.store.records import FactRecord, hash_subject

WIDTH = 4


def make_entry(subject, prompt="lives in", answer=" Rows", tokens=2, tag="", created=1.0):
    """Return a fact without ID with random rows, as `FactTable.add` takes it."""
    rng = np.random.default_rng(hash_subject(f"{subject} {prompt}") % 2**32)
    keys, values = rng.normal(size=(2, tokens, WIDTH)).astype(np.float32)
    record = FactRecord(
        0,
        f"{subject} {prompt}",
        answer,
        subject,
        tag,
        "",
        created,
        tuple(range(tokens)),
        (),
        (0.5,) * tokens,
    )
    return record, keys, values


def create_table(store):
    table = FactTable(store)
    table.create(WIDTH, 0, 1, {"mean": np.zeros(WIDTH, np.float32)})
    return table


@pytest.fixture
def table(store_url):  # noqa: F811
    with RowStore(store_url, MODEL) as store:
        yield create_table(store)


def test_a_subject_is_found_however_it_is_written(table):
    ada, zoe, second, without_subject = table.add(
        [
            make_entry("Ada  Winterbourne"),
            make_entry("ZOE\u0308 O’Neil"),
            make_entry("ada winterbourne", "works in"),
            make_entry(""),
        ]
    )
    assert table.find_by_subjects(["ada winterbourne"]) == [ada, second]
    assert table.find_by_subjects(["zoë o'neil", ""]) == [zoe, without_subject]
    assert table.find_by_subjects(["ada", "winterbourne", "Ada Winterbourne", "%"]) == []
    table.soft_delete([ada.id], "forgotten")
    assert table.find_by_subjects(iter(["ada winterbourne"])) == [second]
    assert table.max_subject_words() == 2
    table.soft_delete([second.id, zoe.id], "forgotten")
    assert table.max_subject_words() == 0


def test_subjects_with_the_same_hash_are_told_apart(table, monkeypatch):
    monkeypatch.setattr(facts, "hash_subject", lambda key: 7)
    ada, ben = table.add([make_entry("Ada"), make_entry("Ben")])
    assert table.find_by_subjects(["ada"]) == [ada]
    assert table.find_by_subjects(["ada", "ben", "cid"]) == [ada, ben]


@pytest.mark.parametrize("limit", [1, 2, 3, None])
def test_many_facts_are_read_page_by_page(table, monkeypatch, limit):
    monkeypatch.setattr(facts, "FACTS_PER_QUERY", 2)
    monkeypatch.setattr(facts, "MAX_IDS_PER_QUERY", 2)
    names = ["Ada", "Ben", "Cid", "Dot", "Eve"]
    added = table.add([make_entry(name, tokens=n + 1) for n, name in enumerate(names)])
    table.soft_delete([added[1].id], "forgotten")
    active = [added[0], *added[2:]]
    assert table.read(limit=limit) == active[:limit]
    assert table.read_ids() == [fact.id for fact in active]
    ids = [added[4].id, added[0].id, added[0].id, added[1].id, 99]
    assert table.read(ids=ids, limit=limit) == [added[0], added[4]][:limit]
    assert table.count(ids=ids) == 2
    assert [fact.id for fact in table.read(True, ids=ids)] == sorted({*ids} - {99})
    assert table.find_by_subjects(map(str.lower, names)) == active
    assert table.count() == 4
    assert table.count(include_deleted=True) == 5
    assert table.count_rows() == 1 + 3 + 4 + 5
    assert table.read(ids=[]) == []


def test_facts_are_selected_by_tag_and_words(table, monkeypatch):
    monkeypatch.setattr(facts, "MAX_WORDS_PER_QUERY", 2)
    ada, ben, cid = table.add(
        [
            make_entry("Ada", "is 100% sure of", " ÉTÉ", tag="a"),
            make_entry("Ben", "is 100x sure of", " Été_x", tag="b"),
            make_entry("Cid", "is sure of", " hiver", tag="b"),
        ]
    )
    assert table.read(words="100% SURE") == [ada]
    assert table.read(words="e\u0301te\u0301  sure") == [ada, ben]
    assert table.read(words="été sure 100x") == [ben], "the third word counts, too"
    assert table.count(words="été sure 100x") == table.count(words="_") == 1
    assert table.read(tag="b", words="sure") == [ben, cid]
    assert table.read(tag="b", words="sure", limit=1) == [ben]
    assert table.read(tag="") == []
    assert table.count_by_tag() == {"a": 1, "b": 2}
    table.soft_delete([cid.id], "forgotten")
    assert table.count_by_tag() == {"a": 1, "b": 1}
    assert [fact.id for fact in table.read(True, tag="b")] == [ben.id, cid.id]


@pytest.mark.parametrize("selection", [{"words": "ada \ud800"}, {"tag": "\ud800"}])
def test_half_of_a_surrogate_pair_is_one_line(table, selection):
    table.add([make_entry("Ada")])
    for read in (table.read, table.count):
        with pytest.raises(UserError, match=r"'\\ud800' is no UTF-8 text"):
            read(**selection)


def test_a_query_may_have_thousands_of_words(table):
    (ada,) = table.add([make_entry("Ada")])
    assert table.read(words="ada " * 5_000) == [ada]
    assert table.read(words="ada " * 5_000 + "ben") == []


def test_the_least_recent_facts_are_those_that_fired_longest_ago(table, monkeypatch):
    entries = [
        make_entry(name, created=c) for name, c in zip("ABCDE", (5, 4, 3, 2, 1), strict=True)
    ]
    a, b, c, d, e = table.add(entries)
    now = 10.0
    monkeypatch.setattr(time, "time", lambda: now)
    table.record_usage({a.rows[0]: 5, a.rows[1]: 2})
    table.record_usage({b.rows[1]: 4})
    now = 20.0
    table.record_usage({c.rows[0]: 1})
    assert table.find_least_recent(9) == [e.id, d.id, b.id, a.id, c.id]
    assert table.find_least_recent(2) == [e.id, d.id]
    monkeypatch.undo()
    table.soft_delete([e.id], "forgotten")
    assert table.find_least_recent(2) == [d.id, b.id]
    assert table.read_usage([a.rows[1], b.rows[0]]) == {a.rows[1]: (2, 10.0), b.rows[0]: (0, 0.0)}


def test_facts_are_read_with_their_rows(table):
    ada, ben = table.add([entries := make_entry("Ada"), make_entry("Ben")])
    (new,) = table.add([make_entry("Ada", "moved to")], {ada.id: 0})
    (replaced,) = table.find_replaced([new.id, ben.id])
    assert (replaced.id, replaced.replaced_by) == (ada.id, new.id)
    (stored,) = table.load_by_subjects(["ada"])
    assert stored.record == new
    (old,) = table.load_rows([ada])
    np.testing.assert_array_equal(old.keys, entries[1])
    np.testing.assert_array_equal(old.values, entries[2])
    table.purge([ada.id])
    assert [fact.record for fact in table.load_rows([ada, ben])] == [ben]


def test_facts_are_read_as_of_a_moment(table):
    ada, ben = table.add(
        [
            make_entry("Ada"),
            make_entry("Ben", "is"),
        ]
    )
    table.soft_delete([ben.id], "forgotten")
    past = FactTable(table.store, table.read_moment())
    (new,) = table.add([make_entry("Ada", "moved to distant")], {ada.id: 0})
    assert table.read() == [new]
    assert past.read() == past.find_by_subjects(["ada"]) == [ada]
    assert (past.count(), past.read_ids(), past.count_by_tag()) == (1, [ada.id], {"": 1})
    assert past.load_by_subjects(["ada"])[0].record == ada
    table.purge([ada.id])
    assert past.read() == []


def test_a_damaged_row_is_one_line(table):
    (ada,) = table.add([make_entry("Ada")])
    with table.store.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE dmt_rows SET value = key WHERE id = {ada.rows[0]}")
        key = "substr(key, 1, 3)" if table.store.path else "substring(key from 1 for 3)"
        connection.exec_driver_sql(f"UPDATE dmt_rows SET key = {key} WHERE id = {ada.rows[0]}")
    with pytest.raises(UserError, match="the file is damaged"):
        table.load_by_subjects(["ada"])


def test_hashes_of_subjects_are_the_same_in_every_process():
    assert hash_subject("ada") == 2811677874490880021
    assert hash_subject("") != hash_subject("\ud800")


def test_a_long_subject_is_indexed(table):
    subject = "Ada " + "of everywhere " * 3_000
    (fact,) = table.add([make_entry(subject)])
    assert table.find_by_subjects([fact.subject_key]) == [replace(fact)]
    assert table.max_subject_words() == 6_001


def test_what_facts_replaced_is_found_to_the_first(table):
    (first,) = table.add([make_entry("Ada")])
    (second,) = table.add([make_entry("Ada")], {first.id: 0})
    third, other = table.add([make_entry("Ada"), make_entry("Ben")], {second.id: 0})
    assert list(table.add_replaced([third])) == [third.id, second.id, first.id]
    assert list(table.add_replaced([other, second])) == [other.id, second.id, first.id]
    assert table.add_replaced([]) == {}
