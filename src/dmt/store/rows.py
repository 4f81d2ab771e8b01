"""The store of associative rows: SQL tables that are written in whole steps."""

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
    FINGERPRINT,
    SCHEMA_VERSION,
    acquire_write_lock,
    check_store,
    compact_database,
    create_store_engine,
    metadata_table,
    namespaces_table,
    redact_url,
    row_metadata,
    row_stats_table,
    rows_table,
    translate_errors,
)
from dmt.store.records import (
    VALUE_DTYPES,
    IntArray,
    Namespace,
    RowBatch,
    RowInsert,
    RowUsage,
    StepChanges,
)

SCAN_ROWS = 2_000  # rows per query of a scan: small enough for their memory to be reused
ROW_QUERY = select(
    rows_table, *[column for column in row_stats_table.columns if column.name != "id"]
).join_from(rows_table, row_stats_table, rows_table.c.id == row_stats_table.c.id)
# Columns of `RowBatch.metadata`.
METADATA_COLUMNS = [
    column.name
    for column in ROW_QUERY.selected_columns
    if column.name not in ("id", "namespace", "key", "value")
]

StoreFactory = Callable[[str, "str | None", bool], "RowStore"]
_FACTORIES: dict[str, StoreFactory] = {}


def register_store(scheme: str, factory: StoreFactory) -> None:
    """Let `store.url=scheme://...` open a store of your own for the rows of a run.

    Facts stay in SQL.

    Args:
        scheme: what stands before `://`.
        factory: takes `url`, `model_hash` and `read_only` as `RowStore` does. It returns an object
            with the attributes `url`, `read_only` and `next_id`, and the methods
            `get_or_create_namespace`, `reserve_ids`, `commit`, `scan`, `count`, `rewind`, `purge`
            and `close` of `RowStore`.

    Raises:
        UserError: the scheme is no word, or belongs to SQL.
    """
    if not scheme.isidentifier() or scheme in ("sqlite", "postgresql"):
        raise UserError(f"scheme={scheme!r} is taken or not a word; choose another scheme")
    _FACTORIES[scheme] = factory


def open_store(url: str, model_hash: str | None = None, read_only: bool = False) -> RowStore:
    """Open a store of rows with the engine of its scheme, SQL if none is registered.

    Args:
        url: a file, or a database URL.
        model_hash: fingerprint of the model that the rows belong to; None opens the store of any.
        read_only: write nothing and take no lock.
    """
    scheme, separator, _ = url.partition("://")
    factory = _FACTORIES.get(scheme, RowStore) if separator else RowStore
    return factory(url, model_hash, read_only)


