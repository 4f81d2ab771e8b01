"""From a place a person names to a database that is ours: opened, checked, or refused in one line.

Tables of a store. What a row is never changes; how it fares lies apart, where a change moves few bytes.

A row that leaves is only marked, so a run can be taken back.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from dmt.errors import UserError, WrongModelError
from dmt.files import check_version


class RawBytes(LargeBinary):
    """Bytes as they are: both databases take them, so nothing is wrapped on the way in, value by value."""

    cache_ok = True

    def bind_processor(self, dialect: Any) -> None:
        """None."""


ROW_ID_TYPE = BigInteger().with_variant(Integer, "sqlite")
SCHEMA_VERSION = 2
"""Of the tables below; a store of another version is refused."""

row_metadata = MetaData()

meta_table = Table(
    "dmt_about",
    row_metadata,
    Column("name", String(40), primary_key=True),  # schema, model, created
    Column("value", Text, nullable=False),
)

namespaces_table = Table(
    "dmt_namespaces",
    row_metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("name", String(200), nullable=False, unique=True),
    Column("key_width", Integer, nullable=False),
    Column("value_width", Integer, nullable=False),
    Column("value_dtype", String(10), nullable=False),  # float32 or float16; keys are float32
)

rows_table = Table(
    "dmt_rows",
    row_metadata,
    # Numbers are given out by the one writer, so that a row is known by its number before it is on disk.
    Column("id", ROW_ID_TYPE, primary_key=True, autoincrement=False),
    Column("key", RawBytes, nullable=False),
    Column("value", RawBytes, nullable=False),
    Column("created", Float, nullable=False),  # seconds since 1970
    Column("tag", Text, nullable=False),
    Column(
        "entries", Integer, nullable=False
    ),  # insertions that recombination has put into this row
)

states_table = Table(
    "dmt_states",
    row_metadata,
    Column("id", ROW_ID_TYPE, primary_key=True, autoincrement=False),  # the row's
    Column("namespace", Integer, nullable=False),
    Column("run", String(80), nullable=False),
    Column("step", Integer, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("last_read", Float, nullable=True),  # seconds since 1970
    Column("reads", BigInteger, nullable=False),
    Column(
        "score", Float, nullable=False
    ),  # LRFU's combined recency and frequency, as of `score_step`
    Column("score_step", Integer, nullable=False),
    Column(
        "deleted", String(20), nullable=True
    ),  # why it left: evicted, merged, forgotten, replaced; null: it is there
    Column("deleted_run", String(80), nullable=True),
    Column("deleted_step", Integer, nullable=True),
    Index("dmt_states_present", "namespace", "deleted", "id"),
    Index("dmt_states_written", "run", "step"),
    Index("dmt_states_deleted", "deleted_run", "deleted_step"),
)

FACTS_VERSION = 1
"""Of the tables of facts, which a store has from the first fact on; in `dmt_about` under `facts`."""

fact_metadata = MetaData()

facts_table = Table(
    "dmt_facts",
    fact_metadata,
    Column("id", ROW_ID_TYPE, primary_key=True, autoincrement=False),
    Column("prompt", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("tag", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("created", Float, nullable=False),  # seconds since 1970
    Column("subject_ids", Text, nullable=False),  # JSON: token ids of each way it is written
    Column("answer_ids", Text, nullable=False),  # JSON: token ids
    Column(
        "deleted_reason", String(20), nullable=True
    ),  # forgotten, replaced or evicted; null: it is there
    Column("deleted_at", Float, nullable=True),
    Column("replaced_by", ROW_ID_TYPE, nullable=True),
    Index("dmt_facts_tag", "tag"),
)

fact_rows_table = Table(
    "dmt_fact_rows",
    fact_metadata,
    Column(
        "row", ROW_ID_TYPE, primary_key=True, autoincrement=False
    ),  # a row of the namespace `facts`
    Column("fact", ROW_ID_TYPE, nullable=False, index=True),
    Column("said", Integer, nullable=False),  # tokens of the answer that are said before this one
    Column("reach", Float, nullable=False),
)

tensors_table = Table(
    "dmt_tensors",
    fact_metadata,
    Column("name", String(40), primary_key=True),
    Column("shape", Text, nullable=False),  # JSON
    Column("data", RawBytes, nullable=False),  # float32
)


BUSY_TIMEOUT = 30
"""How long a reader or writer waits for another one's transaction."""
DAMAGED_HINT = "the file is damaged; restore a copy, or give a new file"
PAGE_SIZE = 32_768
"""Bytes of an SQLite page: a row of 768 numbers fits several times (benchmarks/store.py: a third faster than the usual 4,096)."""


