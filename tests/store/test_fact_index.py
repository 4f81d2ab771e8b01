"""The index of facts by subject: the same answers as reading all, whatever changes meanwhile."""

import copy
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_facts import create_table, make_entry
from test_rows import MODEL

from dmt.errors import UserError
from dmt.store import RowStore
from dmt.store import fact_index as fact_index_module
from dmt.store.fact_index import FactIndex
from dmt.store.facts import FactTable
from dmt.store.records import StoredFact, hash_subject


@pytest.fixture
def path(tmp_path):
    return tmp_path / "memory.db"


@pytest.fixture
def table(path):
    with RowStore(str(path), MODEL) as store:
        yield create_table(store)


def lookup_records(index, *subject_keys):
    """Return the records by subject key, and check their rows."""
    facts_by_key = index.lookup(subject_keys)
    for facts in facts_by_key.values():
        for fact in facts:
            entry = make_entry(
                fact.record.subject, fact.record.prompt.removeprefix(f"{fact.record.subject} ")
            )
            np.testing.assert_array_equal(fact.keys, entry[1])
            np.testing.assert_array_equal(fact.values, entry[2])
            assert fact.keys.dtype == fact.values.dtype == np.float32
    return {key: [fact.record for fact in facts] for key, facts in facts_by_key.items()}


def read_records(table, *subject_keys):
    """Return the same by reading all facts."""
    groups = {}
    for fact in table.read():
        if fact.subject_key in subject_keys:
            groups.setdefault(fact.subject_key, []).append(fact)
    return groups


def count_reads(index, monkeypatch):
    reads = []
    load = index.fact_table.load_by_subjects
    monkeypatch.setattr(
        index.fact_table,
        "load_by_subjects",
        lambda keys: (reads.append(sorted(keys)), load(keys))[1],
    )
    return reads


def test_only_subjects_of_facts_are_read_and_once(table, monkeypatch):
    ada, ben = table.add([make_entry("Ada"), make_entry("Ben")])
    index = FactIndex(table)
    reads = count_reads(index, monkeypatch)
    assert lookup_records(index, "was born", "ada", "in") == {"ada": [ada]}
    assert reads == [["ada"]]
    assert lookup_records(index, "ada", "ben", "ada") == {"ada": [ada], "ben": [ben]}
    assert reads == [["ada"], ["ben"]]
    assert index.lookup([]) == {}
    assert len(index) == 2
    assert not index.is_empty


def test_changes_are_seen_once_they_are_announced(table):
    index = FactIndex(table)
    assert index.is_empty
    assert index.lookup(["ada", ""]) == {}
    (ada,) = table.add([make_entry("Ada")])
    index.forget(["ada"])
    assert not index.is_empty
    assert lookup_records(index, "ada") == {"ada": [ada]}
    (new, plain) = table.add([make_entry("Ada", "moved to"), make_entry("", "It is")], {ada.id: 0})
    assert lookup_records(index, "ada") == {"ada": [ada]}, "kept"
    index.forget(["ada", ""])
    assert lookup_records(index, "ada", "") == {"ada": [new], "": [plain]}
    table.undelete(ada.id, [new.id])
    index.forget(["ada"])
    assert lookup_records(index, "ada") == {"ada": [ada]}
    table.purge([ada.id, new.id, plain.id])
    index.clear()
    assert index.lookup(["ada", ""]) == {}
    assert index.is_empty


def test_the_longest_subject_is_known(table):
    table.add([make_entry("Ada Lovelace")])
    index = FactIndex(table)
    assert index.max_subject_words == 2
    index.forget(["a king of spain"])
    assert index.max_subject_words == 4
    index.clear()
    assert index.max_subject_words == 2
    index.set_unsaved([StoredFact(*make_entry("Her Majesty the Queen"))])
    assert index.max_subject_words == 4


def test_a_random_history_gives_the_answers_of_reading_all(table):
    rng = random.Random(0)
    index, names = FactIndex(table, capacity=3), ["ada", "ben lee", "cid", "dot", ""]
    for _ in range(60):
        active, key = table.read(), rng.choice(names)
        deleted = [fact for fact in table.read(True) if fact.deleted_reason]
        action = rng.choice(["add", "add", "delete", "restore", "purge"])
        changed = [key]
        if action == "add":
            table.add([make_entry(key.title(), rng.choice(["is in", "was in"]))])
        elif action == "delete" and active:
            changed = [(fact := rng.choice(active)).subject_key]
            table.soft_delete([fact.id], "forgotten")
        elif action == "restore" and deleted:
            changed = [(fact := rng.choice(deleted)).subject_key]
            table.undelete(fact.id, [])
        elif action == "purge" and rng.random() < 0.2 and active:
            changed = [(fact := rng.choice(active)).subject_key]
            table.purge([fact.id])
        index.forget(changed)
        some = rng.sample([*names, "of", "no one"], 3)
        assert lookup_records(index, *some) == read_records(table, *some)


def test_few_facts_are_kept(table, monkeypatch):
    table.add([make_entry(name) for name in ("Ada", "Ben", "Cid", "Dot")])
    table.add([make_entry("Cid", verb) for verb in ("sings", "runs")])
    index = FactIndex(table, capacity=2)
    reads = count_reads(index, monkeypatch)
    for key in ("ada", "ben", "ada", "dot", "ada", "ben"):
        index.lookup([key])
    assert reads == [["ada"], ["ben"], ["dot"], ["ben"]], "the one not used for longest went"
    assert len(index.lookup(["cid"])["cid"]) == 3
    assert set(index._kept) == {"cid"}, "all of one lookup are kept, for the next"
    index.lookup(["cid"])
    assert len(reads) == 5


