"""A disk that is full, or cannot be written to: one line about it, nothing half written, and going on when that is over."""

import errno
import json
import os
import shutil
import subprocess
import threading

import pytest

from dmt.errors import UserError
from dmt.models.loading import load
from dmt.training import interrupts
from faults.subprocesses import (
    ROWS,
    consolidation,
    copied,
    facts_in,
    result,
    small_run,
    some,
    whole_files,
)
from faults.test_kill import CACHE, MODULE, RUN, SLEEP, book_of, weights

NOBODY = 65534
STAGES = [
    (f"{RUN}:create_run_dir", 1),
    ("dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", 1),
    ("dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", 3),
    (f"{MODULE}.log_metrics", 6),  # figures for curves
    ("dmt.store.rows:RowStore.commit", 2),
    ("pytorch_lightning.loggers.csv_logs:ExperimentWriter.save", 6),
    (f"{RUN}:_save_student", 1),
    (f"{RUN}:write_record", 2),
    (f"{RUN}:log_hparams", 1),
    ("dmt.report.distillation:write_report", 1),
]


def one_line(ended, *parts, code=2):
    """The last line of a program that ended with an error: code 2 for a mistake, 1 for a failure."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.err, ended.err
    assert ended.last.startswith("error: "), ended.err
    for part in parts:
        assert str(part) in ended.last, ended.last
    return ended.last


@pytest.mark.parametrize(
    ("function", "nth", "do"),
    [(*stage, "fill") for stage in STAGES] + [(*stage, "readonly") for stage in some(STAGES, 4)],
    ids=lambda part: str(part).rpartition(":")[2],
)
def test_a_distillation(nursery, alone, material, small_disk, function, nth, do):
    disk = small_disk(8)
    words = [*small_run(material, disk / "logs"), *ROWS]
    run = disk / "logs" / "version_0"
    ended = nursery.run(words, moments=[{"in": function, "nth": nth, "do": do, "about": str(disk)}])
    said = one_line(ended, disk)
    if do == "fill":
        assert "full" in said
        assert "make room" in said
        (disk / "filler").unlink()
    else:
        assert "writ" in said
        one_line(nursery.run(["--resume", run] if run.exists() else words), disk)  # still so
        subprocess.run(["umount", str(disk)], check=True)
    whole_files(run)
    ended = nursery.run(["--resume", run] if run.exists() else words)
    assert ended.code == 0, ended.err
    assert result(run) == alone(*ROWS)


@pytest.mark.parametrize("room", some([1_000, 6_000, 60_000, 120_000], 3))
def test_files_that_may_not_grow(nursery, alone, words, tmp_path, room):
    """What needs no root: a limit on the size of files, which stops settings, curves, checkpoints or rows."""
    run = tmp_path / "logs" / "version_0"
    ended = nursery.run([*words, *ROWS], limit=room)
    one_line(ended, tmp_path)
    whole_files(run)
    ended = nursery.run(["--resume", run] if run.exists() else [*words, *ROWS])
    assert ended.code == 0, ended.err
    assert result(run) == alone(*ROWS)


@pytest.mark.parametrize(
    ("function", "ends"),
    [
        (f"{MODULE}.training_step", False),
        (f"{MODULE}.log_metrics", False),
        ("dmt.report.distillation:write_report", False),
        ("dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", True),
        (f"{RUN}:_save_student", True),
    ],
    ids=lambda part: str(part).rpartition(":")[2],
)
def test_a_folder_that_is_taken_away(nursery, words, tmp_path, function, ends):
    """Who writes whole files makes the folder anew, and the run ends; who has one open can only say so."""
    run = tmp_path / "logs" / "version_0"
    ended = nursery.run(words, moments=[{"in": function, "do": "take away", "about": str(run)}])
    if ends:
        assert ended.code == 0
        load(run / "student")
        assert "fidelity" in json.loads((run / "run.json").read_text())
    else:
        one_line(ended, run, "the folder was removed", "begin again")


def test_a_folder_that_was_away_for_a_moment(tmp_path, monkeypatch):
    """Whoever met that has lost a file, though a checkpoint has made the folder anew meanwhile."""
    run = tmp_path / "version_0"
    run.mkdir()
    monkeypatch.setattr(interrupts, "current_run", lambda: run)

    def missing(place):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(place))

    with (
        pytest.raises(UserError, match=r"version_0: the folder was removed .* begin again"),
        interrupts.report_disk_errors("logs"),
    ):
        missing(run / "events.out")
    with pytest.raises(FileNotFoundError), interrupts.report_disk_errors("logs"):
        missing(tmp_path / "version_01" / "events.out")
    said = []
    monkeypatch.setattr(
        threading, "excepthook", lambda failed: said.append(failed.exc_value.filename)
    )
    with interrupts.report_disk_errors("logs"):
        for place in (run / "events.out", tmp_path / "elsewhere"):
            writer = threading.Thread(target=missing, args=(place,))
            writer.start()
            writer.join()
    assert said == [str(tmp_path / "elsewhere")], (
        "of the run's own file the thread that waits for it tells"
    )


def test_the_teachers_answers(nursery, words, small_disk):
    place = small_disk(1) / "answers"
    given = [*words, *CACHE, f"logit_cache.dir={place}"]
    fill = {
        "in": "dmt.distillation.logit_cache:_sample_window",
        "nth": 5,
        "do": "fill",
        "about": str(place.parent),
    }
    said = one_line(
        nursery.run(given, moments=[fill]), f"logit_cache.dir={place}", "name another folder"
    )
    assert "No space left" in said
    assert not list(place.iterdir())
    (place.parent / "filler").unlink()
    assert nursery.run(given).code == 0


@pytest.mark.parametrize(
    ("into", "function"),
    [
        ("memory", "dmt.consolidation.rows:write_activation_deltas"),
        ("weights", "dmt.consolidation.run:merge_adapters"),
        ("weights", "dmt.report.consolidation:write_report"),
    ],
    ids=lambda part: part.rpartition(":")[2],
)
def test_a_consolidation(nursery, material, small_disk, into, function):
    disk = small_disk(8)
    words = consolidation(material, disk, into)
    run = disk / "logs" / "version_0"
    ended = nursery.run(words, moments=[{"in": function, "do": "fill", "about": str(disk)}])
    one_line(ended, run, "full", "make room")
    assert (run / "student").exists() == function.endswith("write_report")
    (disk / "filler").unlink()
    ended = nursery.run(["--resume", run])
    assert ended.code == 0, ended.err
    assert "rows_written" in json.loads((run / "run.json").read_text())
    assert not (run / "student" / "filler").exists()


@pytest.mark.parametrize("do", ["fill", "readonly"])
def test_facts(nursery, told, small_disk, tmp_path, do):
    student = copied(told, small_disk(8) / "student")
    before = book_of(student)
    words = ["memory", "write", "--file", facts_in(tmp_path, 6), "-m", student]
    moment = {"in": "dmt.editing.fact_store:prepare_facts", "do": do, "about": str(student.parent)}
    said = one_line(nursery.run(words, "dmt", moments=[moment]), student / "memory.db")
    if do == "fill":
        assert "full" in said
        (student.parent / "filler").unlink()
    else:
        one_line(nursery.run(words, "dmt"), student)
        assert nursery.run(["memory", "list", "-m", student], "dmt").code == 0, (
            "it can be read all the same"
        )
        subprocess.run(["umount", str(student.parent)], check=True)
    assert book_of(student) == before
    assert nursery.run(words, "dmt").code == 0
    assert len(book_of(student)[0]) == 6


@pytest.mark.parametrize(
    ("function", "do"),
    some(
        [
            ("sleep:copy_fact_store", "fill"),
            ("slot_training:KFACParameters.update_model", "fill"),
            ("sleep:copy_fact_store", "readonly"),
        ]
    ),
)
def test_a_slot_transfer(nursery, material, told, small_disk, function, do):
    disk = small_disk(4)
    student, run = copied(told, disk / "student"), disk / "run"
    before = {file.name: file.read_bytes() for file in student.iterdir()}
    words = [
        "sleep",
        "-m",
        student,
        "--replay-data",
        material / "text.txt",
        *SLEEP,
        "--output",
        run,
    ]
    moment = {"in": f"dmt.consolidation.{function}", "do": do, "about": str(disk)}
    said = one_line(nursery.run(words, "dmt", moments=[moment]), run, code=1)
    assert f"--resume {run}" in said
    assert not (run / "student").exists()
    if do == "fill":
        assert not (run / ".student.partial").exists()
        (disk / "filler").unlink()
    else:
        subprocess.run(["umount", str(disk)], check=True)
    assert {
        file.name: file.read_bytes() for file in student.iterdir() if file.name in before
    } == before
    assert nursery.run(["--resume", run]).code == 0
    assert weights(run / "student") != weights(student)
    assert not (run / ".student.partial").exists()


@pytest.fixture
def anothers(material, told, tmp_path):
    """A folder of another user, with copies of the teacher and the student, and a call that makes that so of what came since."""
    if os.geteuid():
        pytest.skip("another user needs root")
    made = tmp_path / "anothers"
    for name, folder in (("material", material), ("student", told)):
        shutil.copytree(folder, made / name)
    (made / "logs").mkdir()

    def handed_over():
        subprocess.run(["chown", "-R", str(NOBODY), str(made)], check=True)
        return made

    return handed_over


def test_what_belongs_to_somebody_else(nursery, anothers, tmp_path):
    """Before anything begins, of one who may not write there: a new run, one to be gone on with, a student's book."""
    place = anothers()
    logs, student = place / "logs", place / "student"
    words = small_run(place / "material", logs)
    one_line(
        nursery.run(words, powerless=True),
        f"trainer.log_dir={logs} cannot be written",
        "name another folder",
    )
    moment = {"in": f"{MODULE}.training_step", "nth": 8, "do": "SIGTERM"}
    assert nursery.run([*words, *ROWS], moments=[moment]).code == 143
    anothers()
    run = logs / "version_0"
    ended = nursery.run(["--resume", run], powerless=True)
    one_line(ended, f"{run} cannot be written to (Permission denied)", "make it writable")
    (run / "config.yaml").chmod(0o600)
    one_line(
        nursery.run(["--resume", run], powerless=True),
        run / "config.yaml",
        "(Permission denied); make it readable",
    )
    looked = ["memory", "list", "-m", student]
    for file in (
        "model.safetensors",
        "config.json",
    ):  # as it is written, nobody else may read the weights
        (student / file).chmod(0o600)
        said = one_line(nursery.run(looked, "dmt", powerless=True), student / file)
        assert "cannot be read (Permission denied); make it readable" in said
        (student / file).chmod(0o644)
    for file in student.glob("memory.db-*"):
        file.unlink()
    for left in (
        False,
        True,
    ):  # whoever only looks leaves SQLite's files beside the store, by which others may open it
        assert bool(list(student.glob("memory.db-*"))) == left
        ended = nursery.run(
            ["memory", "write", "Ada was born in Hill.", "-m", student], "dmt", powerless=True
        )
        one_line(
            ended, student / "memory.db", "it cannot be written to; make it and its folder writable"
        )
        assert nursery.run(looked, "dmt", powerless=True).code == 0, "it can be read all the same"
        assert nursery.run(looked, "dmt").code == 0
        anothers()
    store, mine = place / "rows.db", tmp_path / "mine"
    given = [*small_run(place / "material", mine), *ROWS, f"store.url={store}"]
    assert nursery.run(given).code == 0
    anothers()
    said = one_line(
        nursery.run(given, powerless=True), place / "material" / "teacher"
    )  # pytest made it for its user alone
    assert "may not be opened (Permission denied); make it readable" in said
    subprocess.run(["chmod", "-R", "go+rX", str(place / "material")], check=True)
    one_line(nursery.run(given, powerless=True), f"store {store}", "cannot be written to")
    assert not (mine / "version_1").exists()
