"""Tables of facts in a store: their text, their rows and their history.

Nothing is overwritten: a deleted fact stays in the history and can be restored, until it is purged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    and_,
    bindparam,
    delete,
    func,
    insert,
    inspect,
    or_,
    select,
    update,
)

from dmt.errors import UserError
from dmt.files import check_version
from dmt.store.database import (
    DAMAGED_HINT,
    FACTS_VERSION,
    FINGERPRINT,
    calibration_table,
    compact_database,
    create_store_engine,
    fact_metadata,
    fact_rows_table,
    facts_table,
    metadata_table,
    row_stats_table,
    rows_table,
    translate_errors,
)
from dmt.store.records import (
    FactRecord,
    FloatArray,
    IntArray,
    Namespace,
    RowInsert,
    StepChanges,
    StoredFact,
    hash_subject,
)
from dmt.store.rows import RowStore
from dmt.text import fold_text

FACTS_NAMESPACE = "facts"  # holds the rows of facts
IMPORTED_PREFIX = "imported "  # of the metadata that lists the namespaces `mark_imported` marked
NO_RUN = "dmt"  # run name of rows that no run wrote
TRANSFERRED = "transferred"  # deletion reason of facts that are in the slots now (`dmt sleep`)
# In the metadata: the fingerprint of the model in whose states the facts were written, where the
# weights have changed since; and the largest ID that a purged fact had.
WRITTEN_FOR, LAST_FACT_ID = "facts_written_for", "last_fact_id"
# How the tensors of a calibration are stored.
CALIBRATION_DTYPES = {"float32": "<f4", "uint8": "u1"}
MAX_IDS_PER_QUERY = 500
MAX_ID = 2**63 - 1
FACTS_PER_QUERY = 2_000
MAX_WORDS_PER_QUERY = 50  # SQLite limits the depth of a condition; `has_words` checks the others


@dataclass(frozen=True)
class Moment:
    """A moment in the history of facts.

    Attributes:
        last_id: the largest ID of a fact that was written until then; 0 where there is none.
        time: seconds since 1970.
    """

    last_id: int
    time: float


class FactTable:
    """The facts of one model in its store.

    Args:
        store: stays open; its owner closes it.
        as_of: facts that were active then count as active, until they are purged; None is now.
    """

    def __init__(self, store: RowStore, as_of: Moment | None = None) -> None:
        self.store, self.as_of = store, as_of

    @property
    def exists(self) -> bool:
        """Whether the tables of facts were created, with the first fact.

        Raises:
            UserError: they have another version.
        """
        version = self.read_metadata("facts_version").get("facts_version")
        if version is not None:
            check_version(
                version,
                FACTS_VERSION,
                f"store {self.store.url}: facts of version",
                "use the dmt that made it, or write its facts again",
            )
        return version is not None

    def create(
        self,
        width: int,
        key_layer: int,
        value_layer: int,
        calibration: dict[str, NDArray[Any]],
    ) -> None:
        """Create the tables, or replace the layers and the calibration of existing ones.

        Args:
            width: size of a hidden state.
            key_layer: the layer whose block input is compared with keys.
            value_layer: the layer to whose block output values are added.
            calibration: tensors by name.
        """
        self.store.get_or_create_namespace(FACTS_NAMESPACE, width, width)

        def write(connection: Connection) -> None:
            fact_metadata.create_all(connection, checkfirst=True)
            _write_calibration(connection, key_layer, value_layer, calibration)

        self.store.commit(NO_RUN, 0, {}, extra_write=write)

    def read_layers(self) -> tuple[int, int]:
        """Return the key layer and the value layer."""
        metadata = self.read_metadata("facts_key_layer", "facts_value_layer")
        return int(metadata["facts_key_layer"]), int(metadata["facts_value_layer"])

    def read_metadata(self, *names: str) -> dict[str, str]:
        """Return entries of the store's metadata by name, those that exist."""
        query = select(metadata_table).where(metadata_table.c.name.in_(names))
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            return {row.name: row.value for row in connection.execute(query)}

    def read_calibration(self) -> dict[str, NDArray[Any]]:
        """Return the tensors of the calibration by name."""
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            records = connection.execute(select(calibration_table)).all()
        arrays = {}
        for row in records:
            dtype, shape = json.loads(row.shape)
            arrays[row.name] = np.frombuffer(row.data, CALIBRATION_DTYPES[dtype]).reshape(shape)
        return {name: array.copy() for name, array in arrays.items()}

    @cached_property
    def namespace(self) -> Namespace:
        """The namespace that holds the rows."""
        return next(
            namespace
            for namespace in self.store.list_namespaces()
            if namespace.name == FACTS_NAMESPACE
        )

    def add(
        self,
        entries: Sequence[tuple[FactRecord, FloatArray, FloatArray]],
        replacements: dict[int, int] | None = None,
    ) -> list[FactRecord]:
        """Write facts, all or none of them.

        Args:
            entries: facts without IDs, with keys and values `(tokens, width)`.
            replacements: by ID of an active fact the index of the entry that replaces it.

        Returns:
            The facts with the IDs of facts and rows.
        """
        records, changes = self._build_insertion(entries)
        last_id = int(self.read_metadata(LAST_FACT_ID).get(LAST_FACT_ID, 0))
        last_id = max(last_id, self.read_moment().last_id)
        added = [replace(fact, id=fact_id) for fact_id, fact in enumerate(records, last_id + 1)]
        replaced_by = {old_id: added[index].id for old_id, index in (replacements or {}).items()}

        def write(connection: Connection) -> None:
            if added:
                connection.execute(insert(facts_table), [_fact_columns(fact) for fact in added])
                connection.execute(insert(fact_rows_table), _row_columns(added))
            if replaced_by:
                _soft_delete(connection, list(replaced_by), "replaced", replaced_by)

        self.store.commit(NO_RUN, 0, changes, extra_write=write)
        return added

    def soft_delete(self, fact_ids: Sequence[int], reason: str) -> None:
        """Mark facts and their rows as deleted: `forgotten`, `evicted` or `transferred`."""
        if not fact_ids:
            return

        def write(connection: Connection) -> None:
            _soft_delete(connection, list(fact_ids), reason, {})

        self.store.commit(NO_RUN, 0, {}, extra_write=write)

    def purge(self, fact_ids: Sequence[int]) -> None:
        """Erase facts, active or deleted, and their rows; nothing restores them.

        The file is written anew, so that it no longer holds their words.

        Raises:
            UserError: another program reads the database.
        """
        if not fact_ids:
            return

        def write(connection: Connection) -> None:
            _erase_facts(connection, fact_ids)

        self.store.commit(NO_RUN, 0, {}, extra_write=write)
        self.store.compact()

    def rewrite(
        self,
        entries: Sequence[tuple[FactRecord, FloatArray, FloatArray]],
        layers: tuple[int, int],
        calibration: dict[str, NDArray[Any]],
        fingerprints: tuple[str, Mapping[str, str]],
    ) -> None:
        """Replace the rows of facts by those of other weights, all or none of them.

        Args:
            entries: facts with their IDs and the IDs of their present rows, active or deleted,
                with new thresholds, keys and values `(tokens, width)`.
            layers: key and value layer.
            calibration: tensors by name.
            fingerprints: of the model, and of its rounded weights by type.
        """
        rewritten, changes = self._build_insertion(entries)
        usage, old_ids = self.read_usage(), [row for fact, *_ in entries for row in fact.rows]
        counts = [
            {"row_id": new, "count": usage[old][0], "new_last_read": usage[old][1]}
            for (fact, *_), new_fact in zip(entries, rewritten, strict=True)
            # A tokenizer may have changed, and with it the number of rows.
            for old, new in zip(fact.rows, new_fact.rows, strict=False)
        ]

        def write(connection: Connection) -> None:
            _erase_rows(connection, old_ids)
            _write_calibration(connection, *layers, calibration)
            _write_fingerprints(connection, *fingerprints)
            for fact in rewritten:
                connection.execute(
                    update(facts_table)
                    .where(facts_table.c.id == fact.id)
                    .values(answer_ids=json.dumps(fact.answer_ids))
                )
                if fact.deleted_reason is not None:
                    deletion = {
                        "deleted_reason": fact.deleted_reason,
                        "deleted_run": NO_RUN,
                        "deleted_step": 0,
                    }
                    connection.execute(
                        update(row_stats_table)
                        .where(row_stats_table.c.id.in_(fact.rows))
                        .values(deletion)
                    )
            if rewritten:
                connection.execute(insert(fact_rows_table), _row_columns(rewritten))
            if counts:
                connection.execute(_add_usage(), counts)

        self.store.commit(NO_RUN, 0, changes, extra_write=write)

    def _build_insertion(
        self, entries: Sequence[tuple[FactRecord, FloatArray, FloatArray]]
    ) -> tuple[list[FactRecord], dict[Namespace, StepChanges]]:
        """Return facts with the IDs of new rows, and the insertion of these rows."""
        row_ids = self.store.reserve_ids(sum(len(keys) for _, keys, _ in entries))
        records: list[FactRecord] = []
        offset = 0
        for fact, keys, _ in entries:
            rows = tuple(row_ids[offset : offset + len(keys)].tolist())
            records.append(replace(fact, rows=rows))
            offset += len(keys)
        if not records:
            return [], {}
        return records, {self.namespace: StepChanges([_build_insert(row_ids, records, entries)])}

    def undelete(self, fact_id: int, replaced_ids: Sequence[int]) -> None:
        """Restore a fact, and mark the facts that contradict it as replaced by it.

        Raises:
            UserError: the fact was transferred: the slots state it now, and its rows belong to the
                model from before.
        """
        query = select(facts_table.c.deleted_reason).where(facts_table.c.id == fact_id)
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            reason = connection.execute(query).scalar_one_or_none()
        if reason == TRANSFERRED:
            raise UserError(
                f"fact {fact_id} was transferred to the model's slots; to have it as a row too, "
                "write it again"
            )

        def write(connection: Connection) -> None:
            if replaced_ids:
                replaced_by = dict.fromkeys(replaced_ids, fact_id)
                _soft_delete(connection, list(replaced_ids), "replaced", replaced_by)
            connection.execute(
                update(facts_table)
                .where(facts_table.c.id == fact_id)
                .values(deleted_reason=None, deleted_at=None, replaced_by=None)
            )
            row_ids = select(fact_rows_table.c.row_id).where(fact_rows_table.c.fact_id == fact_id)
            connection.execute(
                update(row_stats_table)
                .where(row_stats_table.c.id.in_(row_ids))
                .values(deleted_reason=None, deleted_run=None, deleted_step=None)
            )

        self.store.commit(NO_RUN, 0, {}, extra_write=write)

    def read_moment(self) -> Moment:
        """Return the present moment."""
        with self._connect() as connection:
            last_id = connection.execute(select(func.max(facts_table.c.id))).scalar_one()
        return Moment(last_id or 0, time.time())

    def count(
        self,
        include_deleted: bool = False,
        *,
        ids: Sequence[int] | None = None,
        tag: str | None = None,
        words: str = "",
    ) -> int:
        """Count the facts that `read` returns."""
        if ids is not None or len(fold_text(words).split()) > MAX_WORDS_PER_QUERY:
            return len(self.read(include_deleted, ids=ids, tag=tag, words=words))
        query = select(func.count()).where(self._select(include_deleted, tag, words))
        with self._connect() as connection:
            return int(connection.execute(query.select_from(facts_table)).scalar_one())

    def count_by_tag(self) -> dict[str, int]:
        """Count the active facts of each tag."""
        query = select(facts_table.c.tag, func.count()).where(self._is_active)
        with self._connect() as connection:
            rows = connection.execute(query.group_by(facts_table.c.tag).order_by(facts_table.c.tag))
            return {tag: int(count) for tag, count in rows}

    def count_rows(self) -> int:
        """Count the rows of the active facts."""
        query = (
            select(func.count())
            .select_from(fact_rows_table)
            .join(facts_table, facts_table.c.id == fact_rows_table.c.fact_id)
            .where(self._is_active)
        )
        with self._connect() as connection:
            return int(connection.execute(query).scalar_one())

    def read_ids(self) -> list[int]:
        """Return the IDs of the active facts, in order."""
        query = select(facts_table.c.id).where(self._is_active).order_by(facts_table.c.id)
        with self._connect() as connection:
            return list(connection.execute(query).scalars())

    def read(
        self,
        include_deleted: bool = False,
        *,
        ids: Sequence[int] | None = None,
        tag: str | None = None,
        words: str = "",
        limit: int | None = None,
    ) -> list[FactRecord]:
        """Return the facts that meet all conditions, in the order of their IDs.

        Args:
            include_deleted: return deleted facts too.
            ids: fact IDs; those that do not exist are left out.
            tag: the facts' tag.
            words: the fact contains all of them; see `FactRecord.has_words`.
            limit: at most so many.
        """
        condition = self._select(include_deleted, tag, words)
        if ids is None:
            pages = self._read_pages(condition, min(FACTS_PER_QUERY, limit or FACTS_PER_QUERY))
        else:
            # No fact has an ID beyond the database's numbers.
            valid_ids = sorted(fact_id for fact_id in set(ids) if abs(fact_id) <= MAX_ID)
            query = select(facts_table).where(condition).order_by(facts_table.c.id)
            pages = (
                self._read_page(query.where(facts_table.c.id.in_(chunk)))
                for chunk in _split_ids(valid_ids)
            )
        facts = (fact for page in pages for fact in page if not words or fact.has_words(words))
        return list(islice(facts, limit))

    def stream(self) -> Iterator[FactRecord]:
        """Yield the active facts in the order of their IDs; few of them are in memory at once."""
        for page in self._read_pages(self._is_active, FACTS_PER_QUERY):
            yield from page

    def read_deleted(self) -> list[FactRecord]:
        """Return the deleted facts, in the order of their IDs."""
        is_deleted = facts_table.c.deleted_reason.is_not(None)
        return self._read_page(select(facts_table).where(is_deleted).order_by(facts_table.c.id))

    def find_by_subjects(self, subject_keys: Iterable[str]) -> list[FactRecord]:
        """Return the active facts about these subjects, in the order of their IDs.

        Args:
            subject_keys: `FactRecord.subject_key` of the facts; empty for facts without a subject.
        """
        keys = set(subject_keys)
        facts: list[FactRecord] = []
        for hashes in _split_ids([hash_subject(key) for key in keys]):
            is_selected = self._is_active & facts_table.c.subject_hash.in_(hashes)
            facts += self._read_page(select(facts_table).where(is_selected))
        return sorted(
            (fact for fact in facts if fact.subject_key in keys), key=lambda fact: fact.id
        )

    def find_replaced(self, fact_ids: Sequence[int]) -> list[FactRecord]:
        """Return the facts that these facts replaced, in the order of their IDs."""
        facts: list[FactRecord] = []
        for ids in _split_ids(fact_ids):
            facts += self._read_page(select(facts_table).where(facts_table.c.replaced_by.in_(ids)))
        return sorted(facts, key=lambda fact: fact.id)

    def add_replaced(self, facts: Iterable[FactRecord]) -> dict[int, FactRecord]:
        """Return facts by ID, with those that they replaced, those that these replaced, and so on.

        Args:
            facts: active or deleted.
        """
        chain = {fact.id: fact for fact in facts}
        new_ids = list(chain)
        while new_ids:
            replaced = [fact for fact in self.find_replaced(new_ids) if fact.id not in chain]
            new_ids = [fact.id for fact in replaced]
            chain |= dict(zip(new_ids, replaced, strict=True))
        return chain

    def find_least_recent(self, count: int) -> list[int]:
        """Return the IDs of the active facts that fired longest ago, or were written first.

        Args:
            count: at most so many facts.
        """
        last_read = func.coalesce(row_stats_table.c.last_read, 0)
        # The row that fired last, of several the one that fired most.
        order = func.row_number().over(
            partition_by=fact_rows_table.c.fact_id,
            order_by=(last_read.desc(), row_stats_table.c.reads.desc()),
        )
        usage = (
            select(
                fact_rows_table.c.fact_id,
                last_read.label("last_read"),
                row_stats_table.c.reads,
                order.label("place"),
            )
            .join_from(
                fact_rows_table, row_stats_table, row_stats_table.c.id == fact_rows_table.c.row_id
            )
            .subquery()
        )
        query = (
            select(facts_table.c.id)
            .join_from(
                facts_table,
                usage,
                (usage.c.fact_id == facts_table.c.id) & (usage.c.place == 1),
            )
            .where(self._is_active)
            .order_by(usage.c.last_read, usage.c.reads, facts_table.c.created, facts_table.c.id)
            .limit(count)
        )
        with self._connect() as connection:
            return list(connection.execute(query).scalars())

    def read_subject_hashes(self) -> IntArray:
        """Return the hashes `(n,)` of all subjects, sorted; those of deleted facts too."""
        query = select(facts_table.c.subject_hash).distinct().order_by(facts_table.c.subject_hash)
        with self._connect() as connection:
            return np.fromiter(connection.execute(query).scalars(), np.int64)

    def max_subject_words(self) -> int:
        """Return the number of words of the longest subject of an active fact."""
        query = select(func.max(facts_table.c.subject_words)).where(self._is_active)
        with self._connect() as connection:
            return connection.execute(query).scalar_one() or 0

    def load_by_subjects(self, subject_keys: Iterable[str]) -> list[StoredFact]:
        """Return the active facts about these subjects with their rows; see `find_by_subjects`."""
        return self.load_rows(self.find_by_subjects(subject_keys))

    def load_rows(self, records: Sequence[FactRecord]) -> list[StoredFact]:
        """Return facts with their rows, without those that have been purged or rewritten since."""
        namespace = self.namespace
        row_ids = [row_id for fact in records for row_id in fact.rows]
        data: dict[int, tuple[bytes, bytes]] = {}
        with self._connect() as connection:
            for ids in _split_ids(row_ids):
                query = select(rows_table.c.id, rows_table.c.key, rows_table.c.value)
                for row_id, key, value in connection.execute(query.where(rows_table.c.id.in_(ids))):
                    data[row_id] = key, value
        facts = [fact for fact in records if all(row_id in data for row_id in fact.rows)]
        shape = -1, namespace.key_width
        try:
            return [
                StoredFact(
                    fact,
                    *(
                        np.frombuffer(b"".join(column), "<f4").reshape(shape).astype(np.float32)
                        for column in zip(*(data[row_id] for row_id in fact.rows), strict=True)
                    ),
                )
                for fact in facts
            ]
        except (ValueError, TypeError) as error:  # a truncated row
            raise UserError(f"store {self.store.url}: {DAMAGED_HINT} ({error})") from None

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        """Connect for reading; all queries see the same moment, whatever is written meanwhile."""
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            if self.store.path is not None:
                connection.exec_driver_sql("BEGIN")
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @property
    def _is_active(self) -> ColumnElement[bool]:
        is_active = facts_table.c.deleted_reason.is_(None)
        if self.as_of is None:
            return is_active
        return and_(
            facts_table.c.id <= self.as_of.last_id,
            or_(is_active, facts_table.c.deleted_at > self.as_of.time),
        )

    def _select(self, include_deleted: bool, tag: str | None, words: str) -> ColumnElement[bool]:
        """Return a condition for the facts with a tag and the first words."""
        conditions = [facts_table.c.id > 0 if include_deleted else self._is_active]
        if tag is not None:
            conditions.append(facts_table.c.tag == tag)
        find_text = func.strpos if self.store.path is None else func.instr
        for word in fold_text(words).split()[:MAX_WORDS_PER_QUERY]:
            conditions.append(find_text(facts_table.c.search_text, word) > 0)
        return and_(*conditions)

    def _read_pages(self, condition: ColumnElement[bool], size: int) -> Iterator[list[FactRecord]]:
        """Yield the facts that meet a condition, in the order of their IDs, `size` at a time."""
        query = select(facts_table).where(condition).order_by(facts_table.c.id).limit(size)
        last_id = 0
        while True:
            page = self._read_page(query.where(facts_table.c.id > last_id))
            yield page
            if len(page) < size:
                return
            last_id = page[-1].id

    def _read_page(self, query: Select[Any]) -> list[FactRecord]:
        """Return the facts of a query of `facts_table`, with the IDs of their rows."""
        rows_by_fact: dict[int, list[Any]] = {}
        with self._connect() as connection:
            records = connection.execute(query).all()
            for ids in _split_ids([record.id for record in records]):
                row_query = (
                    select(fact_rows_table)
                    .where(fact_rows_table.c.fact_id.in_(ids))
                    .order_by(fact_rows_table.c.fact_id, fact_rows_table.c.answer_position)
                )
                for row in connection.execute(row_query):
                    rows_by_fact.setdefault(row.fact_id, []).append(row)
        try:
            facts = [_fact_record(record, rows_by_fact.get(record.id, [])) for record in records]
        except (ValueError, TypeError) as error:  # token IDs that are not JSON
            raise UserError(f"store {self.store.url}: {DAMAGED_HINT} ({error})") from None
        as_of = self.as_of
        if as_of is None:
            return facts
        return [
            replace(fact, deleted_reason=None, deleted_at=None, replaced_by=None)
            if (fact.deleted_at or 0) > as_of.time
            else fact
            for fact in facts
        ]

    def read_states(self, records: Iterable[FactRecord]) -> tuple[IntArray, FloatArray, FloatArray]:
        """Return IDs `(n,)`, keys and values `(n, width)` of the active rows of these facts."""
        row_ids = np.array(sorted(row for fact in records for row in fact.rows), np.int64)
        batch = self.store.get(self.namespace, row_ids)
        return batch.ids, batch.keys, batch.values

    def read_usage(self, row_ids: Sequence[int] | None = None) -> dict[int, tuple[int, float]]:
        """Return, by row ID, how often it fired and when last (seconds since 1970; 0: never).

        Args:
            row_ids: IDs of rows; all rows of facts where it is None.
        """
        query = select(
            row_stats_table.c.id, row_stats_table.c.reads, row_stats_table.c.last_read
        ).where(row_stats_table.c.namespace == self.namespace.id)
        queries = (
            [query]
            if row_ids is None
            else [query.where(row_stats_table.c.id.in_(ids)) for ids in _split_ids(row_ids)]
        )
        with self._connect() as connection:
            return {
                row.id: (int(row.reads), float(row.last_read or 0))
                for query in queries
                for row in connection.execute(query)
            }

    def record_usage(self, counts: dict[int, int]) -> None:
        """Add to the rows' usage: by row ID how often the row has fired just now."""
        if not counts:
            return
        now = time.time()
        parameters = [
            {"row_id": row_id, "count": count, "new_last_read": now}
            for row_id, count in counts.items()
        ]

        def write(connection: Connection) -> None:
            connection.execute(_add_usage(), parameters)

        self.store.commit(NO_RUN, 0, {}, extra_write=write)