def create_store_engine(store_url: str, mode: str = "rwc") -> tuple[Engine, Path | None]:
    """An engine for a file or a database URL, and the file where it is one; nothing is opened yet.

    `mode` is SQLite's: `ro` to read only, `rw` for a file that is there, `rwc` to make one too.

    Connections are made for each transaction and closed after it, so that none is ever shared with a forked process.

    Raises:
        UserError: not a place that a store can be in.
    """
    if "://" not in store_url:
        return _create_sqlite_engine(Path(store_url), mode)
    raw_url, store_url = store_url, redact_url(store_url)
    try:
        url = make_url(raw_url)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise UserError(
                f"store {store_url}: {url.get_backend_name()} is not supported; give a file, sqlite:/// or postgresql://"
            )
        if url.get_backend_name() == "postgresql":
            return create_engine(
                url, poolclass=NullPool, connect_args={"connect_timeout": 10}
            ), None
    except UserError:
        raise
    except (ArgumentError, NoSuchModuleError, ValueError):  # of a port that is no number
        raise UserError(
            f"store {store_url}: not a file or a database URL; give a file, sqlite:/// or postgresql://"
        ) from None
    except ModuleNotFoundError:
        raise UserError(
            f"store {store_url}: PostgreSQL needs a driver: pip install 'dmt[postgresql]'"
        ) from None
    if not url.database or url.database == ":memory:":
        raise UserError(
            f"store {store_url}: a store outlives the program; give a file or postgresql://"
        )
    return _create_sqlite_engine(Path(url.database), mode)


def _create_sqlite_engine(path: Path, mode: str) -> tuple[Engine, Path]:
    path = path.expanduser().absolute()  # once: the program may go to another folder later
    wal_path = path.with_name(f"{path.name}-wal")

    def open_connection() -> sqlite3.Connection:
        # What lies where nothing can be written, and nobody is writing, is read as it is: SQLite would make files beside it.
        immutable = mode == "ro" and not wal_path.exists() and not os.access(path.parent, os.W_OK)
        return sqlite3.connect(
            f"{path.as_uri()}?mode={mode}{'&immutable=1' * immutable}",
            uri=True,
            timeout=BUSY_TIMEOUT,
        )

    engine = create_engine("sqlite+pysqlite://", creator=open_connection, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute(f"PRAGMA page_size={PAGE_SIZE}")  # heard when a file is made
        connection.execute(
            "PRAGMA synchronous=NORMAL"
        )  # in WAL mode a killed program loses nothing that was committed
        connection.execute("PRAGMA trusted_schema=OFF")

    return engine, path


def redact_url(store_url: str) -> str:
    """`place` as it may be shown to people: a URL without its password."""
    try:
        return (
            make_url(store_url).render_as_string(hide_password=True)
            if "://" in store_url
            else store_url
        )
    except (ArgumentError, ValueError):
        return store_url


@contextmanager
def translate_errors(store_url: str) -> Iterator[None]:
    """Turn what a database complains about into one line about `place`."""
    try:
        yield
    except DBAPIError as error:
        raise UserError(f"store {store_url}: {_explain_error(error)}") from None
    except SQLAlchemyError as error:
        raise UserError(f"store {store_url}: {str(error).splitlines()[0]}") from None


def _explain_error(error: DBAPIError) -> str:
    message = " ".join(str(error.orig).split())
    hints = {
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
        "no such table": DAMAGED_HINT,
        "no such column": DAMAGED_HINT,
        "malformed": DAMAGED_HINT,
    }
    return next(
        (f"{hint} ({message})" for pattern, hint in hints.items() if pattern in message), message
    )


def check_store(engine: Engine, store_url: str, model_hash: str | None) -> bool:
    """Whether there is a store already; `model` is the fingerprint of the model that wants to use it.

    Raises:
        UserError: something else is there, or a store of another version, or another model's.
    """
    table_names = set(inspect(engine).get_table_names())
    if meta_table.name not in table_names:
        if other_tables := sorted(table_names):
            raise WrongModelError(
                f"store {store_url}: a database of something else (tables {', '.join(other_tables[:3])}); give a new file"
            )
        return False
    with engine.connect() as connection:
        metadata = {row.name: row.value for row in connection.execute(select(meta_table))}
    remedy = "use the dmt that made it, or give a new file and write anew"
    check_version(
        metadata.get("schema"), SCHEMA_VERSION, f"store {store_url}: schema version", remedy
    )
    if model_hash is not None and (stored_hash := metadata.get("model", "nobody's")) != model_hash:
        raise WrongModelError(
            f"store {store_url}: its rows belong to another model ({stored_hash[:12]}, this one is {model_hash[:12]}); give a new file"
        )
    return True


def acquire_write_lock(store_url: str, path: Path | None, engine: Engine) -> Any:
    """Hold this until the program ends: the proof that nobody else writes. A killed program lets go of it.

    Raises:
        UserError: somebody else holds it.
    """
    if path is not None:
        import fcntl  # not on Windows, and then only there a clear failure

        try:
            descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise UserError(
                f"store {store_url}: it cannot be written to; make it and its folder writable, or give another ({error.strerror})"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise UserError(
                f"store {store_url}: another program is writing to it; wait for that, or give another file"
            ) from None
        return descriptor
    connection = engine.connect()
    if not connection.exec_driver_sql("SELECT pg_try_advisory_lock(7104133)").scalar():
        connection.close()
        raise UserError(
            f"store {store_url}: another program is writing to it; wait for that, or give another database"
        )
    connection.commit()
    return connection
