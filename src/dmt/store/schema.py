"""Tables of a store. What a row is never changes; how it fares lies apart, where a change moves few bytes.

A row that leaves is only marked, so a run can be taken back.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text


class Bytes(LargeBinary):
    """Bytes as they are: both databases take them, so nothing is wrapped on the way in, value by value."""

    cache_ok = True

    def bind_processor(self, dialect: Any) -> None:
        """None."""


ROW_NUMBER = BigInteger().with_variant(Integer, "sqlite")
SCHEMA_VERSION = 2
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
    Column("id", ROW_NUMBER, primary_key=True, autoincrement=False),
    Column("key", Bytes, nullable=False),
    Column("value", Bytes, nullable=False),
    Column("created", Float, nullable=False),  # seconds since 1970
    Column("tag", Text, nullable=False),
    Column("entries", Integer, nullable=False),  # insertions that recombination has put into this row
)

states = Table(
    "dmt_states",
    tables,
    Column("id", ROW_NUMBER, primary_key=True, autoincrement=False),  # the row's
    Column("namespace", Integer, nullable=False),
    Column("run", String(80), nullable=False),
    Column("step", Integer, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("last_read", Float, nullable=True),  # seconds since 1970
    Column("reads", BigInteger, nullable=False),
    Column("heat", Float, nullable=False),  # LRFU's combined recency and frequency, as of `heat_step`
    Column("heat_step", Integer, nullable=False),
    Column("deleted", String(20), nullable=True),  # why it left: evicted, merged, forgotten, replaced; null: it is there
    Column("deleted_run", String(80), nullable=True),
    Column("deleted_step", Integer, nullable=True),
    Index("dmt_states_present", "namespace", "deleted", "id"),
    Index("dmt_states_written", "run", "step"),
    Index("dmt_states_deleted", "deleted_run", "deleted_step"),
)

FACTS_VERSION = 1
"""Of the tables of facts, which a store has from the first fact on; in `dmt_about` under `facts`."""

fact_tables = MetaData()

facts = Table(
    "dmt_facts",
    fact_tables,
    Column("id", ROW_NUMBER, primary_key=True, autoincrement=False),
    Column("prompt", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("tag", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("created", Float, nullable=False),  # seconds since 1970
    Column("subject_ids", Text, nullable=False),  # JSON: token ids of each way it is written
    Column("answer_ids", Text, nullable=False),  # JSON: token ids
    Column("gone", String(20), nullable=True),  # forgotten, replaced or evicted; null: it is there
    Column("gone_at", Float, nullable=True),
    Column("replaced_by", ROW_NUMBER, nullable=True),
    Index("dmt_facts_tag", "tag"),
)

fact_rows = Table(
    "dmt_fact_rows",
    fact_tables,
    Column("row", ROW_NUMBER, primary_key=True, autoincrement=False),  # a row of the namespace `facts`
    Column("fact", ROW_NUMBER, nullable=False, index=True),
    Column("said", Integer, nullable=False),  # tokens of the answer that are said before this one
    Column("reach", Float, nullable=False),
)

tensors = Table(
    "dmt_tensors",
    fact_tables,
    Column("name", String(40), primary_key=True),
    Column("shape", Text, nullable=False),  # JSON
    Column("data", Bytes, nullable=False),  # float32
)
