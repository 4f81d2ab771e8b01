"""Finds facts by their subjects in a store of any size, and keeps the rows of few of them.

    index = FactIndex(FactTable(store))
    index.lookup(["ada winterbourne", "was born"])  # {"ada winterbourne": [StoredFact(...)]}

Of all subjects the index holds a hash, eight bytes each; a name that is no subject costs no query.
The facts of a subject are read when it is looked up, and are kept until others need the room.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmt.store.records import IntArray, StoredFact, hash_subject

if TYPE_CHECKING:
    from dmt.store.facts import FactTable, Moment

CAPACITY = 1_024  # facts; with four rows of width 4,096 each they take 134 MB


class FactIndex:
    """The active facts of a store, and facts that are in memory only, by subject.

    Threads may look facts up at once. A copy, or an unpickled index, has the facts of the moment
    when it was made: it reads the same file, from a server it takes all facts along.

    Args:
        fact_table: the facts of a store; None where there is none.
        capacity: facts to keep in memory, beside those of the last lookup.
    """

    def __init__(self, fact_table: FactTable | None = None, capacity: int = CAPACITY) -> None:
        self.fact_table, self.capacity = fact_table, capacity
        self._lock = threading.RLock()
        self._generation = 0  # grows with each change
        self._unsaved: dict[str, list[StoredFact]] = {}
        self._stored_words = self._unsaved_words = 0  # of the longest subjects
        self.clear()

    def lookup(self, subject_keys: Iterable[str]) -> dict[str, list[StoredFact]]:
        """Return the active facts about subjects with their rows, those of the store first.

        Args:
            subject_keys: names as `fold_text` returns them; empty for facts without a subject.

        Returns:
            The facts by subject key, of names that are subjects.

        Raises:
            UserError: the store can no longer be read.
        """
        keys = list(dict.fromkeys(subject_keys))
        stored = self._lookup_stored(keys) if self.fact_table is not None else {}
        return {
            key: [*stored.get(key, ()), *self._unsaved.get(key, ())]
            for key in keys
            if stored.get(key) or key in self._unsaved
        }

    @property
    def max_subject_words(self) -> int:
        """The number of words of the longest subject, or more where facts were deleted since."""
        with self._lock:
            self._load_subjects()
            return max(self._stored_words, self._unsaved_words)

    @property
    def is_empty(self) -> bool:
        """Whether there is no fact; False, too, where all were deleted since the last `clear`."""
        with self._lock:
            return not (len(self._load_subjects()) or self._changed_hashes or self._unsaved)

    def __len__(self) -> int:
        """Count the facts, those of the store by a query."""
        stored = 0 if self.fact_table is None else self.fact_table.count()
        return stored + sum(len(facts) for facts in self._unsaved.values())

    def set_unsaved(self, facts: Iterable[StoredFact]) -> None:
        """Look these facts up beside those of the store, in place of earlier ones."""
        unsaved: dict[str, list[StoredFact]] = {}
        for fact in facts:
            unsaved.setdefault(fact.record.subject_key, []).append(fact)
        self._unsaved_words = _max_words(unsaved)
        self._unsaved = unsaved  # in one assignment: another thread may look facts up

    def forget(self, subject_keys: Iterable[str]) -> None:
        """Read the facts about these subjects again, after they were written or deleted."""
        keys = list(subject_keys)
        with self._lock:
            self._generation += 1
            for key in keys:
                self._kept.pop(key, None)
            if self._hashes is not None:
                self._changed_hashes.update(map(hash_subject, keys))
                self._stored_words = max(self._stored_words, _max_words(keys))

    def clear(self) -> None:
        """Read all subjects and facts of the store again when they are looked up."""
        with self._lock:
            self._generation += 1
            # By subject, the last used last; none where a hash is that of another subject.
            self._kept: OrderedDict[str, tuple[StoredFact, ...]] = OrderedDict()
            self._hashes: IntArray | None = None  # of all subjects, sorted
            self._changed_hashes: set[int] = set()  # of subjects that were written since
            self._stored_words = 0

    def _lookup_stored(self, keys: list[str]) -> dict[str, tuple[StoredFact, ...]]:
        stored: dict[str, tuple[StoredFact, ...]] = {}
        missing = []
        with self._lock:
            generation = self._generation
            for key in self._select_subjects(keys):
                facts = self._kept.get(key)
                if facts is None:
                    missing.append(key)
                else:
                    self._kept.move_to_end(key)
                    stored[key] = facts
        if not missing:
            return stored
        # Without the lock: other threads need not wait for the database.
        read = self._read(missing)
        with self._lock:
            if generation == self._generation:  # nothing was written meanwhile
                self._kept |= read
                self._drop_oldest(len(stored) + len(read))
        return stored | read

    def _select_subjects(self, keys: list[str]) -> list[str]:
        """Return the keys that may be subjects of stored facts."""
        hashes = self._load_subjects()
        key_hashes = [hash_subject(key) for key in keys]
        if len(hashes):
            queries = np.array(key_hashes, np.int64)
            places = np.searchsorted(hashes, queries).clip(max=len(hashes) - 1)
            is_subject = (hashes[places] == queries).tolist()
        else:
            is_subject = [False] * len(keys)
        return [
            key
            for key, key_hash, is_hit in zip(keys, key_hashes, is_subject, strict=True)
            if is_hit or key_hash in self._changed_hashes
        ]

    def _load_subjects(self) -> IntArray:
        if self._hashes is None:
            table = self.fact_table
            self._hashes = np.zeros(0, np.int64) if table is None else table.read_subject_hashes()
            self._stored_words = 0 if table is None else table.max_subject_words()
        return self._hashes

    def _read(self, keys: list[str]) -> dict[str, tuple[StoredFact, ...]]:
        assert self.fact_table is not None, "only its subjects are read"
        facts: dict[str, list[StoredFact]] = {key: [] for key in keys}
        for fact in self.fact_table.load_by_subjects(keys):
            facts[fact.record.subject_key].append(fact)
        return {key: tuple(subject_facts) for key, subject_facts in facts.items()}

    def _drop_oldest(self, num_latest: int) -> None:
        """Make room, but keep the subjects of the latest lookup, which the next may need again."""
        # A subject without facts takes room, too.
        size = sum(max(1, len(facts)) for facts in self._kept.values())
        while len(self._kept) > num_latest and size > self.capacity:
            _, facts = self._kept.popitem(last=False)
            size -= max(1, len(facts))

    def __reduce__(self) -> tuple[Callable[..., FactIndex], tuple[Any, ...]]:
        """Describe a copy: database connections and locks stay with the process."""
        path = as_of = None
        unsaved = [fact for facts in self._unsaved.values() for fact in facts]
        if self.fact_table is not None:
            path = self.fact_table.store.path
            if path is None:
                unsaved = [*self.fact_table.load_rows(self.fact_table.read()), *unsaved]
            else:
                as_of = self.fact_table.as_of or self.fact_table.read_moment()
        return _restore, (path, as_of, self.capacity, unsaved)


def _restore(
    path: Path | None, as_of: Moment | None, capacity: int, unsaved: Sequence[StoredFact]
) -> FactIndex:
    from dmt.store.facts import FactTable  # needs SQLAlchemy, which most models do without
    from dmt.store.rows import RowStore

    table = None if path is None else FactTable(RowStore(str(path), read_only=True), as_of)
    index = FactIndex(table, capacity)
    index.set_unsaved(unsaved)
    return index


def _max_words(subject_keys: Iterable[str]) -> int:
    return max((len(key.split()) for key in subject_keys), default=0)
