"""Schema of a store, its database engine, validation, error messages and the write lock.

The content of a row never changes. Its statistics are in a table of their own, where an update
moves few bytes. A deleted row is only marked, so that a run can be rewound to an earlier step.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
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

from dmt.errors import FailureError, UserError, WrongModelError
from dmt.files import check_version, disk_error_class
from dmt.paths import expand_home


class RawBytes(LargeBinary):
    """A binary column without conversion: both drivers take `bytes` directly."""

    cache_ok = True

    def bind_processor(self, dialect: Any) -> None:
        """Return None: values are passed on unchanged."""


ROW_ID_TYPE = BigInteger().with_variant(Integer, "sqlite")
SCHEMA_VERSION = 3  # of the tables below; other versions are refused

row_metadata = MetaData()

metadata_table = Table(
    "dmt_metadata",
    row_metadata,
    Column("name", String(40), primary_key=True),  # schema_version, model_fingerprint, ...
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
    # The only writer assigns the IDs, so that a row has its ID before it is on disk.
    Column("id", ROW_ID_TYPE, primary_key=True, autoincrement=False),
    Column("key", RawBytes, nullable=False),
    Column("value", RawBytes, nullable=False),
    Column("created", Float, nullable=False),  # seconds since 1970
    Column("tag", Text, nullable=False),
    Column("entries", Integer, nullable=False),  # insertions that were merged into this row
)

row_stats_table = Table(
    "dmt_row_stats",
    row_metadata,
    Column("id", ROW_ID_TYPE, primary_key=True, autoincrement=False),  # row ID
    Column("namespace", Integer, nullable=False),
    Column("run", String(80), nullable=False),
    Column("step", Integer, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("last_read", Float, nullable=True),  # seconds since 1970
    Column("reads", BigInteger, nullable=False),
    Column("score", Float, nullable=False),  # LRFU recency and frequency, as of `score_step`
    Column("score_step", Integer, nullable=False),
    # evicted, merged, forgotten, replaced or transferred; null while the row is active
    Column("deleted_reason", String(20), nullable=True),
    Column("deleted_run", String(80), nullable=True),
    Column("deleted_step", Integer, nullable=True),
    Index("dmt_row_stats_live", "namespace", "deleted_reason", "id"),
    Index("dmt_row_stats_written", "run", "step"),
    Index("dmt_row_stats_deleted", "deleted_run", "deleted_step"),
)

# Of the fact tables, which are created with the first fact; in `dmt_metadata` as `facts_version`.
FACTS_VERSION = 3

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
    Column("answer_ids", Text, nullable=False),  # JSON: token IDs
    # forgotten, replaced, evicted or transferred; null while the fact is active
    Column("deleted_reason", String(20), nullable=True),
    Column("deleted_at", Float, nullable=True),
    Column("replaced_by", ROW_ID_TYPE, nullable=True),
    # Of `FactRecord.subject_key`. A number, since an index of PostgreSQL takes no long text.
    Column("subject_hash", BigInteger, nullable=False),
    Column("subject_words", Integer, nullable=False),
    Column("search_text", Text, nullable=False),  # folded sentence and subject
    Index("dmt_facts_tag", "tag"),
    # Counts facts and lists their subjects without reading the table.
    Index("dmt_facts_subject", "subject_hash", "deleted_reason", "subject_words"),
    Index("dmt_facts_replaced_by", "replaced_by"),
)

fact_rows_table = Table(
    "dmt_fact_rows",
    fact_metadata,
    # A row of the namespace `facts`.
    Column("row_id", ROW_ID_TYPE, primary_key=True, autoincrement=False),
    Column("fact_id", ROW_ID_TYPE, nullable=False, index=True),
    Column("answer_position", Integer, nullable=False),  # index of the answer token it predicts
    Column("threshold", Float, nullable=False),
)

calibration_table = Table(
    "dmt_calibration",
    fact_metadata,
    Column("name", String(40), primary_key=True),
    Column("shape", Text, nullable=False),  # JSON: the type of the numbers, and the shape
    Column("data", RawBytes, nullable=False),
)

# In `dmt_metadata`: the fingerprint of the model that the rows belong to. Names that begin with it
# and an underscore hold those of the same model rounded to a type in which it may be saved.
FINGERPRINT = "model_fingerprint"

POSTGRESQL_DISK_FULL = "53100"  # SQLSTATE
BUSY_TIMEOUT = 30  # seconds that a connection waits for another one's transaction
DAMAGED_HINT = "the file is damaged; restore a copy, or give a new file"
# Bytes: several rows of 768 numbers fit. A third faster than SQLite's 4,096 (benchmarks/store.py).
PAGE_SIZE = 32_768


def create_store_engine(url: str, mode: str = "rwc") -> tuple[Engine, Path | None]:
    """Create an engine for a file or a database URL, without opening a connection.

    Each transaction has a connection of its own, so that none is shared with a forked process.

    Args:
        url: a file, or a database URL.
        mode: SQLite's: `ro` reads only, `rw` needs an existing file, `rwc` creates one.

    Returns:
        The engine, and the path of the database file; None for a database server.

    Raises:
        UserError: `url` is malformed, or its database or driver is not supported.
    """
    if "://" not in url:
        return _create_sqlite_engine(Path(url), mode)
    label = f"store {redact_url(url)}"
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise UserError(
                f"{label}: {backend} is not supported; give a file, sqlite:/// or postgresql://"
            )
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        if backend == "postgresql":
            connect_args = {"connect_timeout": 10}
            return create_engine(parsed, poolclass=NullPool, connect_args=connect_args), None
    except UserError:
        raise
    except (ArgumentError, NoSuchModuleError, ValueError):  # ValueError: the port is not a number
        raise UserError(
            f"{label}: not a file or a database URL; give a file, sqlite:/// or postgresql://"
        ) from None
    except ModuleNotFoundError:
        raise UserError(
            f"{label}: PostgreSQL needs a driver: "
            "pip install 'discrete-memory-transformers[postgresql]'"
        ) from None
    if not parsed.database or parsed.database == ":memory:":
        raise UserError(f"{label}: a store must outlive the program; give a file or postgresql://")
    return _create_sqlite_engine(Path(parsed.database), mode)


def _create_sqlite_engine(path: Path, mode: str) -> tuple[Engine, Path]:
    path = expand_home(path).absolute()  # once: the working directory may change later
    wal_path = path.with_name(f"{path.name}-wal")

    def open_connection() -> sqlite3.Connection:
        # SQLite has two files beside a database in use. The last connection removes them, but only
        # one that may write; so a reader opens the database for writing, and then writes nothing.
        # In a read-only folder the files cannot be made, and the database is opened as immutable.
        can_write = os.access(path.parent, os.W_OK)
        immutable = mode == "ro" and not can_write and not wal_path.exists()
        file_mode = "rw" if mode == "ro" and can_write else mode
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode={file_mode}{'&immutable=1' * immutable}",
            uri=True,
            timeout=BUSY_TIMEOUT,
        )
        if mode == "ro":
            connection.execute("PRAGMA query_only=ON")
        return connection

    engine = create_engine("sqlite+pysqlite://", creator=open_connection, poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def set_pragmas(connection: sqlite3.Connection, _: Any) -> None:
        connection.execute(f"PRAGMA page_size={PAGE_SIZE}")  # takes effect when a file is created
        # In WAL mode a killed program loses nothing that was committed.
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA secure_delete=ON")  # what is deleted is overwritten

    return engine, path


def redact_url(url: str) -> str:
    """Return `url` without its password, fit for messages."""
    try:
        return make_url(url).render_as_string(hide_password=True) if "://" in url else url
    except (ArgumentError, ValueError):
        return url


@contextmanager
def translate_errors(label: str) -> Iterator[None]:
    """Turn database errors into one line about the store `label`; a `FailureError` of the disk."""
    try:
        yield
    except UnicodeEncodeError as error:
        raise UserError(
            f"store {label}: {error.object[:40]!r} is no UTF-8 text, so that it can neither be "
            "stored nor searched for"
        ) from None
    except DBAPIError as error:
        raise _choose_error_class(error, label)(f"store {label}: {_explain_error(error)}") from None
    except SQLAlchemyError as error:
        raise UserError(f"store {label}: {str(error).splitlines()[0]}") from None


def _choose_error_class(error: DBAPIError, url: str) -> type[UserError]:
    if getattr(error.orig, "sqlstate", None) == POSTGRESQL_DISK_FULL:
        return FailureError
    return disk_error_class(error, Path(url.removeprefix("sqlite:///")))


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
    for pattern, hint in hints.items():
        if pattern in message:
            return f"{hint} ({message})"
    return message


def check_store(engine: Engine, label: str, model_hash: str | None) -> bool:
    """Check that a database is a store of this model, or empty.

    Args:
        engine: of the database.
        label: name of the store in messages.
        model_hash: fingerprint of the model that wants to use the store; None accepts any model.

    Returns:
        Whether the store exists already.

    Raises:
        WrongModelError: the database is no store, or the store of another model.
        UserError: the store has another version.
    """
    table_names = set(inspect(engine).get_table_names())
    if metadata_table.name not in table_names:
        if table_names:
            names = ", ".join(sorted(table_names)[:3])
            raise WrongModelError(
                f"store {label}: a database of something else (tables {names}); give a new file"
            )
        return False
    with engine.connect() as connection:
        metadata = {row.name: row.value for row in connection.execute(select(metadata_table))}
    check_version(
        metadata.get("schema_version"),
        SCHEMA_VERSION,
        f"store {label}: schema version",
        "use the dmt that made it, or give a new file and write again",
    )
    stored_hash = metadata.get(FINGERPRINT, "unknown")
    accepted = [value for name, value in metadata.items() if name.startswith(FINGERPRINT)]
    if model_hash is not None and model_hash not in accepted:
        raise WrongModelError(
            f"store {label}: its rows belong to another model ({stored_hash[:12]}, this one is "
            f"{model_hash[:12]}); give a new file"
        )
    return True


def compact_database(engine: Engine, label: str) -> None:
    """Write a database anew without what was deleted, so that no file holds it any longer.

    Raises:
        UserError: another program reads the database.
    """
    with translate_errors(label), engine.connect() as connection:
        if engine.dialect.name != "sqlite":
            connection.execution_options(isolation_level="AUTOCOMMIT")
            for name in set(inspect(engine).get_table_names()) & set(
                row_metadata.tables | fact_metadata.tables
            ):
                connection.exec_driver_sql(f"VACUUM (FULL) {name}")
            return
        connection.exec_driver_sql("VACUUM")
        is_busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
    if is_busy:
        raise UserError(
            f"store {label}: another program reads it, so that its files still hold what was "
            "deleted; close that program and do this again"
        )


def acquire_write_lock(label: str, path: Path | None, engine: Engine) -> Callable[[], None]:
    """Become the only writer of a store; the lock of a killed program is free again.

    Args:
        label: name of the store in messages.
        path: the database file; None for a database server.
        engine: of the database.

    Returns:
        A function that releases the lock.

    Raises:
        UserError: another program holds the lock, or the lock file cannot be created.
    """
    if path is not None:
        lock = FileLock(f"{path}.lock", mode=0o644, blocking=False, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"store {label}: another program is writing to it; wait for that, or give another "
                "file"
            ) from None
        except OSError as error:
            raise disk_error_class(error)(
                f"store {label}: it cannot be written to; make it and its folder writable, or give "
                f"another ({error.strerror})"
            ) from None
        return lock.release
    connection = engine.connect()
    if not connection.exec_driver_sql("SELECT pg_try_advisory_lock(7104133)").scalar():
        connection.close()
        raise UserError(
            f"store {label}: another program is writing to it; wait for that, or give another "
            "database"
        )
    connection.commit()
    return connection.close
