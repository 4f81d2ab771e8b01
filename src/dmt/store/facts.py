"""Facts in a store: what they say, which rows say it, and what became of them. Nothing is ever written over."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from dmt.errors import UserError
from dmt.files import check_version
from dmt.store.database import (
    DAMAGED_HINT,
    FACTS_VERSION,
    fact_metadata,
    fact_rows_table,
    facts_table,
    meta_table,
    states_table,
    tensors_table,
    translate_errors,
)
from dmt.store.records import FactRecord, FloatArray, IntArray, Namespace, RowInsert, StepChanges
from dmt.store.rows import RowStore

FACTS_NAMESPACE = "facts"
"""Namespace of their rows."""
IMPORTED_PREFIX = "settled "
"""Begins the names under which `dmt_about` keeps which namespaces have been settled."""
NO_RUN = "dmt"
"""What marks rows that no run wrote."""
CONSOLIDATED = "slept"
"""Why a fact is gone that is in slots now (`dmt sleep`)."""


class FactTable:
    """The facts of one model in its store.

    Args:
        store: stays open and is closed by whoever opened it.
    """

    def __init__(self, store: RowStore) -> None:
        self.store = store

    @property
    def exists(self) -> bool:
        """Whether there has been a fact.

        Raises:
            UserError: the tables are of another version.
        """
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            metadata = dict(connection.execute(select(meta_table.c.name, meta_table.c.value)).all())  # type: ignore[arg-type]
        version = metadata.get("facts")
        if version is not None:
            remedy = "use the dmt that made it, or write its facts anew"
            check_version(
                version, FACTS_VERSION, f"store {self.store.url}: facts of version", remedy
            )
        return version is not None

    def create(
        self, width: int, settings: dict[str, int], calibration: dict[str, NDArray[np.float32]]
    ) -> None:
        """Make room for facts: numbers to be kept by name, and tensors; what was there of these is replaced."""
        self.store.get_or_create_namespace(FACTS_NAMESPACE, width, width)

        def write(connection: Connection) -> None:
            fact_metadata.create_all(connection, checkfirst=True)
            connection.execute(delete(tensors_table))
            connection.execute(
                insert(tensors_table),
                [
                    {
                        "name": name,
                        "shape": json.dumps(array.shape),
                        "data": array.astype("<f4").tobytes(),
                    }
                    for name, array in calibration.items()
                ],
            )
            metadata = {
                "facts": FACTS_VERSION,
                **{f"facts_{name}": value for name, value in settings.items()},
            }
            connection.execute(delete(meta_table).where(meta_table.c.name.in_(list(metadata))))
            connection.execute(
                insert(meta_table),
                [{"name": name, "value": str(value)} for name, value in metadata.items()],
            )

        self.store.commit(NO_RUN, 0, {}, extra_write=write)

    def read_settings(self) -> dict[str, int]:
        """What `begin` was given."""
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            records = connection.execute(
                select(meta_table).where(meta_table.c.name.startswith("facts_"))
            ).all()
        return {row.name.removeprefix("facts_"): int(row.value) for row in records}

    def read_calibration(self) -> dict[str, NDArray[np.float32]]:
        """What `begin` was given."""
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            records = connection.execute(select(tensors_table)).all()
        return {
            row.name: np.frombuffer(row.data, "<f4").reshape(json.loads(row.shape)).copy()
            for row in records
        }

    @property
    def namespace(self) -> Namespace:
        """Where the rows are."""
        return next(
            candidate
            for candidate in self.store.list_namespaces()
            if candidate.name == FACTS_NAMESPACE
        )

    def add(
        self,
        entries: Sequence[tuple[FactRecord, FloatArray, FloatArray]],
        replacements: dict[int, int] | None = None,
    ) -> list[FactRecord]:
        """Write facts with keys and values `(tokens, width)` of each, all or none; with their numbers.

        Args:
            replaces: which fact that is there is replaced by which of `new`.
        """
        row_ids = self.store.reserve_ids(sum(len(keys) for _, keys, _ in entries))
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            last_id = (
                connection.execute(select(func.max(facts_table.c.id))).scalar_one() or 0
            )  # facts never leave the table
        added, offset = [], 0
        for fact_id, (fact, keys, _) in enumerate(entries, last_id + 1):
            added.append(
                replace(fact, id=fact_id, rows=tuple(row_ids[offset : offset + len(keys)].tolist()))
            )
            offset += len(keys)
        changes = (
            {self.namespace: StepChanges([_build_insert(row_ids, added, entries)])}
            if len(row_ids)
            else {}
        )
        replaced_by = {old_id: added[index].id for old_id, index in (replacements or {}).items()}

        def write(connection: Connection) -> None:
            if added:
                connection.execute(insert(facts_table), [_fact_columns(fact) for fact in added])
                row_columns = [
                    {
                        "row": row_id,
                        "fact": fact.id,
                        "said": position,
                        "reach": fact.thresholds[position],
                    }
                    for fact in added
                    for position, row_id in enumerate(fact.rows)
                ]
                connection.execute(insert(fact_rows_table), row_columns)
            if replaced_by:
                _soft_delete(connection, list(replaced_by), "replaced", replaced_by)

        self.store.commit(NO_RUN, 0, changes, extra_write=write)
        return added

    def soft_delete(self, fact_ids: Sequence[int], reason: str) -> None:
        """Facts are there no more: `forgotten` or `evicted`. What they said stays in the history."""
        if fact_ids:
            self.store.commit(
                NO_RUN,
                0,
                {},
                extra_write=lambda connection: _soft_delete(connection, list(fact_ids), reason, {}),
            )

    def undelete(self, fact_id: int, replaced_ids: Sequence[int]) -> None:
        """A fact is there again; others, which contradict it, are replaced by it.

        Raises:
            UserError: it has slept: slots say it now, and its rows belong to the model of the evening before.
        """
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            reason = connection.execute(
                select(facts_table.c.deleted_reason).where(facts_table.c.id == fact_id)
            ).scalar_one_or_none()
        if reason == CONSOLIDATED:
            raise UserError(
                f"fact {fact_id} has slept: it is in the student's slots; to have it as a row too, write it again"
            )

        def write(connection: Connection) -> None:
            if replaced_ids:
                _soft_delete(
                    connection, list(replaced_ids), "replaced", dict.fromkeys(replaced_ids, fact_id)
                )
            fact_columns = {"deleted_reason": None, "deleted_at": None, "replaced_by": None}
            connection.execute(
                update(facts_table).where(facts_table.c.id == fact_id).values(fact_columns)
            )
            row_id_query = select(fact_rows_table.c.row).where(fact_rows_table.c.fact == fact_id)
            row_columns = {"deleted": None, "deleted_run": None, "deleted_step": None}
            connection.execute(
                update(states_table).where(states_table.c.id.in_(row_id_query)).values(row_columns)
            )

        self.store.commit(NO_RUN, 0, {}, extra_write=write)

    def read(self, include_deleted: bool = False) -> list[FactRecord]:
        """Facts that are there, in the order of their numbers; with `gone` those that were, too."""
        query = select(facts_table).order_by(facts_table.c.id)
        if not include_deleted:
            query = query.where(facts_table.c.deleted_reason.is_(None))
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            records = connection.execute(query).all()
            answer_rows: dict[int, list[Any]] = {}
            for answer_row in connection.execute(
                select(fact_rows_table).order_by(fact_rows_table.c.fact, fact_rows_table.c.said)
            ):
                answer_rows.setdefault(answer_row.fact, []).append(answer_row)
        try:
            return [_fact_record(row, answer_rows.get(row.id, [])) for row in records]
        except (ValueError, TypeError) as error:  # token ids that are no JSON
            raise UserError(f"store {self.store.url}: {DAMAGED_HINT} ({error})") from None

    def read_states(self, records: Iterable[FactRecord]) -> tuple[IntArray, FloatArray, FloatArray]:
        """Rows of these facts that are there: numbers `(n,)`, keys and values `(n, width)`, in the order of their numbers."""
        row_ids = np.array(sorted(row for fact in records for row in fact.rows), np.int64)
        batch = self.store.get(self.namespace, row_ids)
        return batch.ids, batch.keys, batch.values

    def read_usage(self) -> dict[int, tuple[int, float]]:
        """How often each row has answered, and when last (0: never)."""
        query = select(states_table.c.id, states_table.c.reads, states_table.c.last_read).where(
            states_table.c.namespace == self.namespace.id
        )
        with translate_errors(self.store.url), self.store.engine.connect() as connection:
            return {
                row.id: (int(row.reads), float(row.last_read or 0))
                for row in connection.execute(query)
            }

    def record_usage(self, counts: dict[int, int]) -> None:
        """Note that rows have answered so many times, now."""
        if not counts:
            return
        statement = update(states_table).where(states_table.c.id == bindparam("row"))
        statement = statement.values(
            reads=states_table.c.reads + bindparam("more"), last_read=bindparam("when")
        )
        now = time.time()
        parameters = [
            {"row": row_id, "more": count, "when": now} for row_id, count in counts.items()
        ]

        def write(connection: Connection) -> None:
            connection.execute(statement, parameters)

        self.store.commit(NO_RUN, 0, {}, extra_write=write)


def rebind_model(store: RowStore, model_hash: str) -> None:
    """Let a store be that of another model from now on, by its fingerprint: one made from the model it was of."""

    def write(connection: Connection) -> None:
        connection.execute(
            update(meta_table).where(meta_table.c.name == "model").values(value=model_hash)
        )

    store.commit(NO_RUN, 0, {}, extra_write=write)


def imported_namespaces(store: RowStore) -> set[str]:
    """Names of the namespaces into which all rows of a saved model's memory have been taken: from then on they count, not its."""
    with translate_errors(store.url), store.engine.connect() as connection:
        names = connection.execute(
            select(meta_table.c.name).where(
                meta_table.c.name.startswith(IMPORTED_PREFIX, autoescape=True)
            )
        ).scalars()
        return {name.removeprefix(IMPORTED_PREFIX) for name in names}


