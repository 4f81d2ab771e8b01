"""Tables of a store. Rows are never changed but for how they are used: what leaves is marked, so a run can be taken back."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text

SCHEMA_VERSION = 1
"""Of the tables below; a store of another version is refused."""

tables = MetaData()

about = Table(
    "dmt_about",
    tables,
    Column("name", String(40), primary_key=True),  # schema, model, created
    Column("value", Text, nullable=False),
)

namespaces = Table(
    "dmt_namespaces",
    tables,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("name", String(200), nullable=False, unique=True),
    Column("key_width", Integer, nullable=False),
    Column("value_width", Integer, nullable=False),
    Column("value_type", String(10), nullable=False),  # float32 or float16; keys are float32
)

rows = Table(
    "dmt_rows",
    tables,
    # Numbers are given out by the one writer, so that a row is known by its number before it is on disk.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("namespace", Integer, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("value", LargeBinary, nullable=False),
    Column("created", Float, nullable=False),  # seconds since 1970
    Column("run", String(80), nullable=False),
    Column("step", Integer, nullable=False),
    Column("tag", Text, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("entries", Integer, nullable=False),  # insertions that recombination has put into this row
    Column("last_read", Float, nullable=True),  # seconds since 1970
    Column("reads", BigInteger, nullable=False),
    Column("heat", Float, nullable=False),  # LRFU's combined recency and frequency, as of `heat_step`
    Column("heat_step", Integer, nullable=False),
    Column("deleted", String(20), nullable=True),  # why it left: evicted, merged, forgotten, replaced; null: it is there
    Column("deleted_run", String(80), nullable=True),
    Column("deleted_step", Integer, nullable=True),
    Index("dmt_rows_present", "namespace", "deleted", "id"),
    Index("dmt_rows_written", "run", "step"),
)