def rebind_model(
    store: RowStore,
    model_hash: str,
    rounded_hashes: Mapping[str, str] | None = None,
    written_for: str = "",
) -> None:
    """Make the store belong to another model, which was made from its model.

    Args:
        store: open for writing.
        model_hash: fingerprint of the other model.
        rounded_hashes: those of its rounded weights by type; unknown where it is None.
        written_for: fingerprint of the model in whose states the facts were written, where theirs
            are others.
    """

    def write(connection: Connection) -> None:
        _write_fingerprints(connection, model_hash, rounded_hashes or {}, written_for)

    store.commit(NO_RUN, 0, {}, extra_write=write)


def strip_history(path: Path) -> None:
    """Erase deleted facts and rows from a copy of a database that nobody else uses."""
    engine, _ = create_store_engine(str(path), "rw")
    with translate_errors(str(path)), engine.begin() as connection:
        if inspect(connection).has_table(facts_table.name):
            query = select(facts_table.c.id).where(facts_table.c.deleted_reason.is_not(None))
            _erase_facts(connection, connection.execute(query).scalars().all())
        deleted = select(row_stats_table.c.id).where(row_stats_table.c.deleted_reason.is_not(None))
        _erase_rows(connection, connection.execute(deleted).scalars().all())
    compact_database(engine, str(path))