def test_threads_that_read_the_same_facts_keep_them_once(table, monkeypatch):
    table.add([make_entry("Ada"), make_entry("Ben")])
    index = FactIndex(table, capacity=2)
    load, barrier = table.load_by_subjects, threading.Barrier(2)

    def load_at_once(keys):
        barrier.wait(timeout=30)
        return load(keys)

    monkeypatch.setattr(table, "load_by_subjects", load_at_once)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(index.lookup, [["ada"]] * 2))
    monkeypatch.setattr(table, "load_by_subjects", load)
    index.lookup(["ben"])
    assert set(index._kept) == {"ada", "ben"}, "there is room for both"


def test_a_subject_with_the_hash_of_another_has_no_facts(table, monkeypatch):
    (ada,) = table.add([make_entry("Ada")])
    monkeypatch.setattr(fact_index_module, "hash_subject", lambda key: hash_subject("ada"))
    index = FactIndex(table)
    reads = count_reads(index, monkeypatch)
    assert lookup_records(index, "ben", "ada") == {"ada": [ada]}
    assert lookup_records(index, "ben", "ada") == {"ada": [ada]}
    assert reads == [["ada", "ben"]], "that there is none is kept, too"


def test_facts_in_memory_are_found_beside_those_of_the_store(table):
    (ada,) = table.add([make_entry("Ada")])
    index = FactIndex(table)
    packed, other = (StoredFact(*make_entry(name, "packed")) for name in ("Ada", "Ben"))
    index.set_unsaved([packed, other])
    facts_by_key = index.lookup(["ada", "ben", "cid"])
    assert [fact.record for fact in facts_by_key["ada"]] == [ada, packed.record]
    assert facts_by_key["ben"] == [other]
    assert set(facts_by_key) == {"ada", "ben"}
    assert len(index) == 3
    index.set_unsaved([])
    assert lookup_records(index, "ada", "ben") == {"ada": [ada]}
    alone = FactIndex()
    assert alone.is_empty
    assert alone.max_subject_words == len(alone) == 0
    alone.set_unsaved([other])
    alone.forget(["ben"])
    assert alone.lookup(["ada", "ben"]) == {"ben": [other]}
    assert not alone.is_empty


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_the_facts_of_its_moment(table, make_copy):
    ada, ben = table.add([make_entry("Ada"), make_entry("Ben")])
    index = FactIndex(table, capacity=5)
    index.set_unsaved([StoredFact(*make_entry("Cid"))])
    assert lookup_records(index, "ada")
    other = make_copy(index)
    (new,) = table.add([make_entry("Ada", "moved to")], {ada.id: 0})
    index.forget(["ada"])
    again = make_copy(make_copy(other))
    assert lookup_records(index, "ada") == {"ada": [new]}
    for older in (other, again):
        assert lookup_records(older, "ada", "ben") == {"ada": [ada], "ben": [ben]}
        assert older.lookup(["cid"])["cid"][0].record == make_entry("Cid")[0]
        assert older.capacity == 5
        assert older.fact_table.store.read_only


def test_a_reader_needs_no_lock_and_notices_a_missing_file(table, path):
    (ada,) = table.add([make_entry("Ada")])
    reader = FactTable(RowStore(str(path), read_only=True))
    index = FactIndex(FactTable(reader.store, reader.read_moment()))
    table.add([make_entry("Ben")])
    assert lookup_records(index, "ada", "ben") == {"ada": [ada]}
    index.clear()
    for file in path.parent.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        index.lookup(["ada"])


def test_facts_of_a_server_travel_in_a_copy(table, monkeypatch):
    """A URL may have a password, which no copy should hold."""
    (ada,) = table.add([make_entry("Ada")])
    index = FactIndex(table)
    monkeypatch.setattr(table, "store", store := copy.copy(table.store))
    monkeypatch.setattr(
        table, "_connect", FactTable(RowStore(str(store.path), read_only=True))._connect
    )
    monkeypatch.setattr(store, "path", None)
    other = pickle.loads(pickle.dumps(index))
    assert other.fact_table is None
    assert lookup_records(other, "ada") == {"ada": [ada]}


def test_threads_look_facts_up_while_one_writes(table):
    names = [f"n{number}" for number in range(12)]
    ids = {
        name: fact.id
        for name, fact in zip(names, table.add([make_entry(name) for name in names]), strict=True)
    }
    index, stop = FactIndex(table, capacity=4), threading.Event()

    def look_up(seed):
        rng, count = random.Random(seed), 0
        while not stop.is_set() or not count:
            for key, facts in lookup_records(index, *rng.sample(names, 3)).items():
                assert [fact.subject for fact in facts] == [key]
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(look_up, seed) for seed in range(4)]
        for name in names:
            (new,) = table.add([make_entry(name, "is new")], {ids[name]: 0})
            index.forget([name])
            assert lookup_records(index, name) == {name: [new]}, "never what was kept before"
        stop.set()
        assert all(future.result() for future in futures)
    assert lookup_records(index, *names) == read_records(table, *names)


def test_what_is_read_while_a_fact_is_written_is_not_kept(table, monkeypatch):
    (ada,) = table.add([make_entry("Ada")])
    index = FactIndex(table)
    load = table.load_by_subjects

    def load_slowly(keys):
        facts = load(keys)
        monkeypatch.undo()
        table.add([make_entry("Ada", "moved to")], {ada.id: 0})
        index.forget(["ada"])
        return facts

    monkeypatch.setattr(table, "load_by_subjects", load_slowly)
    assert lookup_records(index, "ada") == {"ada": [ada]}
    assert [fact.id for fact in lookup_records(index, "ada")["ada"]] == [2]
