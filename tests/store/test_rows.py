"""The row store, in SQLite and PostgreSQL: atomic steps, rewinding, locks and errors."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from dmt.errors import UserError
from dmt.store import RowInsert, RowStore, RowUsage, StepChanges, rows
from dmt.store.database import fact_metadata, row_metadata, translate_errors
from dmt.store.rows import open_store, register_store

MODEL = "f" * 64


@pytest.fixture(scope="module")
def postgresql():
    """Start a PostgreSQL server on loopback; return its URL."""
    if shutil.which("pg_virtualenv") is None:
        pytest.skip(
            "PostgreSQL is tested where Debian's postgresql-common is installed "
            "(apt-get install postgresql)"
        )
    script = "echo $PGUSER:$PGPASSWORD@$PGHOST:$PGPORT; read line"
    server = subprocess.Popen(
        ["pg_virtualenv", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = iter(server.stdout.readline, "")
    address = next((line.strip() for line in lines if "@" in line), None)
    if address is None:
        server.communicate(timeout=60)  # open pipes would fail a later test
        pytest.skip("pg_virtualenv starts no server; Debian's package postgresql may be missing")
    yield f"postgresql://{address}/postgres"
    server.communicate("\n", timeout=60)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request, tmp_path):
    if request.param == "sqlite":
        yield str(tmp_path / "rows.db")
        return
    url = request.getfixturevalue("postgresql")
    yield url
    from sqlalchemy import create_engine

    engine = create_engine(url.replace("postgresql", "postgresql+psycopg"))
    for tables in (row_metadata, fact_metadata):
        tables.drop_all(engine)
    engine.dispose()


def make_rows(store, count, seed=0, key_width=4, value_width=6, **options):
    rng = np.random.default_rng(seed)
    keys, values = (
        rng.normal(size=(count, width)).astype(np.float32) for width in (key_width, value_width)
    )
    return RowInsert(store.reserve_ids(count), keys, values, np.ones(count, np.float32), **options)


def read_rows(store, namespace, include_deleted=False):
    pages = list(store.scan(namespace, include_deleted))
    return {
        int(n): (k, v)
        for page in pages
        for n, k, v in zip(page.ids, page.keys, page.values, strict=True)
    }


def test_written_rows_are_read_back(store_url):
    with RowStore(store_url, MODEL) as store:
        first, second = (
            store.get_or_create_namespace("layer_0", 4, 6),
            store.get_or_create_namespace("layer_1", 4, 6, "float16"),
        )
        batches = {
            namespace: make_rows(store, 7, seed, tag="a tag", pinned=True)
            for seed, namespace in enumerate((first, second))
        }
        store.commit(
            "run", 3, {namespace: StepChanges([batch]) for namespace, batch in batches.items()}
        )
    with RowStore(store_url, MODEL) as store:
        assert [namespace.name for namespace in store.list_namespaces()] == ["layer_0", "layer_1"]
        for namespace, batch in batches.items():
            page = next(store.scan(namespace))
            assert page.ids.tolist() == batch.ids.tolist()
            np.testing.assert_array_equal(page.keys, batch.keys)
            dtype = np.float16 if namespace.value_dtype == "float16" else np.float32
            np.testing.assert_array_equal(
                page.values, batch.values.astype(dtype).astype(np.float32)
            )
            assert page.metadata["tag"] == ["a tag"] * 7
            assert page.metadata["pinned"] == [True] * 7
            assert page.metadata["step"] == [3] * 7
            assert store.count(namespace) == 7
        assert store.get(first, [3, 1, 99]).ids.tolist() == [1, 3]
        assert store.reserve_ids(2).tolist() == [15, 16]


def test_scan_returns_pages(store_url, monkeypatch):
    monkeypatch.setattr("dmt.store.rows.SCAN_ROWS", 3)
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        batch = make_rows(store, 9)
        store.commit("run", 1, {namespace: StepChanges([batch])})
        assert [len(page.ids) for page in store.scan(namespace)] == [3, 3, 3]
        assert store.get(namespace, batch.ids).ids.tolist() == batch.ids.tolist()


def test_usage_is_that_of_the_last_commit(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        batch = make_rows(store, 3)
        store.commit("run", 1, {namespace: StepChanges([batch])})
        for step in (2, 3):
            scores, steps = np.float32([0.5, 2]), np.array([step, step])
            usage = RowUsage(
                batch.ids[:2], np.array([5, 1]), np.array([10.0, 20.0]) * step, scores, steps
            )
            store.commit("run", step, {namespace: StepChanges(usage=usage)})
        metadata = next(store.scan(namespace)).metadata
        assert metadata["reads"] == [5, 1, 0]
        assert metadata["last_read"] == [30.0, 60.0, None]
        assert metadata["score"] == [0.5, 2.0, 1.0]
        assert metadata["score_step"] == [3, 3, 1]


def read_ids(store):
    """Return the IDs of all stored rows, also removed ones; check that their states exist."""
    with store.engine.connect() as connection:
        rows, states = (
            {number for (number,) in connection.exec_driver_sql(f"SELECT id FROM {table}")}
            for table in ("dmt_rows", "dmt_row_stats")
        )
    assert rows == states
    return rows


def test_a_run_is_rewound_to_a_step(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        old, early, late = (make_rows(store, 2, seed) for seed in range(3))
        store.commit("other", 100, {namespace: StepChanges([old])})
        store.commit("run", 1, {namespace: StepChanges([early])})
        before = read_rows(store, namespace)
        store.commit(
            "run",
            2,
            {namespace: StepChanges([late], [(old.ids[:1], "evicted"), (early.ids, "merged")])},
        )
        store.commit("run", 3, {namespace: StepChanges(removals=[(late.ids, "evicted")])})
        assert set(read_rows(store, namespace)) == {int(old.ids[1])}
        assert store.rewind("run", 1) == (2, 3)
        assert read_ids(store) == {*old.ids.tolist(), *early.ids.tolist()}
        after = read_rows(store, namespace)
        assert after.keys() == before.keys()
        for row_id, (key, value) in before.items():
            np.testing.assert_array_equal(after[row_id][0], key)
            np.testing.assert_array_equal(after[row_id][1], value)
        assert store.rewind("run", 1) == (0, 0)


def test_purge_deletes_only_removed_rows(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        batch = make_rows(store, 4)
        store.commit("run", 1, {namespace: StepChanges([batch])})
        store.commit("run", 2, {namespace: StepChanges(removals=[(batch.ids[:1], "evicted")])})
        store.commit("run", 5, {namespace: StepChanges(removals=[(batch.ids[1:2], "evicted")])})
        assert store.purge("run", 2) == 1
        assert read_ids(store) == set(batch.ids[1:].tolist())
        assert sorted(read_rows(store, namespace, include_deleted=True)) == batch.ids[1:].tolist()
        store.rewind("run", 2)
        assert sorted(read_rows(store, namespace)) == batch.ids[1:].tolist()


@pytest.mark.parametrize("field", ["keys", "values"])
def test_a_step_is_written_completely_or_not_at_all(store_url, field):
    with RowStore(store_url, MODEL) as store:
        namespaces = [store.get_or_create_namespace(f"layer_{i}", 4, 6) for i in range(2)]
        good, bad = make_rows(store, 3), make_rows(store, 3)
        getattr(bad, field)[1, 2] = np.nan
        with pytest.raises(UserError, match=f"{field} of layer_1 are not finite at step 4"):
            store.commit(
                "run", 4, {namespaces[0]: StepChanges([good]), namespaces[1]: StepChanges([bad])}
            )
        duplicate = RowInsert(good.ids, good.keys, good.values, good.scores)
        store.commit("run", 5, {namespaces[0]: StepChanges([good])})
        with pytest.raises(UserError):
            store.commit(
                "run",
                6,
                {
                    namespaces[1]: StepChanges([make_rows(store, 2)]),
                    namespaces[0]: StepChanges([duplicate]),
                },
            )
        assert store.count(namespaces[0]) == 3
        assert store.count(namespaces[1]) == 0


def test_quotes_and_sql_in_names_and_tags_are_stored_unchanged(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer'; DROP TABLE dmt_rows; --", 4, 6)
        tag = "Robert'); DELETE FROM dmt_rows; -- \N{SNOWMAN} %s :row"
        store.commit("run' OR 1=1", 1, {namespace: StepChanges([make_rows(store, 2, tag=tag)])})
        assert next(store.scan(namespace)).metadata["tag"] == [tag, tag]
        assert store.rewind("x' OR '1'='1", 0) == (0, 0)


def test_readers_see_whole_steps_while_one_writes(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        reader = RowStore(store_url, read_only=True)
        store.commit("run", 1, {namespace: StepChanges([make_rows(store, 5)])})
        assert reader.count(namespace) == 5
        with pytest.raises(UserError, match="for reading only"):
            reader.commit("run", 2, {})
        with pytest.raises(UserError, match="another program is writing"):
            RowStore(store_url, MODEL)
    RowStore(store_url, MODEL).close()


def test_stores_of_other_shapes_models_or_versions_are_rejected(store_url):
    with pytest.raises(UserError, match="no store is there"):
        RowStore(store_url, read_only=False)
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        with pytest.raises(
            UserError, match=r"keys of 4 and values of 6 numbers in float32, the memory 8 and 6"
        ):
            store.get_or_create_namespace("layer_0", 8, 6)
        with pytest.raises(
            UserError, match=r"keys of 4 and values of 6 numbers in float32, the memory 4 and 8"
        ):
            store.get_or_create_namespace("layer_0", 4, 8)
        with pytest.raises(UserError, match=r"keys of layer_0 must be \(3, 4\), got \(3, 5\)"):
            store.commit("run", 1, {namespace: StepChanges([make_rows(store, 3, key_width=5)])})
    with pytest.raises(UserError, match="belong to another model"):
        RowStore(store_url, "a" * 64)
    with RowStore(store_url, MODEL) as store, store.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE dmt_metadata SET value = '99' WHERE name = 'schema_version'"
        )
    with pytest.raises(UserError, match="schema version 99, this dmt knows 3"):
        RowStore(store_url, MODEL)


def test_files_and_urls_that_are_no_store_are_rejected(tmp_path):
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 40)
    with pytest.raises(UserError, match="not a store"):
        RowStore(str(tmp_path / "text.db"), MODEL)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE recipes (id)")
    other.close()
    with pytest.raises(UserError, match=r"something else \(tables recipes\)"):
        RowStore(str(tmp_path / "other.db"), MODEL)
    with pytest.raises(UserError, match="cannot be opened"):
        RowStore(str(tmp_path / "nowhere" / "rows.db"), MODEL)
    with pytest.raises(UserError, match="outlive the program"):
        RowStore("sqlite://", MODEL)
    with pytest.raises(UserError, match="mysql"):
        RowStore("mysql://somebody@localhost/rows", MODEL)
    with pytest.raises(UserError, match="does not answer"):
        RowStore("postgresql://nobody@127.0.0.1:9/rows", MODEL)


def test_a_full_disk_loses_no_step(tmp_path):
    with RowStore(str(tmp_path / "rows.db"), MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        store.commit("run", 1, {namespace: StepChanges([make_rows(store, 5)])})
        rows_before = read_rows(store, namespace)
        from sqlalchemy import event

        @event.listens_for(store.engine, "connect")
        def limit_pages(connection, _):
            connection.execute("PRAGMA max_page_count=20")  # SQLite reports a full disk at 80 kB

        with pytest.raises(UserError, match="the disk is full; nothing of this step was written"):
            store.commit("run", 2, {namespace: StepChanges([make_rows(store, 5000)])})
        event.remove(store.engine, "connect", limit_pages)
        assert read_rows(store, namespace).keys() == rows_before.keys()
        store.commit("run", 2, {namespace: StepChanges([make_rows(store, 5)])})
        assert store.count(namespace) == 10


def test_a_forked_process_reads_and_does_not_write(store_url):
    store = RowStore(store_url, MODEL)
    namespace = store.get_or_create_namespace("layer_0", 4, 6)
    store.commit("run", 1, {namespace: StepChanges([make_rows(store, 5)])})
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.commit("run", 2, {namespace: StepChanges([make_rows(store, 5)])})
            message = "wrote"
        except UserError:
            message = f"rejected, sees {store.count(namespace)}"
        store.close()
        os.write(write_end, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read_end, 100).decode() == "rejected, sees 5"
    with pytest.raises(
        UserError, match="another program is writing"
    ):  # the child closed only its own copy
        RowStore(store_url, MODEL)
    store.close()


def test_every_column_is_read_back(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        columns = {
            "tag": ["a", "b", "c"],
            "created": [1.0, 2.0, 3.0],
            "pinned": [True, False, True],
            "entries": np.array([1, 5, 2]),
        }
        batch = replace(make_rows(store, 3, **columns), scores=np.float32([0.5, 1, 2]))
        store.commit("run", 4, {namespace: StepChanges([batch])})
        store.commit(
            "other",
            6,
            {
                namespace: StepChanges(
                    [make_rows(store, 1, created=9.0)], [(batch.ids[1:2], "merged")]
                )
            },
        )
        assert next(store.scan(namespace, include_deleted=True)).metadata == {
            "created": [1.0, 2.0, 3.0, 9.0],
            "run": ["run"] * 3 + ["other"],
            "step": [4, 4, 4, 6],
            "tag": ["a", "b", "c", ""],
            "pinned": [True, False, True, False],
            "entries": [1, 5, 2, 1],
            "last_read": [None] * 4,
            "reads": [0] * 4,
            "score": [0.5, 1.0, 2.0, 1.0],
            "score_step": [4, 4, 4, 6],
            "deleted_reason": [None, "merged", None, None],
            "deleted_run": [None, "other", None, None],
            "deleted_step": [None, 6, None, None],
        }
        store.rewind("other", 5)
        metadata = next(store.scan(namespace, include_deleted=True)).metadata
        assert [metadata[name] for name in ("deleted_reason", "deleted_run", "deleted_step")] == [
            [None] * 3
        ] * 3


def test_removed_rows_are_neither_counted_nor_returned(store_url):
    with RowStore(store_url, MODEL) as store:
        namespaces = [store.get_or_create_namespace(f"layer_{i}", 4, 6) for i in range(2)]
        parts = [make_rows(store, 4), make_rows(store, 3)]
        store.commit(
            "run",
            1,
            {
                namespace: StepChanges([batch])
                for namespace, batch in zip(namespaces, parts, strict=True)
            },
        )
        store.commit(
            "run", 2, {namespaces[0]: StepChanges(removals=[(parts[0].ids[:1], "evicted")])}
        )
        for namespace, remaining in zip(namespaces, (parts[0].ids[1:], parts[1].ids), strict=True):
            assert store.count(namespace) == len(remaining) == len(read_rows(store, namespace))
            assert store.get(namespace, range(1, 8)).ids.tolist() == remaining.tolist()


def test_rows_removed_by_another_run_stay_removed_and_are_purged(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        batch = make_rows(store, 3)
        store.commit("other", 1, {namespace: StepChanges([batch])})
        store.commit("other", 9, {namespace: StepChanges(removals=[(batch.ids[:1], "evicted")])})
        store.commit("run", 9, {namespace: StepChanges(removals=[(batch.ids[1:2], "evicted")])})
        assert store.rewind("run", 1) == (0, 1)
        assert sorted(read_rows(store, namespace)) == batch.ids[1:].tolist()
        assert store.purge("run", 1) == 1
        assert sorted(read_rows(store, namespace, include_deleted=True)) == batch.ids[1:].tolist()


def test_reading_creates_no_file_and_a_new_store_uses_wal(tmp_path):
    with pytest.raises(UserError, match="no store is there"):
        RowStore(str(tmp_path / "rows.db"), read_only=True)
    assert not list(tmp_path.iterdir())
    RowStore(str(tmp_path / "rows.db"), MODEL).close()
    with sqlite3.connect(tmp_path / "rows.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def holds_word(store, word):
    """Return whether any file of a database has a word in it."""
    if store.engine.dialect.name == "sqlite":
        path = Path(store.url)
        return any(word in file.read_bytes() for file in path.parent.glob(f"{path.name}*"))
    query = "SELECT position(%s in pg_read_binary_file(pg_relation_filepath(%s)))"
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("CHECKPOINT")  # writes pages to the files
        return any(
            connection.exec_driver_sql(query, (word, name)).scalar() for name in row_metadata.tables
        )


def test_purged_words_are_in_no_file(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        secret, other = make_rows(store, 3, tag="quxtown"), make_rows(store, 2, 1, tag="plugh")
        store.commit("run", 1, {namespace: StepChanges([secret, other])})
        store.commit("run", 2, {namespace: StepChanges(removals=[(secret.ids, "evicted")])})
        assert holds_word(store, b"quxtown")
        assert store.purge("run", 2) == 3
        store.compact()
        assert not holds_word(store, b"quxtown")
        assert holds_word(store, b"plugh")
        assert sorted(read_rows(store, namespace, include_deleted=True)) == other.ids.tolist()


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_the_write_lock_holds_no_transaction(store_url):
    with RowStore(store_url, MODEL) as store, store.engine.connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%%'"
        assert connection.exec_driver_sql(query).scalar() == 0


WRITER = """
import sys
import numpy as np
from dmt.store import RowInsert, RowStore, StepChanges
store = RowStore(sys.argv[1], "f" * 64)
namespace = store.get_or_create_namespace("layer_0", 4, 6)
step = int(sys.argv[2])
while True:
    step += 1
    keys, values = np.full((50, 4), step, np.float32), np.full((50, 6), step, np.float32)
    rows = RowInsert(store.reserve_ids(50), keys, values, np.ones(50, np.float32))
    store.commit("run", step, {namespace: StepChanges([rows])})
    print(step, flush=True)