def imported_namespaces(store: RowStore) -> set[str]:
    """Return the namespaces that hold all rows of a saved model's memory.

    From then on the rows in the store count, not those beside the model's weights.
    """
    query = select(metadata_table.c.name).where(
        metadata_table.c.name.startswith(IMPORTED_PREFIX, autoescape=True)
    )
    with translate_errors(store.url), store.engine.connect() as connection:
        return {name.removeprefix(IMPORTED_PREFIX) for name in connection.execute(query).scalars()}


def mark_imported(connection: Connection, namespace: str) -> None:
    """Mark a namespace as imported, in the transaction that writes its rows."""
    connection.execute(
        insert(metadata_table),
        {"name": f"{IMPORTED_PREFIX}{namespace}", "value": str(time.time())},
    )


def _write_calibration(
    connection: Connection,
    key_layer: int,
    value_layer: int,
    calibration: dict[str, NDArray[Any]],
) -> None:
    tensors = []
    for name, array in calibration.items():
        dtype = "uint8" if array.dtype == np.uint8 else "float32"
        data = array.astype(CALIBRATION_DTYPES[dtype]).tobytes()
        tensors.append({"name": name, "shape": json.dumps([dtype, array.shape]), "data": data})
    connection.execute(delete(calibration_table))
    connection.execute(insert(calibration_table), tensors)
    metadata = {
        "facts_version": FACTS_VERSION,
        "facts_key_layer": key_layer,
        "facts_value_layer": value_layer,
    }
    _set_metadata(connection, metadata)


