"""From a place a person names to a database that is ours: opened, checked, or refused in one line."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from dmt.errors import UserError
from dmt.store.schema import SCHEMA_VERSION, about
from dmt.versions import check_version

BUSY_SECONDS = 30
"""How long a reader or writer waits for another one's transaction."""
DAMAGED = "the file is damaged; restore a copy, or give a new file"
PAGE = 32_768
"""Bytes of an SQLite page: a row of 768 numbers fits several times (benchmarks/store.py: a third faster than the usual 4,096)."""


def engine_of(place: str, mode: str = "rwc") -> tuple[Engine, Path | None]:
    """An engine for a file or a database URL, and the file where it is one; nothing is opened yet.

    `mode` is SQLite's: `ro` to read only, `rw` for a file that is there, `rwc` to make one too.

    Connections are made for each transaction and closed after it, so that none is ever shared with a forked process.

    Raises:
        UserError: not a place that a store can be in.
    """
    if "://" not in place:
        return _sqlite(Path(place), mode)
    address, place = place, shown_place(place)
    try:
        url = make_url(address)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise UserError(f"store {place}: {url.get_backend_name()} is not supported; give a file, sqlite:/// or postgresql://")
        if url.get_backend_name() == "postgresql":
            return create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 10}), None
    except (ArgumentError, NoSuchModuleError, ValueError):  # of a port that is no number
        raise UserError(f"store {place}: not a file or a database URL; give a file, sqlite:/// or postgresql://") from None
    except ModuleNotFoundError:
        raise UserError(f"store {place}: PostgreSQL needs a driver: pip install 'dmt[postgresql]'") from None
    if not url.database or url.database == ":memory:":
        raise UserError(f"store {place}: a store outlives the program; give a file or postgresql://")
    return _sqlite(Path(url.database), mode)


def _sqlite(path: Path, mode: str) -> tuple[Engine, Path]:
    path = path.expanduser().absolute()  # once: the program may go to another folder later
    log = path.with_name(f"{path.name}-wal")

    def connect() -> sqlite3.Connection:
        # What lies where nothing can be written, and nobody is writing, is read as it is: SQLite would make files beside it.
        still = mode == "ro" and not log.exists() and not os.access(path.parent, os.W_OK)
        return sqlite3.connect(f"{path.as_uri()}?mode={mode}{'&immutable=1' * still}", uri=True, timeout=BUSY_SECONDS)

    engine = create_engine("sqlite+pysqlite://", creator=connect, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute(f"PRAGMA page_size={PAGE}")  # heard when a file is made
        connection.execute("PRAGMA synchronous=NORMAL")  # in WAL mode a killed program loses nothing that was committed
        connection.execute("PRAGMA trusted_schema=OFF")

    return engine, path


def shown_place(place: str) -> str:
    """`place` as it may be shown to people: a URL without its password."""
    try:
        return make_url(place).render_as_string(hide_password=True) if "://" in place else place
    except (ArgumentError, ValueError):
        return place


@contextmanager
def told(place: str) -> Iterator[None]:
    """Turn what a database complains about into one line about `place`."""
    try:
        yield
    except DBAPIError as error:
        raise UserError(f"store {place}: {_plainly(error)}") from None
    except SQLAlchemyError as error:
        raise UserError(f"store {place}: {str(error).splitlines()[0]}") from None


def _plainly(error: DBAPIError) -> str:
    said = " ".join(str(error.orig).split())
    advice = {
        "not a database": "this file is not a store; give another, or a new file to make one",
        "readonly": "it cannot be written to; make it and its folder writable, or give another",
        "full": "the disk is full; nothing of this step was written; make room and resume",
        "unable to open": "it cannot be opened; its folder must exist and be writable",
        "locked": "another program is writing to it; wait for that or give another file",
        "No space left": "the disk is full; nothing of this step was written; make room and resume",
        "authentication failed": "user or password are wrong",
        "does not exist": "there is no such database or user; make it, or give another",
        "connection": "the server does not answer; is it running, and the URL right?",
        "disk I/O error": "its disk is full, or cannot be written or read; make room and try again",
        "no such table": DAMAGED,
        "no such column": DAMAGED,
        "malformed": DAMAGED,
    }
    return next((f"{meaning} ({said})" for word, meaning in advice.items() if word in said), said)


def check(engine: Engine, place: str, model: str | None) -> bool:
    """Whether there is a store already; `model` is the fingerprint of the model that wants to use it.

    Raises:
        UserError: something else is there, or a store of another version, or another model's.
    """
    there = set(inspect(engine).get_table_names())
    if about.name not in there:
        if others := sorted(there):
            raise UserError(f"store {place}: a database of something else (tables {', '.join(others[:3])}); give a new file")
        return False
    with engine.connect() as connection:
        known = {row.name: row.value for row in connection.execute(select(about))}
    older = "use the dmt that made it, or give a new file and write anew"
    check_version(known.get("schema"), SCHEMA_VERSION, f"store {place}: schema version", older)
    if model is not None and (its := known.get("model", "nobody's")) != model:
        raise UserError(f"store {place}: its rows belong to another model ({its[:12]}, this one is {model[:12]}); give a new file")
    return True


def only_writer(place: str, path: Path | None, engine: Engine) -> Any:
    """Hold this until the program ends: the proof that nobody else writes. A killed program lets go of it.

    Raises:
        UserError: somebody else holds it.
    """
    if path is not None:
        import fcntl  # not on Windows, and then only there a clear failure

        try:
            held = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise UserError(
                f"store {place}: it cannot be written to; make it and its folder writable, or give another ({error.strerror})"
            ) from None
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)
            raise UserError(f"store {place}: another program is writing to it; wait for that, or give another file") from None
        return held
    connection = engine.connect()
    if not connection.exec_driver_sql("SELECT pg_try_advisory_lock(7104133)").scalar():
        connection.close()
        raise UserError(f"store {place}: another program is writing to it; wait for that, or give another database")
    connection.commit()
    return connection
