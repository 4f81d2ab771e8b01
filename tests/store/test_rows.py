"""The store: rows survive, steps are whole, and what cannot be used is refused in one line. SQLite and a real PostgreSQL."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from dmt.errors import UserError
from dmt.store import RowInsert, RowStore, RowUsage, StepChanges, rows
from dmt.store.database import row_metadata, translate_errors
from dmt.store.rows import open_store, register_store

MODEL = "f" * 64


@pytest.fixture(scope="module")
def postgresql():
    """URL of a server of its own, on loopback, gone afterwards."""
    if shutil.which("pg_virtualenv") is None:
        pytest.skip(
            "PostgreSQL is tested where Debian's postgresql-common is installed (apt-get install postgresql)"
        )
    told = "echo $PGUSER:$PGPASSWORD@$PGHOST:$PGPORT; read line"
    server = subprocess.Popen(
        ["pg_virtualenv", "sh", "-c", told],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = iter(server.stdout.readline, "")
    address = next((line.strip() for line in lines if "@" in line), None)
    if address is None:
        server.communicate(timeout=60)  # or its open pipes fail whatever test comes later
        pytest.skip(
            "pg_virtualenv is there and makes no server; its Debian package postgresql may be missing"
        )
    yield f"postgresql://{address}/postgres"
    server.communicate("\n", timeout=60)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, tmp_path):
    if request.param == "sqlite":
        yield str(tmp_path / "rows.db")
        return
    url = request.getfixturevalue("postgresql")
    yield url
    from sqlalchemy import create_engine

    engine = create_engine(url.replace("postgresql", "postgresql+psycopg"))
    row_metadata.drop_all(engine)
    engine.dispose()


def some(store, count, seed=0, key_width=4, value_width=6, **more):
    drawn = np.random.default_rng(seed)
    keys, values = (
        drawn.normal(size=(count, width)).astype(np.float32) for width in (key_width, value_width)
    )
    return RowInsert(store.reserve_ids(count), keys, values, np.ones(count, np.float32), **more)


def everything(store, space, gone=False):
    pages = list(store.scan(space, gone))
    return {
        int(n): (k, v)
        for page in pages
        for n, k, v in zip(page.ids, page.keys, page.values, strict=True)
    }


def test_what_is_written_comes_back(place):
    with RowStore(place, MODEL) as store:
        first, second = (
            store.get_or_create_namespace("layer_0", 4, 6),
            store.get_or_create_namespace("layer_1", 4, 6, "float16"),
        )
        rows = {
            space: some(store, 7, seed, tag="told", pinned=True)
            for seed, space in enumerate((first, second))
        }
        store.commit("run", 3, {space: StepChanges([part]) for space, part in rows.items()})
    with RowStore(place, MODEL) as store:
        assert [space.name for space in store.list_namespaces()] == ["layer_0", "layer_1"]
        for space, part in rows.items():
            page = next(store.scan(space))
            assert page.ids.tolist() == part.ids.tolist()
            np.testing.assert_array_equal(page.keys, part.keys)
            kind = np.float16 if space.value_dtype == "float16" else np.float32
            np.testing.assert_array_equal(page.values, part.values.astype(kind).astype(np.float32))
            assert page.metadata["tag"] == ["told"] * 7
            assert page.metadata["pinned"] == [True] * 7
            assert page.metadata["step"] == [3] * 7
            assert store.count(space) == 7
        assert store.get(first, [3, 1, 99]).ids.tolist() == [1, 3]
        assert store.reserve_ids(2).tolist() == [15, 16]


def test_scan_goes_through_pages(place, monkeypatch):
    monkeypatch.setattr("dmt.store.rows.SCAN_ROWS", 3)
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        part = some(store, 9)
        store.commit("run", 1, {space: StepChanges([part])})
        assert [len(page.ids) for page in store.scan(space)] == [3, 3, 3]
        assert store.get(space, part.ids).ids.tolist() == part.ids.tolist()


def test_usage_is_that_of_the_last_commit(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        part = some(store, 3)
        store.commit("run", 1, {space: StepChanges([part])})
        for step in (2, 3):
            heat, at = np.float32([0.5, 2]), np.array([step, step])
            used = RowUsage(part.ids[:2], np.array([5, 1]), np.array([10.0, 20.0]) * step, heat, at)
            store.commit("run", step, {space: StepChanges(usage=used)})
        about = next(store.scan(space)).metadata
        assert about["reads"] == [5, 1, 0]
        assert about["last_read"] == [30.0, 60.0, None]
        assert about["score"] == [0.5, 2.0, 1.0]
        assert about["score_step"] == [3, 3, 1]


def on_disk(store):
    """Numbers of all rows whose keys and values take room, there or gone; each has its state and no other has one."""
    with store.engine.connect() as connection:
        rows, states = (
            {number for (number,) in connection.exec_driver_sql(f"SELECT id FROM {table}")}
            for table in ("dmt_rows", "dmt_row_stats")
        )
    assert rows == states
    return rows


def test_a_run_is_rewound_to_a_step(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        old, early, late = (some(store, 2, seed) for seed in range(3))
        store.commit("other", 100, {space: StepChanges([old])})
        store.commit("run", 1, {space: StepChanges([early])})
        before = everything(store, space)
        store.commit(
            "run",
            2,
            {space: StepChanges([late], [(old.ids[:1], "evicted"), (early.ids, "merged")])},
        )
        store.commit("run", 3, {space: StepChanges(removals=[(late.ids, "evicted")])})
        assert set(everything(store, space)) == {int(old.ids[1])}
        assert store.rewind("run", 1) == (2, 3)
        assert on_disk(store) == {*old.ids.tolist(), *early.ids.tolist()}
        after = everything(store, space)
        assert after.keys() == before.keys()
        for number, (key, value) in before.items():
            np.testing.assert_array_equal(after[number][0], key)
            np.testing.assert_array_equal(after[number][1], value)
        assert store.rewind("run", 1) == (0, 0)


def test_purged_rows_leave_the_disk_and_no_others(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        part = some(store, 4)
        store.commit("run", 1, {space: StepChanges([part])})
        store.commit("run", 2, {space: StepChanges(removals=[(part.ids[:1], "evicted")])})
        store.commit("run", 5, {space: StepChanges(removals=[(part.ids[1:2], "evicted")])})
        assert store.purge("run", 2) == 1
        assert on_disk(store) == set(part.ids[1:].tolist())
        assert sorted(everything(store, space, gone=True)) == part.ids[1:].tolist()
        store.rewind("run", 2)
        assert sorted(everything(store, space)) == part.ids[1:].tolist()


@pytest.mark.parametrize("spoilt", ["keys", "values"])
def test_a_step_is_written_whole_or_not_at_all(place, spoilt):
    with RowStore(place, MODEL) as store:
        spaces = [store.get_or_create_namespace(f"layer_{i}", 4, 6) for i in range(2)]
        good, bad = some(store, 3), some(store, 3)
        getattr(bad, spoilt)[1, 2] = np.nan
        with pytest.raises(UserError, match=f"{spoilt} of layer_1 are not finite at step 4"):
            store.commit("run", 4, {spaces[0]: StepChanges([good]), spaces[1]: StepChanges([bad])})
        twice = RowInsert(good.ids, good.keys, good.values, good.scores)
        store.commit("run", 5, {spaces[0]: StepChanges([good])})
        with pytest.raises(UserError):
            store.commit(
                "run",
                6,
                {spaces[1]: StepChanges([some(store, 2)]), spaces[0]: StepChanges([twice])},
            )
        assert store.count(spaces[0]) == 3
        assert store.count(spaces[1]) == 0


def test_text_is_text(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer'; DROP TABLE dmt_rows; --", 4, 6)
        tag = "Robert'); DELETE FROM dmt_rows; -- \N{SNOWMAN} %s :row"
        store.commit("run' OR 1=1", 1, {space: StepChanges([some(store, 2, tag=tag)])})
        assert next(store.scan(space)).metadata["tag"] == [tag, tag]
        assert store.rewind("x' OR '1'='1", 0) == (0, 0)


def test_readers_see_whole_steps_while_one_writes(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        reader = RowStore(place, read_only=True)
        store.commit("run", 1, {space: StepChanges([some(store, 5)])})
        assert reader.count(space) == 5
        with pytest.raises(UserError, match="for reading only"):
            reader.commit("run", 2, {})
        with pytest.raises(UserError, match="another program is writing"):
            RowStore(place, MODEL)
    RowStore(place, MODEL).close()


def test_refuses_what_is_not_its_own(place):
    with pytest.raises(UserError, match="no store is there"):
        RowStore(place, read_only=False)
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        with pytest.raises(
            UserError, match=r"keys of 4 and values of 6 numbers in float32, the memory 8 and 6"
        ):
            store.get_or_create_namespace("layer_0", 8, 6)
        with pytest.raises(
            UserError, match=r"keys of 4 and values of 6 numbers in float32, the memory 4 and 8"
        ):
            store.get_or_create_namespace("layer_0", 4, 8)
        with pytest.raises(UserError, match=r"keys of layer_0 must be \(3, 4\), got \(3, 5\)"):
            store.commit("run", 1, {space: StepChanges([some(store, 3, key_width=5)])})
    with pytest.raises(UserError, match="belong to another model"):
        RowStore(place, "a" * 64)
    with RowStore(place, MODEL) as store, store.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE dmt_metadata SET value = '99' WHERE name = 'schema_version'"
        )
    with pytest.raises(UserError, match="schema version 99, this dmt knows 3"):
        RowStore(place, MODEL)


def test_refuses_files_that_are_no_store(tmp_path):
    (tmp_path / "text.db").write_text("no database at all, and long enough to be read as one" * 40)
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
        space = store.get_or_create_namespace("layer_0", 4, 6)
        store.commit("run", 1, {space: StepChanges([some(store, 5)])})
        kept = everything(store, space)
        from sqlalchemy import event

        @event.listens_for(store.engine, "connect")
        def small(connection, _):
            connection.execute(
                "PRAGMA max_page_count=20"
            )  # SQLite's own answer to a full disk, at 80 kB

        with pytest.raises(UserError, match="the disk is full; nothing of this step was written"):
            store.commit("run", 2, {space: StepChanges([some(store, 5000)])})
        event.remove(store.engine, "connect", small)
        assert everything(store, space).keys() == kept.keys()
        store.commit("run", 2, {space: StepChanges([some(store, 5)])})
        assert store.count(space) == 10


def test_a_forked_process_reads_and_does_not_write(place):
    store = RowStore(place, MODEL)
    space = store.get_or_create_namespace("layer_0", 4, 6)
    store.commit("run", 1, {space: StepChanges([some(store, 5)])})
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.commit("run", 2, {space: StepChanges([some(store, 5)])})
            answer = "wrote"
        except UserError:
            answer = f"refused, sees {store.count(space)}"
        store.close()
        os.write(into, answer.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(out, 100).decode() == "refused, sees 5"
    with pytest.raises(
        UserError, match="another program is writing"
    ):  # the child closed its own copy only
        RowStore(place, MODEL)
    store.close()


def test_every_column_comes_back(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        how = {
            "tag": ["a", "b", "c"],
            "created": [1.0, 2.0, 3.0],
            "pinned": [True, False, True],
            "entries": np.array([1, 5, 2]),
        }
        part = replace(some(store, 3, **how), scores=np.float32([0.5, 1, 2]))
        store.commit("run", 4, {space: StepChanges([part])})
        store.commit(
            "other",
            6,
            {space: StepChanges([some(store, 1, created=9.0)], [(part.ids[1:2], "merged")])},
        )
        assert next(store.scan(space, include_deleted=True)).metadata == {
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
        about = next(store.scan(space, include_deleted=True)).metadata
        assert [about[name] for name in ("deleted_reason", "deleted_run", "deleted_step")] == [
            [None] * 3
        ] * 3


def test_what_left_is_neither_counted_nor_got_and_namespaces_are_apart(place):
    with RowStore(place, MODEL) as store:
        spaces = [store.get_or_create_namespace(f"layer_{i}", 4, 6) for i in range(2)]
        parts = [some(store, 4), some(store, 3)]
        store.commit(
            "run",
            1,
            {space: StepChanges([part]) for space, part in zip(spaces, parts, strict=True)},
        )
        store.commit("run", 2, {spaces[0]: StepChanges(removals=[(parts[0].ids[:1], "evicted")])})
        for space, left in zip(spaces, (parts[0].ids[1:], parts[1].ids), strict=True):
            assert store.count(space) == len(left) == len(everything(store, space))
            assert store.get(space, range(1, 8)).ids.tolist() == left.tolist()


def test_what_another_run_took_away_stays_away_and_is_purged(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        part = some(store, 3)
        store.commit("other", 1, {space: StepChanges([part])})
        store.commit("other", 9, {space: StepChanges(removals=[(part.ids[:1], "evicted")])})
        store.commit("run", 9, {space: StepChanges(removals=[(part.ids[1:2], "evicted")])})
        assert store.rewind("run", 1) == (0, 1)
        assert sorted(everything(store, space)) == part.ids[1:].tolist()
        assert store.purge("run", 1) == 1
        assert sorted(everything(store, space, gone=True)) == part.ids[1:].tolist()


def test_looking_makes_no_file_and_a_new_one_writes_ahead(tmp_path):
    with pytest.raises(UserError, match="no store is there"):
        RowStore(str(tmp_path / "rows.db"), read_only=True)
    assert not list(tmp_path.iterdir())
    RowStore(str(tmp_path / "rows.db"), MODEL).close()
    with sqlite3.connect(tmp_path / "rows.db") as found:
        assert found.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    found.close()


@pytest.mark.parametrize("place", ["postgresql"], indirect=True)
def test_holding_the_right_to_write_holds_no_transaction(place):
    with RowStore(place, MODEL) as store, store.engine.connect() as connection:
        asked = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%%'"
        assert connection.exec_driver_sql(asked).scalar() == 0


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


@pytest.mark.parametrize("round_", range(4))
def test_killed_at_any_moment_it_holds_whole_steps(tmp_path, round_):
    place = str(tmp_path / "rows.db")
    done = 0
    for again in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, place, str(done)], stdout=subprocess.PIPE, text=True
        )
        told = writer.stdout.readline()
        time.sleep(0.003 * (again + 5 * round_))
        writer.send_signal(signal.SIGKILL)
        told += writer.communicate()[0]
        committed = max([done, *(int(line) for line in told.split("\n")[:-1])])
        with RowStore(place, MODEL) as store:
            (space,) = store.list_namespaces()
            found: dict[int, int] = {}
            for page in store.scan(space):
                for step, key, value in zip(
                    page.metadata["step"], page.keys, page.values, strict=True
                ):
                    assert (key == step).all()
                    assert (value == step).all()
                    found[step] = found.get(step, 0) + 1
        assert set(found.values()) == {50}
        assert max(found) in (committed, committed + 1)  # killed between its commit and saying so
        assert sorted(found) == list(range(1, max(found) + 1))
        done = max(found)


def test_values_too_large_for_half_precision_are_refused(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6, "float16")
        large = RowInsert(
            store.reserve_ids(1),
            np.ones((1, 4), np.float32),
            np.full((1, 6), 1e6, np.float32),
            np.ones(1, np.float32),
        )
        with pytest.raises(UserError, match="float16"):
            store.commit("run", 1, {space: StepChanges([large])})
        assert store.count(space) == 0
        with pytest.raises(UserError, match="scores"):
            store.commit(
                "run",
                1,
                {space: StepChanges([replace(some(store, 2), scores=np.float32([1, np.nan]))])},
            )
        with pytest.raises(UserError, match="float32"):
            store.get_or_create_namespace("layer_0", 4, 6, "float32")


@pytest.mark.parametrize("gone", ["purge", "rewind"])
def test_a_number_is_never_given_out_twice(place, gone):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        part = some(store, 4)
        store.commit("run", 1, {space: StepChanges([part])})
        store.commit("run", 2, {space: StepChanges(removals=[(part.ids, "evicted")])})
        store.purge("run", 2) if gone == "purge" else store.rewind("run", 0)
        assert not everything(store, space, gone=True)
    with RowStore(place, MODEL) as store:
        assert store.reserve_ids(1).tolist() == [5]


def test_the_first_deletion_of_a_row_counts(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        part = some(store, 1)
        for run, changes in (
            ("a", StepChanges([part])),
            ("a", StepChanges(removals=[(part.ids, "evicted")])),
        ):
            store.commit(run, 1, {space: changes})
        store.commit("b", 1, {space: StepChanges(removals=[(part.ids, "merged")])})
        store.rewind("b", 0)
        assert store.count(space) == 0


def test_creation_and_pins_may_be_arrays(place):
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        store.commit(
            "run",
            1,
            {
                space: StepChanges(
                    [some(store, 2, created=np.array([1.0, 2.0]), pinned=np.array([True, False]))]
                )
            },
        )
        about = next(store.scan(space)).metadata
        assert (about["created"], about["pinned"]) == ([1.0, 2.0], [True, False])


@pytest.mark.parametrize("name", ["what?x.db", "a b#c.db", "100%.db"])
def test_a_store_is_the_file_it_was_given_wherever_the_program_goes(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with RowStore(name, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.commit("run", 1, {space: StepChanges([some(store, 2)])})
        assert store.count(space) == 2
    assert (tmp_path / name).is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_asking_for_a_store_that_is_not_there_makes_none(tmp_path):
    for given in ({}, {"read_only": True}):
        with pytest.raises(UserError, match="no store is there"):
            RowStore(str(tmp_path / "none.db"), **given)
    assert not list(tmp_path.iterdir())


def test_a_password_is_not_shown():
    with pytest.raises(UserError) as told:
        RowStore("postgresql://somebody:secret@127.0.0.1:9/rows", MODEL)
    assert "secret" not in str(told.value)
    assert "somebody" in str(told.value)


def test_readers_see_the_rows_of_one_moment(place, monkeypatch):
    monkeypatch.setattr("dmt.store.rows.SCAN_ROWS", 3)
    with RowStore(place, MODEL) as store:
        space = store.get_or_create_namespace("layer_0", 4, 6)
        store.commit("run", 1, {space: StepChanges([some(store, 5)])})
        reader = RowStore(place, read_only=True)
        pages = reader.scan(space)
        seen = next(pages).ids.tolist()
        merged = some(store, 1)
        store.commit("run", 2, {space: StepChanges([merged], [(np.array([1]), "merged")])})
        seen += [number for page in pages for number in page.ids.tolist()]
        assert seen == [1, 2, 3, 4, 5]
        assert sorted(everything(reader, space)) == [2, 3, 4, 5, 6]


def test_a_store_half_made_is_no_store_and_is_made_again(tmp_path, monkeypatch):
    place = str(tmp_path / "rows.db")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dmt.store.rows.insert", killed)
    with pytest.raises(KeyboardInterrupt):
        RowStore(place, MODEL)
    monkeypatch.undo()
    with RowStore(place, MODEL) as store:  # neither the tables nor the lock are left
        assert store.list_namespaces() == []


@pytest.mark.parametrize(
    ("database", "told_as"),
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
def test_errors_of_a_server_are_explained(database, told_as):
    with (
        pytest.raises(UserError, match=f"^store somewhere: {told_as}"),
        translate_errors("somewhere"),
    ):
        raise OperationalError("SELECT", {}, Exception(database))


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