def _write_fingerprints(
    connection: Connection,
    model_hash: str,
    rounded_hashes: Mapping[str, str],
    written_for: str = "",
) -> None:
    is_about_model = metadata_table.c.name.startswith(FINGERPRINT)
    connection.execute(
        delete(metadata_table).where(is_about_model | (metadata_table.c.name == WRITTEN_FOR))
    )
    metadata = {FINGERPRINT: model_hash}
    metadata |= {f"{FINGERPRINT}_{dtype}": value for dtype, value in rounded_hashes.items()}
    _set_metadata(connection, metadata | ({WRITTEN_FOR: written_for} if written_for else {}))


def _set_metadata(connection: Connection, metadata: Mapping[str, Any]) -> None:
    connection.execute(delete(metadata_table).where(metadata_table.c.name.in_(list(metadata))))
    connection.execute(
        insert(metadata_table),
        [{"name": name, "value": str(value)} for name, value in metadata.items()],
    )


def _erase_facts(connection: Connection, fact_ids: Sequence[int]) -> None:
    """Erase facts and their rows; their IDs are never used again."""
    last_id = connection.execute(select(func.max(facts_table.c.id))).scalar_one() or 0
    query: Select[Any] = select(metadata_table.c.value).where(metadata_table.c.name == LAST_FACT_ID)
    stored = connection.execute(query).scalar_one_or_none()
    _set_metadata(connection, {LAST_FACT_ID: max(last_id, int(stored or 0))})
    for ids in _split_ids(fact_ids):
        is_selected = fact_rows_table.c.fact_id.in_(ids)
        row_query = select(fact_rows_table.c.row_id).where(is_selected)
        _erase_rows(connection, connection.execute(row_query).scalars().all())
        connection.execute(delete(facts_table).where(facts_table.c.id.in_(ids)))