def mark_imported(connection: Connection, namespace: str) -> None:
    """Say so, in the transaction that takes them in."""
    connection.execute(
        insert(meta_table), {"name": f"{IMPORTED_PREFIX}{namespace}", "value": str(time.time())}
    )


def _build_insert(
    row_ids: IntArray,
    records: Sequence[FactRecord],
    entries: Sequence[tuple[FactRecord, FloatArray, FloatArray]],
) -> RowInsert:
    keys, values = (
        np.concatenate([entry[index] for entry in entries]).astype(np.float32) for index in (1, 2)
    )
    tags = [fact.tag for fact in records for _ in fact.rows]
    created = [fact.created for fact in records for _ in fact.rows]
    return RowInsert(
        row_ids, keys, values, np.ones(len(row_ids), np.float32), tags, created=created
    )


def _soft_delete(
    connection: Connection, fact_ids: list[int], reason: str, replaced_by: dict[int, int]
) -> None:
    now = time.time()
    fact_update = update(facts_table).where(
        facts_table.c.id == bindparam("number"), facts_table.c.deleted_reason.is_(None)
    )
    fact_update = fact_update.values(
        deleted_reason=reason, deleted_at=now, replaced_by=bindparam("by")
    )
    connection.execute(
        fact_update, [{"number": fact_id, "by": replaced_by.get(fact_id)} for fact_id in fact_ids]
    )
    row_update = update(states_table).where(
        states_table.c.id == bindparam("part"), states_table.c.deleted.is_(None)
    )
    row_update = row_update.values(deleted=reason, deleted_run=NO_RUN, deleted_step=0)
    for start in range(0, len(fact_ids), 500):
        row_ids = (
            connection.execute(
                select(fact_rows_table.c.row).where(
                    fact_rows_table.c.fact.in_(fact_ids[start : start + 500])
                )
            )
            .scalars()
            .all()
        )
        if row_ids:
            connection.execute(row_update, [{"part": row_id} for row_id in row_ids])


def _fact_columns(fact: FactRecord) -> dict[str, Any]:
    return {
        "id": fact.id,
        "prompt": fact.prompt,
        "answer": fact.answer,
        "subject": fact.subject,
        "tag": fact.tag,
        "source": fact.source,
        "created": fact.created,
        "subject_ids": json.dumps(fact.subject_ids),
        "answer_ids": json.dumps(fact.answer_ids),
    }


def _fact_record(row: Any, answer_rows: Sequence[Any]) -> FactRecord:
    return FactRecord(
        row.id,
        row.prompt,
        row.answer,
        row.subject,
        row.tag,
        row.source,
        row.created,
        tuple(tuple(token_ids) for token_ids in json.loads(row.subject_ids)),
        tuple(json.loads(row.answer_ids)),
        tuple(answer_row.row_id for answer_row in answer_rows),
        tuple(answer_row.threshold for answer_row in answer_rows),
        row.deleted_reason,
        row.deleted_at,
        row.replaced_by,
    )
