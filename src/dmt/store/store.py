"""The system of record of associative memories: rows in SQL, written in whole steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, func, insert, or_, select, update

from dmt.errors import UserError
from dmt.records import VALUE_TYPES, Changes, Insert, Namespace, Numbers, Page, Usage
from dmt.store.connect import DAMAGED, check, engine_of, only_writer, shown_place, told
from dmt.store.schema import SCHEMA_VERSION, about, namespaces, rows, states, tables

SCAN_ROWS = 2_000
"""Rows that a scan takes from the database at once: few enough for the memory they took to be used again by the next."""
STATE = [column for column in states.columns if column is not states.c.id]
WHOLE = select(rows, *STATE).join_from(rows, states, rows.c.id == states.c.id)
"""Rows with how they fare."""
ABOUT = [name for name in WHOLE.selected_columns.keys() if name not in ("id", "namespace", "key", "value")]  # noqa: SIM118
"""What is told of a row beside its number, key and value."""


class Store:
    """Rows of all associative memories of one model, in an SQLite file or a PostgreSQL database.

    One program writes, any number read; readers see whole steps only. Numbers of rows are given out by `take_ids`.

    Args:
        place: a file, or a database URL (`sqlite:///file`, `postgresql://user@host/name`).
        model: fingerprint of the model whose rows these are; None opens any model's, to look at it.
        read_only: nothing is written and nobody is kept from writing.

    Raises:
        UserError: the place cannot be used, and why.
    """

    def __init__(self, place: str, model: str | None = None, read_only: bool = False) -> None:
        self.engine, self.path = engine_of(place, "ro" if read_only else "rw" if model is None else "rwc")
        self.place, self.read_only = shown_place(place), read_only
        self._writer: Any = None
        self._writer_process = os.getpid()
        if (read_only or model is None) and self.path is not None and not self.path.exists():
            raise UserError(f"store {self.place}: no store is there")
        with told(self.place):
            there = check(self.engine, self.place, model)
            if not there and (read_only or model is None):
                raise UserError(f"store {self.place}: no store is there")
            if not read_only:
                self._writer = only_writer(self.place, self.path, self.engine)
                there = there or check(self.engine, self.place, model)  # whoever was writing may have made it meanwhile
                if self.path is not None:  # readers and the writer do not wait for each other; stays with the file
                    with self.engine.connect() as connection:
                        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            try:
                if not there:
                    self._create(str(model))
                with self.engine.connect() as connection:
                    given = connection.execute(select(about.c.value).where(about.c.name == "next_id")).scalar_one()
                    self.next_id = int(given)
                    """The number that the next row will have."""
            except BaseException:
                self.close()
                raise

    def _create(self, model: str) -> None:
        known = {"schema": str(SCHEMA_VERSION), "model": model, "created": str(time.time()), "next_id": "1"}
        with self.engine.begin() as connection:
            if self.path is not None:  # or each table would be a transaction of its own
                connection.exec_driver_sql("BEGIN")
            tables.create_all(connection)
            connection.execute(insert(about), [{"name": name, "value": value} for name, value in known.items()])

    def close(self) -> None:
        """Let others write. Nothing is lost without it."""
        if self._writer is None or self._writer_process != os.getpid():
            return
        if isinstance(self._writer, int):
            os.close(self._writer)
        else:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def namespace(self, name: str, key_width: int, value_width: int, value_type: str = "float32") -> Namespace:
        """The namespace of this name, made where it is not there yet.

        Raises:
            UserError: it is there with other widths or another type.
        """
        for known in self.namespaces():
            if known.name != name:
                continue
            if (known.key_width, known.value_width, known.value_type) != (key_width, value_width, value_type):
                raise UserError(
                    f"store {self.place}: {name} has keys of {known.key_width} and values of {known.value_width} numbers in "
                    f"{known.value_type}, the memory {key_width} and {value_width} in {value_type}; give a new file"
                )
            return known
        self._writes()
        made = Namespace(len(self.namespaces()) + 1, name, key_width, value_width, value_type)
        with told(self.place), self.engine.begin() as connection:
            shape = {"key_width": key_width, "value_width": value_width, "value_type": value_type}
            connection.execute(insert(namespaces), {"id": made.number, "name": name, **shape})
        return made

    def namespaces(self) -> list[Namespace]:
        """All of them, in the order in which they were made."""
        with told(self.place), self.engine.connect() as connection:
            return [Namespace(*found) for found in connection.execute(select(namespaces).order_by(namespaces.c.id))]

    def take_ids(self, count: int) -> Numbers:
        """Numbers that no row has or had, `(count,)`."""
        first, self.next_id = self.next_id, self.next_id + count
        return np.arange(first, first + count, dtype=np.int64)

    def commit(
        self, run: str, step: int, changes: dict[Namespace, Changes], also: Callable[[Connection], None] | None = None
    ) -> None:
        """Write all that a step did, to all namespaces, and what `also` writes, or nothing.

        Raises:
            UserError: a number that is not finite, or the database refuses; then nothing is written.
        """
        self._writes()
        inserts = [
            row for space, each in changes.items() for part in each.inserts for row in self._described(space, part, run, step)
        ]
        removed = [
            {"row": int(number), "why": why, "by": run, "at": step}
            for each in changes.values()
            for numbers, why in each.removals
            for number in numbers
        ]
        used = [row for each in changes.values() if each.usage is not None for row in _used(each.usage)]
        if not inserts and not removed and not used and also is None:
            return
        with told(self.place), self.engine.begin() as connection:
            if inserts:
                connection.execute(insert(rows), [row for row, _ in inserts])
                connection.execute(insert(states), [state for _, state in inserts])
                # Kept apart from the rows: a row that is purged or taken back leaves no number to be given out again.
                given = update(about).where(about.c.name == "next_id").values(value=str(self.next_id))
                connection.execute(given)
            if removed:
                leave = update(states).where(states.c.id == bindparam("row"), states.c.deleted.is_(None))
                connection.execute(
                    leave.values(deleted=bindparam("why"), deleted_run=bindparam("by"), deleted_step=bindparam("at")), removed
                )
            if used:
                use = update(states).where(states.c.id == bindparam("row"))
                connection.execute(
                    use.values(
                        reads=bindparam("times"),
                        last_read=bindparam("when"),
                        heat=bindparam("warmth"),
                        heat_step=bindparam("as_of"),
                    ),
                    used,
                )
            if also is not None:
                also(connection)

    def _described(self, space: Namespace, part: Insert, run: str, step: int) -> Iterator[tuple[dict[str, Any], ...]]:
        count = len(part.ids)
        for name, given, width in (("keys", part.keys, space.key_width), ("values", part.values, space.value_width)):
            if given.shape != (count, width):
                raise UserError(f"store {self.place}: {name} of {space.name} must be {(count, width)}, got {given.shape}")
        with np.errstate(over="ignore"):  # told below, in one line
            keys, values = part.keys.astype("<f4"), part.values.astype(VALUE_TYPES[space.value_type])
        for name, kept in (("keys", keys), ("values", values), ("heat", part.heat)):
            if not np.isfinite(kept).all():
                why = " in float16" if name == "values" and np.isfinite(part.values).all() else ""
                raise UserError(
                    f"store {self.place}: {name} of {space.name} are not finite{why} at step {step}; nothing was written"
                )
        now = time.time()
        tags = [part.tag] * count if isinstance(part.tag, str) else part.tag
        created = np.broadcast_to(np.asarray(now if part.created is None else part.created, np.float64), count)
        pinned = np.broadcast_to(np.asarray(part.pinned, bool), count)
        entries = np.ones(count, np.int64) if part.entries is None else part.entries
        for i in range(count):
            number = int(part.ids[i])
            row = {
                "id": number, "key": keys[i].tobytes(), "value": values[i].tobytes(),
                "created": float(created[i]), "tag": tags[i], "entries": int(entries[i]),
            }  # fmt: skip
            state = {
                "id": number, "namespace": space.number, "run": run, "step": step, "pinned": bool(pinned[i]),
                "reads": 0, "heat": float(part.heat[i]), "heat_step": step,
            }  # fmt: skip
            yield row, state

    def scan(self, space: Namespace, gone: bool = False) -> Iterator[Page]:
        """All rows of a namespace in the order of their numbers, some thousands at a time; with `gone`, those that left too.

        All of them as of one moment, whatever is written meanwhile.
        """
        last = 0
        there = WHOLE.where(states.c.namespace == space.number)
        if not gone:
            there = there.where(states.c.deleted.is_(None))
        with told(self.place), self.engine.connect() as connection:
            if self.path is not None:
                connection.exec_driver_sql("BEGIN")
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
            while True:
                page = there.where(states.c.id > last).order_by(states.c.id).limit(SCAN_ROWS)
                found = connection.execute(page).all()
                if found:
                    yield self._page(space, found)
                if len(found) < SCAN_ROWS:
                    return
                last = found[-1].id

    def get(self, space: Namespace, ids: Sequence[int] | Numbers) -> Page:
        """The rows of these numbers that are there, in the order of their numbers."""
        found: list[Any] = []
        wanted = [int(number) for number in ids]
        with told(self.place), self.engine.connect() as connection:
            for start in range(0, len(wanted), SCAN_ROWS):
                part = states.c.id.in_(wanted[start : start + SCAN_ROWS])
                there = WHOLE.where(states.c.namespace == space.number, states.c.deleted.is_(None), part)
                found += connection.execute(there).all()
        return self._page(space, sorted(found, key=lambda row: row.id))

    def _page(self, space: Namespace, found: Sequence[Any]) -> Page:
        count = len(found)
        names = list(WHOLE.selected_columns.keys())
        columns = dict(zip(names, zip(*found, strict=True) if count else ((),) * len(names), strict=True))
        try:
            keys = np.frombuffer(b"".join(columns["key"]), np.dtype("<f4")).reshape(count, space.key_width)
            values = np.frombuffer(b"".join(columns["value"]), VALUE_TYPES[space.value_type]).reshape(count, space.value_width)
        except (ValueError, KeyError, TypeError) as error:  # a row that is cut short
            raise UserError(f"store {self.place}: {DAMAGED} ({error})") from None
        described = {name: list(columns[name]) for name in ABOUT}
        return Page(
            np.array(columns["id"], np.int64),
            keys.astype(np.float32, copy=False),
            values.astype(np.float32, copy=False),
            described,
        )

    def count(self, space: Namespace) -> int:
        """Rows that are there."""
        there = select(func.count()).where(states.c.namespace == space.number, states.c.deleted.is_(None))
        with told(self.place), self.engine.connect() as connection:
            return int(connection.execute(there).scalar_one())

    def rewind(self, run: str, step: int) -> tuple[int, int]:
        """Undo what `run` did after `step`: rows it wrote are gone, rows it took away are back; how many of each."""
        self._writes()
        with told(self.place), self.engine.begin() as connection:
            written = _erase(connection, and_(states.c.run == run, states.c.step > step))
            back = {"deleted": None, "deleted_run": None, "deleted_step": None}
            restored = connection.execute(
                update(states).where(states.c.deleted_run == run, states.c.deleted_step > step).values(back)
            )
        return written, restored.rowcount

    def purge(self, run: str, step: int, others: bool = True) -> int:
        """Take rows off the disk that left up to `step` of this run or, with `others`, in another; how many.

        They cannot come back, so no checkpoint before that can be gone on from.
        """
        self._writes()
        before = and_(states.c.deleted_run == run, states.c.deleted_step <= step)
        if others:
            before = or_(before, states.c.deleted_run != run)
        with told(self.place), self.engine.begin() as connection:
            return _erase(connection, and_(states.c.deleted.is_not(None), before))

    def _writes(self) -> None:
        if self.read_only:
            raise UserError(f"store {self.place}: opened for reading only")
        if self._writer_process != os.getpid():
            raise UserError(f"store {self.place}: opened by process {self._writer_process}; a forked process reads only")


def _erase(connection: Connection, which: ColumnElement[bool]) -> int:
    """Take the rows of these states off the disk; how many."""
    connection.execute(delete(rows).where(rows.c.id.in_(select(states.c.id).where(which))))
    return int(connection.execute(delete(states).where(which)).rowcount)


def _used(usage: Usage) -> Iterator[dict[str, Any]]:
    for i in range(len(usage.ids)):
        yield {
            "row": int(usage.ids[i]), "times": int(usage.reads[i]), "when": float(usage.last_read[i]),
            "warmth": float(usage.heat[i]), "as_of": int(usage.heat_step[i]),
        }  # fmt: skip