def _erase_rows(connection: Connection, row_ids: Sequence[int]) -> None:
    columns = [rows_table.c.id, row_stats_table.c.id]
    if inspect(connection).has_table(fact_rows_table.name):
        columns.append(fact_rows_table.c.row_id)
    for ids in _split_ids(row_ids):
        for column in columns:
            connection.execute(delete(column.table).where(column.in_(ids)))


def _split_ids(ids: Sequence[int]) -> list[list[int]]:
    """Split IDs among queries."""
    starts = range(0, len(ids), MAX_IDS_PER_QUERY)
    return [list(ids[start : start + MAX_IDS_PER_QUERY]) for start in starts]


def _add_usage() -> Any:
    return (
        update(row_stats_table)
        .where(row_stats_table.c.id == bindparam("row_id"))
        .values(
            reads=row_stats_table.c.reads + bindparam("count"),
            last_read=bindparam("new_last_read"),
        )
    )


def _row_columns(facts: Iterable[FactRecord]) -> list[dict[str, Any]]:
    return [
        {
            "row_id": row_id,
            "fact_id": fact.id,
            "answer_position": position,
            "threshold": fact.thresholds[position],
        }
        for fact in facts
        for position, row_id in enumerate(fact.rows)
    ]


def _build_insert(
    row_ids: IntArray,
    records: Sequence[FactRecord],
    entries: Sequence[tuple[FactRecord, FloatArray, FloatArray]],
) -> RowInsert:
    keys = np.concatenate([keys for _, keys, _ in entries]).astype(np.float32)
    values = np.concatenate([values for _, _, values in entries]).astype(np.float32)
    tags = [fact.tag for fact in records for _ in fact.rows]
    created = [fact.created for fact in records for _ in fact.rows]
    scores = np.ones(len(row_ids), np.float32)
    return RowInsert(row_ids, keys, values, scores, tags, created=created)


