"""The mapping of active facts: the facts as they are stored at each moment."""

import pytest
from test_facts import create_table, make_entry
from test_rows import MODEL

from dmt.store import RowStore, facts
from dmt.store.active_facts import ActiveFacts


def test_the_mapping_reads_what_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "FACTS_PER_QUERY", 2)
    with RowStore(str(tmp_path / "memory.db"), MODEL) as store:
        table = create_table(store)
        records = ActiveFacts(table)
        assert records == {}
        assert not records
        ada, ben, cid = added = table.add([make_entry(name) for name in ("Ada", "Ben", "Cid")])
        assert list(records) == [ada.id, ben.id, cid.id]
        assert list(records.values()) == added
        assert dict(records.items()) == dict(records) == {fact.id: fact for fact in added}
        assert len(records) == len(records.values()) == 3
        assert ben in records.values()
        table.soft_delete([ben.id], "forgotten")
        assert records == {ada.id: ada, cid.id: cid}
        assert records[cid.id] == cid
        assert ben.id not in records
        assert records.get(ben.id) is None
        with pytest.raises(KeyError):
            records[ben.id]
        assert repr(records) == "ActiveFacts(2 facts)"


def test_facts_may_change_while_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "FACTS_PER_QUERY", 1)
    with RowStore(str(tmp_path / "memory.db"), MODEL) as store:
        table = create_table(store)
        table.add([make_entry(name) for name in ("Ada", "Ben", "Cid")])
        for fact in ActiveFacts(table).values():
            table.purge([fact.id])
        assert not ActiveFacts(table)


def test_without_a_table_there_are_none():
    records = ActiveFacts(None)
    assert records == {}
    assert list(records.values()) == list(records) == []
    assert 1 not in records