class RowStore:
    """Rows of all associative memories of one model, in an SQLite file or a PostgreSQL database.

    One program writes, any number read; readers see whole steps only.

    Args:
        url: a file, or a database URL (`sqlite:///file`, `postgresql://user@host/name`).
        model_hash: fingerprint of the model that the rows belong to; None opens the store of any.
        read_only: write nothing and take no lock.

    Raises:
        WrongModelError: the database is no store, or the store of another model.
        UserError: the database cannot be used, and why.
    """

    def __init__(self, url: str, model_hash: str | None = None, read_only: bool = False) -> None:
        self.engine, self.path = create_store_engine(
            url, "ro" if read_only else "rw" if model_hash is None else "rwc"
        )
        self.url, self.read_only = redact_url(url), read_only
        self._release_write_lock: Callable[[], None] | None = None
        self._writer_pid = os.getpid()
        must_exist = read_only or model_hash is None
        if must_exist and self.path is not None and not self.path.exists():
            raise UserError(f"store {self.url}: no store is there")
        with translate_errors(self.url):
            exists = check_store(self.engine, self.url, model_hash)
            if must_exist and not exists:
                raise UserError(f"store {self.url}: no store is there")
            if not read_only:
                self._release_write_lock = acquire_write_lock(self.url, self.path, self.engine)
                # The writer before this one may have created the tables meanwhile.
                exists = exists or check_store(self.engine, self.url, model_hash)
                if self.path is not None:
                    # Readers and the writer do not wait for each other; the mode stays in the file.
                    with self.engine.connect() as connection:
                        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            try:
                if not exists:
                    self._create_tables(str(model_hash))
                query = select(metadata_table.c.value).where(metadata_table.c.name == "next_row_id")
                with self.engine.connect() as connection:
                    self.next_id = int(connection.execute(query).scalar_one())
            except BaseException:
                self.close()
                raise

    def _create_tables(self, model_hash: str) -> None:
        metadata = {
            "schema_version": str(SCHEMA_VERSION),
            FINGERPRINT: model_hash,
            "created_at": str(time.time()),
            "next_row_id": "1",
        }
        with self.engine.begin() as connection:
            if self.path is not None:  # else each table would be a transaction of its own
                connection.exec_driver_sql("BEGIN")
            row_metadata.create_all(connection)
            connection.execute(
                insert(metadata_table),
                [{"name": name, "value": value} for name, value in metadata.items()],
            )

    def check_model(self, model_hash: str) -> None:
        """Check that the rows belong to the model with this fingerprint.

        Raises:
            WrongModelError: they belong to another one.
        """
        with translate_errors(self.url):
            check_store(self.engine, self.url, model_hash)

    def read_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of the rows' model, and those of its rounded weights, by name."""
        query = select(metadata_table).where(metadata_table.c.name.startswith(FINGERPRINT))
        with translate_errors(self.url), self.engine.connect() as connection:
            return {row.name: row.value for row in connection.execute(query)}

    def compact(self) -> None:
        """Write the database anew without what was deleted; no file holds it then.

        Raises:
            UserError: another program reads the database.
        """
        self._check_writable()
        compact_database(self.engine, self.url)

    def close(self) -> None:
        """Release the write lock. Everything was committed before."""
        if self._release_write_lock is None or self._writer_pid != os.getpid():
            return
        self._release_write_lock()
        self._release_write_lock = None

    def __repr__(self) -> str:
        return f"RowStore({self.url!r}, read_only={self.read_only})"

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_or_create_namespace(
        self, name: str, key_width: int, value_width: int, value_dtype: str = "float32"
    ) -> Namespace:
        """Return the namespace `name`; create it where it does not exist.

        Raises:
            UserError: it exists with other widths or another type.
        """
        expected = (key_width, value_width, value_dtype)
        for existing in self.list_namespaces():
            if existing.name != name:
                continue
            if (existing.key_width, existing.value_width, existing.value_dtype) != expected:
                raise UserError(
                    f"store {self.url}: {name} has keys of {existing.key_width} and values of "
                    f"{existing.value_width} numbers in {existing.value_dtype}, the memory "
                    f"{key_width} and {value_width} in {value_dtype}; give a new file"
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
        """Return all namespaces, in the order of their creation."""
        with translate_errors(self.url), self.engine.connect() as connection:
            return [
                Namespace(*record)
                for record in connection.execute(
                    select(namespaces_table).order_by(namespaces_table.c.id)
                )
            ]

    def reserve_ids(self, count: int) -> IntArray:
        """Return `(count,)` row IDs that no row has or had."""
        first, self.next_id = self.next_id, self.next_id + count
        return np.arange(first, first + count, dtype=np.int64)

    def commit(
        self,
        run: str,
        step: int,
        changes: dict[Namespace, StepChanges],
        extra_write: Callable[[Connection], None] | None = None,
    ) -> None:
        """Write all changes of a step, or none of them.

        Args:
            run: name of the run, by which `rewind` finds its changes.
            step: number of the step.
            changes: what changes in which namespace.
            extra_write: writes more in the same transaction.

        Raises:
            UserError: a number is not finite, or the database refuses; then nothing is written.
        """
        self._check_writable()
        inserts = [
            row
            for namespace, change in changes.items()
            for batch in change.inserts
            for row in self._build_rows(namespace, batch, run, step)
        ]
        removals = [
            {"row_id": int(row_id), "reason": reason, "in_run": run, "at_step": step}
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
                connection.execute(insert(row_stats_table), [stats for _, stats in inserts])
                # Stored beside the rows: the ID of a purged row is never reused.
                self._store_next_id(connection, self.next_id)
            if removals:
                connection.execute(
                    update(row_stats_table)
                    .where(
                        row_stats_table.c.id == bindparam("row_id"),
                        row_stats_table.c.deleted_reason.is_(None),
                    )
                    .values(
                        deleted_reason=bindparam("reason"),
                        deleted_run=bindparam("in_run"),
                        deleted_step=bindparam("at_step"),
                    ),
                    removals,
                )
            if usage_rows:
                connection.execute(
                    update(row_stats_table)
                    .where(row_stats_table.c.id == bindparam("row_id"))
                    .values(
                        reads=bindparam("new_reads"),
                        last_read=bindparam("new_last_read"),
                        score=bindparam("new_score"),
                        score_step=bindparam("new_score_step"),
                    ),
                    usage_rows,
                )
            if extra_write is not None:
                extra_write(connection)

    def _build_rows(
        self, namespace: Namespace, batch: RowInsert, run: str, step: int
    ) -> Iterator[tuple[dict[str, Any], ...]]:
        count = len(batch.ids)
        expected_widths = (
            ("keys", batch.keys, namespace.key_width),
            ("values", batch.values, namespace.value_width),
        )
        for name, array, width in expected_widths:
            if array.shape != (count, width):
                raise UserError(
                    f"store {self.url}: {name} of {namespace.name} must be {(count, width)}, got "
                    f"{array.shape}"
                )
        with np.errstate(over="ignore"):  # reported below, in one line
            keys = batch.keys.astype("<f4")
            values = batch.values.astype(VALUE_DTYPES[namespace.value_dtype])
        for name, stored in (("keys", keys), ("values", values), ("scores", batch.scores)):
            if not np.isfinite(stored).all():
                overflows = name == "values" and np.isfinite(batch.values).all()
                raise UserError(
                    f"store {self.url}: {name} of {namespace.name} are not finite"
                    f"{' in float16' if overflows else ''} at step {step}; nothing was written"
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
            stats = {
                "id": row_id,
                "namespace": namespace.id,
                "run": run,
                "step": step,
                "pinned": bool(pinned[i]),
                "reads": 0,
                "score": float(batch.scores[i]),
                "score_step": step,
            }
            yield row, stats

    def scan(self, namespace: Namespace, include_deleted: bool = False) -> Iterator[RowBatch]:
        """Yield all rows of a namespace in the order of their IDs, in batches of `SCAN_ROWS`.

        All batches are of the same moment, whatever is written meanwhile.

        Args:
            namespace: where to read.
            include_deleted: yield deleted rows too.
        """
        last_id = 0
        query = ROW_QUERY.where(row_stats_table.c.namespace == namespace.id)
        if not include_deleted:
            query = query.where(row_stats_table.c.deleted_reason.is_(None))
        with translate_errors(self.url), self.engine.connect() as connection:
            if self.path is not None:
                connection.exec_driver_sql("BEGIN")
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
            while True:
                batch_query = (
                    query.where(row_stats_table.c.id > last_id)
                    .order_by(row_stats_table.c.id)
                    .limit(SCAN_ROWS)
                )
                records = connection.execute(batch_query).all()
                if records:
                    yield self._build_batch(namespace, records)
                if len(records) < SCAN_ROWS:
                    return
                last_id = records[-1].id

    def get(self, namespace: Namespace, ids: Sequence[int] | IntArray) -> RowBatch:
        """Return the active rows with these IDs, in the order of the IDs."""
        records: list[Any] = []
        row_ids = [int(row_id) for row_id in ids]
        with translate_errors(self.url), self.engine.connect() as connection:
            for start in range(0, len(row_ids), SCAN_ROWS):
                id_filter = row_stats_table.c.id.in_(row_ids[start : start + SCAN_ROWS])
                query = ROW_QUERY.where(
                    row_stats_table.c.namespace == namespace.id,
                    row_stats_table.c.deleted_reason.is_(None),
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
                b"".join(columns["value"]), VALUE_DTYPES[namespace.value_dtype]
            ).reshape(count, namespace.value_width)
        except (ValueError, KeyError, TypeError) as error:  # a truncated row
            raise UserError(f"store {self.url}: {DAMAGED_HINT} ({error})") from None
        metadata = {name: list(columns[name]) for name in METADATA_COLUMNS}
        return RowBatch(
            np.array(columns["id"], np.int64),
            keys.astype(np.float32, copy=False),
            values.astype(np.float32, copy=False),
            metadata,
        )

    def count(self, namespace: Namespace) -> int:
        """Count the active rows of a namespace."""
        query = select(func.count()).where(
            row_stats_table.c.namespace == namespace.id, row_stats_table.c.deleted_reason.is_(None)
        )
        with translate_errors(self.url), self.engine.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def rewind(self, run: str, step: int) -> tuple[int, int]:
        """Undo what `run` changed after `step`.

        Where no other run has written since, the IDs of the erased rows are free again, so that a
        resumed run gives its rows the IDs that they would have had.

        Returns:
            How many rows were erased that it wrote, and how many restored that it deleted.
        """
        self._check_writable()
        is_later = and_(row_stats_table.c.run == run, row_stats_table.c.step > step)
        with translate_errors(self.url), self.engine.begin() as connection:
            first_id = connection.execute(
                select(func.min(row_stats_table.c.id)).where(is_later)
            ).scalar_one()
            erased = _erase_rows(connection, is_later)
            if first_id is not None and erased == self.next_id - first_id:
                self._store_next_id(connection, first_id)
            cleared = {"deleted_reason": None, "deleted_run": None, "deleted_step": None}
            restored = connection.execute(
                update(row_stats_table)
                .where(row_stats_table.c.deleted_run == run, row_stats_table.c.deleted_step > step)
                .values(cleared)
            )
        return erased, restored.rowcount

    def _store_next_id(self, connection: Connection, next_id: int) -> None:
        self.next_id = next_id
        connection.execute(
            update(metadata_table)
            .where(metadata_table.c.name == "next_row_id")
            .values(value=str(next_id))
        )

    def purge(self, run: str, step: int, other_runs: bool = True) -> int:
        """Erase deleted rows from the disk. No checkpoint before `step` can be resumed then.

        Args:
            run: erase rows that this run deleted up to `step`.
            step: the last step to erase.
            other_runs: erase rows that other runs deleted, too.

        Returns:
            How many rows were erased.
        """
        self._check_writable()
        condition = and_(
            row_stats_table.c.deleted_run == run, row_stats_table.c.deleted_step <= step
        )
        if other_runs:
            condition = or_(condition, row_stats_table.c.deleted_run != run)
        with translate_errors(self.url), self.engine.begin() as connection:
            return _erase_rows(
                connection, and_(row_stats_table.c.deleted_reason.is_not(None), condition)
            )

    def _check_writable(self) -> None:
        if self.read_only:
            raise UserError(f"store {self.url}: opened for reading only")
        if self._writer_pid != os.getpid():
            raise UserError(
                f"store {self.url}: opened by process {self._writer_pid}; a forked process reads "
                "only"
            )


def _erase_rows(connection: Connection, condition: ColumnElement[bool]) -> int:
    """Erase the rows whose statistics meet `condition`, and return how many."""
    connection.execute(
        delete(rows_table).where(rows_table.c.id.in_(select(row_stats_table.c.id).where(condition)))
    )
    return int(connection.execute(delete(row_stats_table).where(condition)).rowcount)


def _usage_rows(usage: RowUsage) -> Iterator[dict[str, Any]]:
    for i in range(len(usage.ids)):
        yield {
            "row_id": int(usage.ids[i]),
            "new_reads": int(usage.reads[i]),
            "new_last_read": float(usage.last_read[i]),
            "new_score": float(usage.scores[i]),
            "new_score_step": int(usage.score_steps[i]),
        }