def _soft_delete(
    connection: Connection, fact_ids: list[int], reason: str, replaced_by: dict[int, int]
) -> None:
    connection.execute(
        update(facts_table)
        .where(facts_table.c.id == bindparam("fact_id"), facts_table.c.deleted_reason.is_(None))
        .values(
            deleted_reason=reason, deleted_at=time.time(), replaced_by=bindparam("replacement")
        ),
        [{"fact_id": fact_id, "replacement": replaced_by.get(fact_id)} for fact_id in fact_ids],
    )
    row_update = (
        update(row_stats_table)
        .where(
            row_stats_table.c.id == bindparam("row_id"), row_stats_table.c.deleted_reason.is_(None)
        )
        .values(deleted_reason=reason, deleted_run=NO_RUN, deleted_step=0)
    )
    for ids in _split_ids(fact_ids):
        query = select(fact_rows_table.c.row_id).where(fact_rows_table.c.fact_id.in_(ids))
        row_ids = connection.execute(query).scalars().all()
        if row_ids:
            connection.execute(row_update, [{"row_id": row_id} for row_id in row_ids])


def _fact_columns(fact: FactRecord) -> dict[str, Any]:
    return {
        "id": fact.id,
        "prompt": fact.prompt,
        "answer": fact.answer,
        "subject": fact.subject,
        "tag": fact.tag,
        "source": fact.source,
        "created": fact.created,
        "answer_ids": json.dumps(fact.answer_ids),
        "subject_hash": hash_subject(fact.subject_key),
        "subject_words": len(fact.subject_key.split()),
        "search_text": fact.search_text,
    }


def _fact_record(record: Any, rows: Sequence[Any]) -> FactRecord:
    return FactRecord(
        record.id,
        record.prompt,
        record.answer,
        record.subject,
        record.tag,
        record.source,
        record.created,
        tuple(json.loads(record.answer_ids)),
        tuple(row.row_id for row in rows),
        tuple(row.threshold for row in rows),
        record.deleted_reason,
        record.deleted_at,
        record.replaced_by,
    )