"""


@pytest.mark.parametrize("round_index", range(4))
def test_a_killed_writer_leaves_complete_steps(tmp_path, round_index):
    store_url = str(tmp_path / "rows.db")
    last_step = 0
    for repetition in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, store_url, str(last_step)],
            stdout=subprocess.PIPE,
            text=True,
        )
        output = writer.stdout.readline()
        time.sleep(0.003 * (repetition + 5 * round_index))
        writer.send_signal(signal.SIGKILL)
        output += writer.communicate()[0]
        committed = max([last_step, *(int(line) for line in output.split("\n")[:-1])])
        with RowStore(store_url, MODEL) as store:
            (namespace,) = store.list_namespaces()
            rows_by_step: dict[int, int] = {}
            for page in store.scan(namespace):
                for step, key, value in zip(
                    page.metadata["step"], page.keys, page.values, strict=True
                ):
                    assert (key == step).all()
                    assert (value == step).all()
                    rows_by_step[step] = rows_by_step.get(step, 0) + 1
        assert set(rows_by_step.values()) == {50}
        assert max(rows_by_step) in (
            committed,
            committed + 1,
        )  # killed between the commit and the output
        assert sorted(rows_by_step) == list(range(1, max(rows_by_step) + 1))
        last_step = max(rows_by_step)


def test_values_too_large_for_half_precision_are_rejected(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6, "float16")
        large = RowInsert(
            store.reserve_ids(1),
            np.ones((1, 4), np.float32),
            np.full((1, 6), 1e6, np.float32),
            np.ones(1, np.float32),
        )
        with pytest.raises(UserError, match="float16"):
            store.commit("run", 1, {namespace: StepChanges([large])})
        assert store.count(namespace) == 0
        with pytest.raises(UserError, match="scores"):
            store.commit(
                "run",
                1,
                {
                    namespace: StepChanges(
                        [replace(make_rows(store, 2), scores=np.float32([1, np.nan]))]
                    )
                },
            )
        with pytest.raises(UserError, match="float32"):
            store.get_or_create_namespace("layer_0", 4, 6, "float32")


def test_ids_of_purged_rows_are_never_reused(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        batch = make_rows(store, 4)
        store.commit("run", 1, {namespace: StepChanges([batch])})
        store.commit("run", 2, {namespace: StepChanges(removals=[(batch.ids, "evicted")])})
        store.purge("run", 2)
        assert not read_rows(store, namespace, include_deleted=True)
    with RowStore(store_url, MODEL) as store:
        assert store.reserve_ids(1).tolist() == [5]


def test_a_rewound_run_gives_the_same_ids_again(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        for step in (1, 2, 3):
            store.commit("run", step, {namespace: StepChanges([make_rows(store, 4)])})
    for step, next_id in ((1, 5), (0, 1)):
        with RowStore(store_url, MODEL) as store:
            store.rewind("run", step)
        with RowStore(store_url, MODEL) as store:
            assert store.reserve_ids(1).tolist() == [next_id]


def test_a_rewound_run_leaves_the_ids_of_a_later_run(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        for run in ("a", "b"):
            store.commit(run, 1, {namespace: StepChanges([make_rows(store, 4)])})
        store.rewind("a", 0)
        assert store.reserve_ids(1).tolist() == [9]


def test_the_first_deletion_of_a_row_counts(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        batch = make_rows(store, 1)
        for run, changes in (
            ("a", StepChanges([batch])),
            ("a", StepChanges(removals=[(batch.ids, "evicted")])),
        ):
            store.commit(run, 1, {namespace: changes})
        store.commit("b", 1, {namespace: StepChanges(removals=[(batch.ids, "merged")])})
        store.rewind("b", 0)
        assert store.count(namespace) == 0


def test_creation_and_pins_may_be_arrays(store_url):
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        store.commit(
            "run",
            1,
            {
                namespace: StepChanges(
                    [
                        make_rows(
                            store, 2, created=np.array([1.0, 2.0]), pinned=np.array([True, False])
                        )
                    ]
                )
            },
        )
        metadata = next(store.scan(namespace)).metadata
        assert (metadata["created"], metadata["pinned"]) == ([1.0, 2.0], [True, False])


@pytest.mark.parametrize("name", ["what?x.db", "a b#c.db", "100%.db"])
def test_a_store_stays_at_its_path_if_the_working_directory_changes(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with RowStore(name, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.commit("run", 1, {namespace: StepChanges([make_rows(store, 2)])})
        assert store.count(namespace) == 2
    assert (tmp_path / name).is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_opening_a_missing_store_creates_none(tmp_path):
    for arguments in ({}, {"read_only": True}):
        with pytest.raises(UserError, match="no store is there"):
            RowStore(str(tmp_path / "none.db"), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_password_is_not_shown():
    with pytest.raises(UserError) as raised:
        RowStore("postgresql://somebody:secret@127.0.0.1:9/rows", MODEL)
    assert "secret" not in str(raised.value)
    assert "somebody" in str(raised.value)


def test_a_scan_returns_a_snapshot(store_url, monkeypatch):
    monkeypatch.setattr("dmt.store.rows.SCAN_ROWS", 3)
    with RowStore(store_url, MODEL) as store:
        namespace = store.get_or_create_namespace("layer_0", 4, 6)
        store.commit("run", 1, {namespace: StepChanges([make_rows(store, 5)])})
        reader = RowStore(store_url, read_only=True)
        pages = reader.scan(namespace)
        seen = next(pages).ids.tolist()
        merged = make_rows(store, 1)
        store.commit("run", 2, {namespace: StepChanges([merged], [(np.array([1]), "merged")])})
        seen += [row_id for page in pages for row_id in page.ids.tolist()]
        assert seen == [1, 2, 3, 4, 5]
        assert sorted(read_rows(reader, namespace)) == [2, 3, 4, 5, 6]


def test_an_interrupted_creation_is_repeated(tmp_path, monkeypatch):
    store_url = str(tmp_path / "rows.db")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dmt.store.rows.insert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RowStore(store_url, MODEL)
    monkeypatch.undo()
    with RowStore(store_url, MODEL) as store:  # neither tables nor a lock remain
        assert store.list_namespaces() == []


@pytest.mark.parametrize(
    ("message", "explanation"),
    [
        (
            'FATAL: password authentication failed for user "x" connection to server failed',
            "user or password are wrong",
        ),
        (
            'connection to server failed: FATAL: database "rows" does not exist',
            "there is no such database or user",
        ),
        (
            "could not extend file: No space left on device",
            "the disk is full; nothing of this step was written",
        ),
        ("connection refused", "the server does not answer"),
    ],
)
def test_errors_of_a_server_are_explained(message, explanation):
    with (
        pytest.raises(UserError, match=f"^store somewhere: {explanation}"),
        translate_errors("somewhere"),
    ):
        raise OperationalError("SELECT", {}, Exception(message))


def test_a_registered_scheme_opens_its_own_store(tmp_path, monkeypatch):
    class FakeStore:
        def __init__(self, url, model_hash, read_only):
            self.url, self.model_hash, self.read_only = url, model_hash, read_only

    monkeypatch.setattr(rows, "_FACTORIES", {})
    register_store("fake", FakeStore)
    store = open_store("fake://server/rows", MODEL, read_only=True)
    assert isinstance(store, FakeStore)
    assert (store.url, store.model_hash, store.read_only) == ("fake://server/rows", MODEL, True)
    for url in (str(tmp_path / "fake"), f"sqlite:///{tmp_path / 'rows.db'}"):
        with open_store(url, MODEL) as store:
            assert isinstance(store, RowStore)
    for scheme in ("postgresql", "a b", ""):
        with pytest.raises(UserError, match="taken or not a word"):
            register_store(scheme, FakeStore)
