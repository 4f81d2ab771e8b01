"""The system of record of associative memories: rows in SQL, written in whole steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from dmt.errors import UserError
from dmt.store.database import (
    DAMAGED_HINT,
    SCHEMA_VERSION,
    acquire_write_lock,
    check_store,
    create_store_engine,
    meta_table,
    namespaces_table,
    redact_url,
    row_metadata,
    rows_table,
    states_table,
    translate_errors,
)
from dmt.store.records import (
    VALUE_TYPES,
    IntArray,
    Namespace,
    RowBatch,
    RowInsert,
    RowUsage,
    StepChanges,
)

SCAN_ROWS = 2_000
"""Rows that a scan takes from the database at once: few enough for the memory they took to be used again by the next."""
STATE_COLUMNS = [column for column in states_table.columns if column is not states_table.c.id]
ROW_QUERY = select(rows_table, *STATE_COLUMNS).join_from(
    rows_table, states_table, rows_table.c.id == states_table.c.id
)
"""Rows with how they fare."""
METADATA_COLUMNS = [
    name
    for name in ROW_QUERY.selected_columns.keys()
    if name not in ("id", "namespace", "key", "value")
]  # noqa: SIM118
"""What is told of a row beside its number, key and value."""


class RowStore:
    """Rows of all associative memories of one model, in an SQLite file or a PostgreSQL database.

    One program writes, any number read; readers see whole steps only. Numbers of rows are given out by `take_ids`.

    Args:
        place: a file, or a database URL (`sqlite:///file`, `postgresql://user@host/name`).
        model: fingerprint of the model whose rows these are; None opens any model's, to look at it.
        read_only: nothing is written and nobody is kept from writing.

    Raises:
        UserError: the place cannot be used, and why.
    """

    def __init__(self, url: str, model_hash: str | None = None, read_only: bool = False) -> None:
        self.engine, self.path = create_store_engine(
            url, "ro" if read_only else "rw" if model_hash is None else "rwc"
        )
        self.url, self.read_only = redact_url(url), read_only
        self._write_lock: Any = None
        self._writer_pid = os.getpid()
        if (read_only or model_hash is None) and self.path is not None and not self.path.exists():
            raise UserError(f"store {self.url}: no store is there")
        with translate_errors(self.url):
            exists = check_store(self.engine, self.url, model_hash)
            if not exists and (read_only or model_hash is None):
                raise UserError(f"store {self.url}: no store is there")
            if not read_only:
                self._write_lock = acquire_write_lock(self.url, self.path, self.engine)
                exists = exists or check_store(
                    self.engine, self.url, model_hash
                )  # whoever was writing may have made it meanwhile
                if (
                    self.path is not None
                ):  # readers and the writer do not wait for each other; stays with the file
                    with self.engine.connect() as connection:
                        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            try:
                if not exists:
                    self._create_tables(str(model_hash))
                with self.engine.connect() as connection:
                    stored_id = connection.execute(
                        select(meta_table.c.value).where(meta_table.c.name == "next_id")
                    ).scalar_one()
                    self.next_id = int(stored_id)
                    """The number that the next row will have."""
            except BaseException:
                self.close()
                raise

    def _create_tables(self, model_hash: str) -> None:
        metadata = {
            "schema": str(SCHEMA_VERSION),
            "model": model_hash,
            "created": str(time.time()),
            "next_id": "1",
        }
        with self.engine.begin() as connection:
            if self.path is not None:  # or each table would be a transaction of its own
                connection.exec_driver_sql("BEGIN")
            row_metadata.create_all(connection)
            connection.execute(
                insert(meta_table),
                [{"name": name, "value": value} for name, value in metadata.items()],
            )

    def close(self) -> None:
        """Let others write. Nothing is lost without it."""
        if self._write_lock is None or self._writer_pid != os.getpid():
            return
        if isinstance(self._write_lock, int):
            os.close(self._write_lock)
        else:
            self._write_lock.close()
        self._write_lock = None

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_or_create_namespace(
        self, name: str, key_width: int, value_width: int, value_dtype: str = "float32"
    ) -> Namespace:
        """The namespace of this name, made where it is not there yet.

        Raises:
            UserError: it is there with other widths or another type.
        """
        for existing in self.list_namespaces():
            if existing.name != name:
                continue
            if (existing.key_width, existing.value_width, existing.value_dtype) != (
                key_width,
                value_width,
                value_dtype,
            ):
                raise UserError(
                    f"store {self.url}: {name} has keys of {existing.key_width} and values of {existing.value_width} numbers in "
                    f"{existing.value_dtype}, the memory {key_width} and {value_width} in {value_dtype}; give a new file"
                )
            return existing
        self._check_writable()
        created = Namespace(
            len(self.list_namespaces()) + 1, name, key_width, value_width, value_dtype
        )
        with translate_errors(self.url), self.engine.begin() as connection:
            shape = {"key_width": key_width, "value_width": value_width, "value_dtype": value_dtype}
            connection.execute(insert(namespaces_table), {"id": created.id, "name": name, **shape})
        return created

    def list_namespaces(self) -> list[Namespace]:
        """All of them, in the order in which they were made."""
        with translate_errors(self.url), self.engine.connect() as connection:
            return [
                Namespace(*record)
                for record in connection.execute(
                    select(namespaces_table).order_by(namespaces_table.c.id)
                )
            ]

    def reserve_ids(self, count: int) -> IntArray:
        """Numbers that no row has or had, `(count,)`."""
        first, self.next_id = self.next_id, self.next_id + count
        return np.arange(first, first + count, dtype=np.int64)

    def commit(
        self,
        run: str,
        step: int,
        changes: dict[Namespace, StepChanges],
        extra_write: Callable[[Connection], None] | None = None,
    ) -> None:
        """Write all that a step did, to all namespaces, and what `also` writes, or nothing.

        Raises:
            UserError: a number that is not finite, or the database refuses; then nothing is written.
        """
        self._check_writable()
        inserts = [
            row
            for namespace, change in changes.items()
            for batch in change.inserts
            for row in self._build_rows(namespace, batch, run, step)
        ]
        removals = [
            {"row": int(row_id), "why": reason, "by": run, "at": step}
            for change in changes.values()
            for row_ids, reason in change.removals
            for row_id in row_ids
        ]
        usage_rows = [
            row
            for change in changes.values()
            if change.usage is not None
            for row in _usage_rows(change.usage)
        ]
        if not inserts and not removals and not usage_rows and extra_write is None:
            return
        with translate_errors(self.url), self.engine.begin() as connection:
            if inserts:
                connection.execute(insert(rows_table), [row for row, _ in inserts])
                connection.execute(insert(states_table), [state for _, state in inserts])
                # Kept apart from the rows: a row that is purged or taken back leaves no number to be given out again.
                next_id_update = (
                    update(meta_table)
                    .where(meta_table.c.name == "next_id")
                    .values(value=str(self.next_id))
                )
                connection.execute(next_id_update)
            if removals:
                removal_update = update(states_table).where(
                    states_table.c.id == bindparam("row"), states_table.c.deleted.is_(None)
                )
                connection.execute(
                    removal_update.values(
                        deleted=bindparam("why"),
                        deleted_run=bindparam("by"),
                        deleted_step=bindparam("at"),
                    ),
                    removals,
                )
            if usage_rows:
                usage_update = update(states_table).where(states_table.c.id == bindparam("row"))
                connection.execute(
                    usage_update.values(
                        reads=bindparam("times"),
                        last_read=bindparam("when"),
                        score=bindparam("warmth"),
                        score_step=bindparam("as_of"),
                    ),
                    usage_rows,
                )
            if extra_write is not None:
                extra_write(connection)

    def _build_rows(
        self, namespace: Namespace, batch: RowInsert, run: str, step: int
    ) -> Iterator[tuple[dict[str, Any], ...]]:
        count = len(batch.ids)
        for name, array, width in (
            ("keys", batch.keys, namespace.key_width),
            ("values", batch.values, namespace.value_width),
        ):
            if array.shape != (count, width):
                raise UserError(
                    f"store {self.url}: {name} of {namespace.name} must be {(count, width)}, got {array.shape}"
                )
        with np.errstate(over="ignore"):  # told below, in one line
            keys, values = (
                batch.keys.astype("<f4"),
                batch.values.astype(VALUE_TYPES[namespace.value_dtype]),
            )
        for name, stored in (("keys", keys), ("values", values), ("score", batch.scores)):
            if not np.isfinite(stored).all():
                suffix = (
                    " in float16" if name == "values" and np.isfinite(batch.values).all() else ""
                )
                raise UserError(
                    f"store {self.url}: {name} of {namespace.name} are not finite{suffix} at step {step}; nothing was written"
                )
        now = time.time()
        tags = [batch.tag] * count if isinstance(batch.tag, str) else batch.tag
        created = np.broadcast_to(
            np.asarray(now if batch.created is None else batch.created, np.float64), count
        )
        pinned = np.broadcast_to(np.asarray(batch.pinned, bool), count)
        entries = np.ones(count, np.int64) if batch.entries is None else batch.entries
        for i in range(count):
            row_id = int(batch.ids[i])
            row = {
                "id": row_id,
                "key": keys[i].tobytes(),
                "value": values[i].tobytes(),
                "created": float(created[i]),
                "tag": tags[i],
                "entries": int(entries[i]),
            }
            state = {
                "id": row_id,
                "namespace": namespace.id,
                "run": run,
                "step": step,
                "pinned": bool(pinned[i]),
                "reads": 0,
                "score": float(batch.scores[i]),
                "score_step": step,
            }
            yield row, state

    def scan(self, namespace: Namespace, include_deleted: bool = False) -> Iterator[RowBatch]:
        """All rows of a namespace in the order of their numbers, some thousands at a time; with `gone`, those that left too.

        All of them as of one moment, whatever is written meanwhile.
        """
        last_id = 0
        query = ROW_QUERY.where(states_table.c.namespace == namespace.id)
        if not include_deleted:
            query = query.where(states_table.c.deleted.is_(None))
        with translate_errors(self.url), self.engine.connect() as connection:
            if self.path is not None:
                connection.exec_driver_sql("BEGIN")
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
            while True:
                batch_query = (
                    query.where(states_table.c.id > last_id)
                    .order_by(states_table.c.id)
                    .limit(SCAN_ROWS)
                )
                records = connection.execute(batch_query).all()
                if records:
                    yield self._build_batch(namespace, records)
                if len(records) < SCAN_ROWS:
                    return
                last_id = records[-1].id

    def get(self, namespace: Namespace, ids: Sequence[int] | IntArray) -> RowBatch:
        """The rows of these numbers that are there, in the order of their numbers."""
        records: list[Any] = []
        row_ids = [int(row_id) for row_id in ids]
        with translate_errors(self.url), self.engine.connect() as connection:
            for start in range(0, len(row_ids), SCAN_ROWS):
                id_filter = states_table.c.id.in_(row_ids[start : start + SCAN_ROWS])
                query = ROW_QUERY.where(
                    states_table.c.namespace == namespace.id,
                    states_table.c.deleted.is_(None),
                    id_filter,
                )
                records += connection.execute(query).all()
        return self._build_batch(namespace, sorted(records, key=lambda row: row.id))

    def _build_batch(self, namespace: Namespace, records: Sequence[Any]) -> RowBatch:
        count = len(records)
        names = list(ROW_QUERY.selected_columns.keys())
        columns = dict(
            zip(names, zip(*records, strict=True) if count else ((),) * len(names), strict=True)
        )
        try:
            keys = np.frombuffer(b"".join(columns["key"]), np.dtype("<f4")).reshape(
                count, namespace.key_width
            )
            values = np.frombuffer(
                b"".join(columns["value"]), VALUE_TYPES[namespace.value_dtype]
            ).reshape(count, namespace.value_width)
        except (ValueError, KeyError, TypeError) as error:  # a row that is cut short
            raise UserError(f"store {self.url}: {DAMAGED_HINT} ({error})") from None
        metadata = {name: list(columns[name]) for name in METADATA_COLUMNS}
        return RowBatch(
            np.array(columns["id"], np.int64),
            keys.astype(np.float32, copy=False),
            values.astype(np.float32, copy=False),
            metadata,
        )

    def count(self, namespace: Namespace) -> int:
        """Rows that are there."""
        query = select(func.count()).where(
            states_table.c.namespace == namespace.id, states_table.c.deleted.is_(None)
        )
        with translate_errors(self.url), self.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def rewind(self, run: str, step: int) -> tuple[int, int]:
        """Undo what `run` did after `step`: rows it wrote are gone, rows it took away are back; how many of each."""
        self._check_writable()
        with translate_errors(self.url), self.engine.begin() as connection:
            erased = _erase_rows(
                connection, and_(states_table.c.run == run, states_table.c.step > step)
            )
            cleared = {"deleted": None, "deleted_run": None, "deleted_step": None}
            restored = connection.execute(
                update(states_table)
                .where(states_table.c.deleted_run == run, states_table.c.deleted_step > step)
                .values(cleared)
            )
        return erased, restored.rowcount

    def purge(self, run: str, step: int, other_runs: bool = True) -> int:
        """Take rows off the disk that left up to `step` of this run or, with `others`, in another; how many.

        They cannot come back, so no checkpoint before that can be gone on from.
        """
        self._check_writable()
        condition = and_(states_table.c.deleted_run == run, states_table.c.deleted_step <= step)
        if other_runs:
            condition = or_(condition, states_table.c.deleted_run != run)
        with translate_errors(self.url), self.engine.begin() as connection:
            return _erase_rows(connection, and_(states_table.c.deleted.is_not(None), condition))

    def _check_writable(self) -> None:
        if self.read_only:
            raise UserError(f"store {self.url}: opened for reading only")
        if self._writer_pid != os.getpid():
            raise UserError(
                f"store {self.url}: opened by process {self._writer_pid}; a forked process reads only"
            )


def _erase_rows(connection: Connection, condition: ColumnElement[bool]) -> int:
    """Take the rows of these states off the disk; how many."""
    connection.execute(
        delete(rows_table).where(rows_table.c.id.in_(select(states_table.c.id).where(condition)))
    )
    return int(connection.execute(delete(states_table).where(condition)).rowcount)


def _usage_rows(usage: RowUsage) -> Iterator[dict[str, Any]]:
    for i in range(len(usage.ids)):
        yield {
            "row": int(usage.ids[i]),
            "times": int(usage.reads[i]),
            "when": float(usage.last_read[i]),
            "warmth": float(usage.scores[i]),
            "as_of": int(usage.score_steps[i]),
        }
