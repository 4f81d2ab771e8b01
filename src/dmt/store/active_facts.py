"""The active facts of a store as a mapping, which reads what is asked for."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, ValuesView

from dmt.store.facts import FactTable
from dmt.store.records import FactRecord


class ActiveFacts(Mapping[int, FactRecord]):
    """Active facts by ID, in the order of their IDs; nothing of them is kept in memory.

    Args:
        fact_table: the facts; None where there are none.
    """

    def __init__(self, fact_table: FactTable | None) -> None:
        self._table = fact_table

    def __getitem__(self, fact_id: int) -> FactRecord:
        for fact in () if self._table is None else self._table.read(ids=[fact_id]):
            return fact
        raise KeyError(fact_id)

    def __iter__(self) -> Iterator[int]:
        return iter([] if self._table is None else self._table.read_ids())

    def __len__(self) -> int:
        return 0 if self._table is None else self._table.count()

    def values(self) -> ValuesView[FactRecord]:
        """Return the facts, which are read page by page."""
        return _Values(self)

    def items(self) -> ItemsView[int, FactRecord]:
        """Return IDs and facts, which are read page by page."""
        return _Items(self)

    def __repr__(self) -> str:
        return f"ActiveFacts({len(self)} facts)"

    def _stream(self) -> Iterator[FactRecord]:
        return iter(()) if self._table is None else self._table.stream()


class _Values(ValuesView[FactRecord]):
    def __init__(self, facts: ActiveFacts) -> None:
        super().__init__(facts)
        self._facts = facts

    def __iter__(self) -> Iterator[FactRecord]:
        return self._facts._stream()


class _Items(ItemsView[int, FactRecord]):
    def __init__(self, facts: ActiveFacts) -> None:
        super().__init__(facts)
        self._facts = facts

    def __iter__(self) -> Iterator[tuple[int, FactRecord]]:
        return ((fact.id, fact) for fact in self._facts._stream())
