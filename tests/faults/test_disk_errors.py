"""A full or read-only disk ends a run in one line; nothing is half written and the run resumes."""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import threading
from types import SimpleNamespace

import pytest

from dmt.errors import FailureError
from dmt.models.loading import load
from dmt.training import interrupts
from faults.subprocesses import (
    ROWS,
    assert_files_intact,
    consolidation_args,
    copy_folder,
    read_result,
    sample_cases,
    small_run_args,
    write_facts_file,
)
from faults.test_kill import CACHE, MODULE, RUN, SLEEP, read_facts_and_rows, read_weights

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


def assert_one_line_error(ended, *parts, code=2):
    """Check that a program printed one error line; code 2 is a mistake, 1 a failure."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.err, ended.err
    assert ended.last_line.startswith("error: "), ended.err
    for part in parts:
        assert str(part) in ended.last_line, ended.last_line
    return ended.last_line


@pytest.mark.parametrize(
    ("function", "nth", "do"),
    [(*stage, "fill") for stage in STAGES]
    + [(*stage, "readonly") for stage in sample_cases(STAGES, 4)],
    ids=lambda part: str(part).rpartition(":")[2],
)
def test_a_distillation_resumes_once_the_disk_can_be_written(
    launcher, uninterrupted_result, input_dir, small_disk, function, nth, do
):
    disk = small_disk(8)
    args = [*small_run_args(input_dir, disk / "logs"), *ROWS]
    run = disk / "logs" / "version_0"
    ended = launcher.run(
        args, moments=[{"in": function, "nth": nth, "do": do, "target": str(disk)}]
    )
    message = assert_one_line_error(ended, disk, code=1)
    if do == "fill":
        assert "full" in message
        assert "make room" in message
        (disk / "filler").unlink()
    else:
        assert "writ" in message
        ended = launcher.run(["--resume", run] if run.exists() else args)
        assert_one_line_error(ended, disk, code=1)
        subprocess.run(["umount", str(disk)], check=True)
    assert_files_intact(run)
    ended = launcher.run(["--resume", run] if run.exists() else args)
    assert ended.code == 0, ended.err
    assert read_result(run) == uninterrupted_result(*ROWS)


@pytest.mark.parametrize("room", sample_cases([1_000, 6_000, 60_000, 120_000], 3))
def test_a_limit_on_file_size_ends_a_run_in_one_line(
    launcher, uninterrupted_result, distill_args, tmp_path, room
):
    """The limit stops config, curves, checkpoints or rows, and needs no root."""
    run = tmp_path / "logs" / "version_0"
    ended = launcher.run([*distill_args, *ROWS], limit=room)
    assert_one_line_error(ended, tmp_path, code=1)
    assert_files_intact(run)
    ended = launcher.run(["--resume", run] if run.exists() else [*distill_args, *ROWS])
    assert ended.code == 0, ended.err
    assert read_result(run) == uninterrupted_result(*ROWS)


@pytest.mark.parametrize(
    ("function", "completes"),
    [
        (f"{MODULE}.training_step", False),
        (f"{MODULE}.log_metrics", False),
        ("dmt.report.distillation:write_report", False),
        ("dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", True),
        (f"{RUN}:_save_student", True),
    ],
    ids=lambda part: str(part).rpartition(":")[2],
)
def test_a_run_whose_folder_is_removed(launcher, distill_args, tmp_path, function, completes):
    """A writer of complete files creates the folder again; one with an open file reports it."""
    run = tmp_path / "logs" / "version_0"
    ended = launcher.run(
        distill_args, moments=[{"in": function, "do": "remove folder", "target": str(run)}]
    )
    if completes:
        assert ended.code == 0
        load(run / "student")
        assert "fidelity" in json.loads((run / "run.json").read_text())
    else:
        assert_one_line_error(ended, run, "the folder was removed", "begin again", code=1)


def test_a_folder_that_was_removed_and_created_again(tmp_path, monkeypatch):
    """A file is lost although a checkpoint has created the folder again."""
    run = tmp_path / "version_0"
    run.mkdir()
    monkeypatch.setattr(interrupts, "current_run", lambda: run)
    monkeypatch.setattr(interrupts, "current_run_getter", lambda: lambda: run)

    def missing(path):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    with (
        pytest.raises(FailureError, match=r"version_0: the folder was removed .* begin again"),
        interrupts.report_disk_errors("logs"),
    ):
        missing(run / "events.out")
    with pytest.raises(FileNotFoundError), interrupts.report_disk_errors("logs"):
        missing(tmp_path / "version_01" / "events.out")
    reported_files = []
    monkeypatch.setattr(
        threading, "excepthook", lambda failed: reported_files.append(failed.exc_value.filename)
    )
    with interrupts.hide_disk_errors_in_threads():
        for path in (run / "events.out", tmp_path / "elsewhere"):
            writer = threading.Thread(target=missing, args=(path,))
            writer.start()
            writer.join()
    assert reported_files == [str(tmp_path / "elsewhere")], (
        "the run's thread reports the error of its own file"
    )
    threading.excepthook(SimpleNamespace(exc_value=FileNotFoundError(2, "", str(run))))
    assert reported_files[1:] == [str(run)], "the hook of before is back"


def test_a_disk_that_fills_up_during_caching_leaves_no_cache(launcher, distill_args, small_disk):
    cache_dir = small_disk(1) / "answers"
    args = [*distill_args, *CACHE, f"logit_cache.dir={cache_dir}"]
    moment = {
        "in": "dmt.distillation.logit_cache:_sample_window",
        "nth": 5,
        "do": "fill",
        "target": str(cache_dir.parent),
    }
    message = assert_one_line_error(
        launcher.run(args, moments=[moment]),
        f"logit_cache.dir={cache_dir}",
        "name another folder",
        code=1,
    )
    assert "No space left" in message
    assert not list(cache_dir.iterdir())
    (cache_dir.parent / "filler").unlink()
    assert launcher.run(args).code == 0


@pytest.mark.parametrize(
    ("target", "function"),
    [
        ("memory", "dmt.consolidation.rows:write_activation_deltas"),
        ("weights", "dmt.consolidation.run:merge_adapters"),
        ("weights", "dmt.report.consolidation:write_report"),
    ],
    ids=lambda part: part.rpartition(":")[2],
)
def test_a_consolidation_resumes_once_there_is_room(
    launcher, input_dir, small_disk, target, function
):
    disk = small_disk(8)
    args = consolidation_args(input_dir, disk, target)
    run = disk / "logs" / "version_0"
    ended = launcher.run(args, moments=[{"in": function, "do": "fill", "target": str(disk)}])
    assert_one_line_error(ended, run, "full", "make room", code=1)
    assert (run / "student").exists() == function.endswith("write_report")
    (disk / "filler").unlink()
    ended = launcher.run(["--resume", run])
    assert ended.code == 0, ended.err
    assert "rows_written" in json.loads((run / "run.json").read_text())
    assert not (run / "student" / "filler").exists()


@pytest.mark.parametrize("do", ["fill", "readonly"])
def test_facts_are_unchanged_after_a_disk_error(
    launcher, student_with_facts, small_disk, tmp_path, do
):
    student = copy_folder(student_with_facts, small_disk(8) / "student")
    before = read_facts_and_rows(student)
    args = ["memory", "write", "--file", write_facts_file(tmp_path, 6), "-m", student]
    moment = {"in": "dmt.editing.fact_store:prepare_facts", "do": do, "target": str(student.parent)}
    message = assert_one_line_error(
        launcher.run(args, "dmt", moments=[moment]), student / "memory.db", code=1
    )
    if do == "fill":
        assert "full" in message
        (student.parent / "filler").unlink()
    else:
        assert_one_line_error(launcher.run(args, "dmt"), student, code=1)
        assert launcher.run(["memory", "list", "-m", student], "dmt").code == 0, (
            "a read-only store can be read"
        )
        subprocess.run(["umount", str(student.parent)], check=True)
    assert read_facts_and_rows(student) == before
    assert launcher.run(args, "dmt").code == 0
    assert len(read_facts_and_rows(student)[0]) == 6


@pytest.mark.parametrize(
    ("function", "do"),
    sample_cases(
        [
            ("sleep:copy_fact_store", "fill"),
            ("slot_training:KFACParameters.update_model", "fill"),
            ("sleep:copy_fact_store", "readonly"),
        ]
    ),
)
def test_a_slot_transfer_resumes_once_the_disk_can_be_written(
    launcher, input_dir, student_with_facts, small_disk, function, do
):
    disk = small_disk(4)
    student, run = copy_folder(student_with_facts, disk / "student"), disk / "run"
    before = {file.name: file.read_bytes() for file in student.iterdir()}
    args = [
        "sleep",
        "-m",
        student,
        "--replay-data",
        input_dir / "text.txt",
        *SLEEP,
        "--output",
        run,
    ]
    moment = {"in": f"dmt.consolidation.{function}", "do": do, "target": str(disk)}
    message = assert_one_line_error(launcher.run(args, "dmt", moments=[moment]), run, code=1)
    assert f"--resume {run}" in message
    assert not (run / "student").exists()
    if do == "fill":
        assert not (run / ".student.partial").exists()
        (disk / "filler").unlink()
    else:
        subprocess.run(["umount", str(disk)], check=True)
    assert {
        file.name: file.read_bytes() for file in student.iterdir() if file.name in before
    } == before
    assert launcher.run(["--resume", run]).code == 0
    assert read_weights(run / "student") != read_weights(student)
    assert not (run / ".student.partial").exists()


@pytest.fixture
def other_users_folder(input_dir, student_with_facts, tmp_path):
    """Return a function that gives a folder with teacher and student to another user."""
    if os.geteuid():
        pytest.skip("another user needs root")
    root = tmp_path / "other_user"
    for name, folder in (("inputs", input_dir), ("student", student_with_facts)):
        shutil.copytree(folder, root / name)
    (root / "logs").mkdir()

    def hand_over():
        subprocess.run(["chown", "-R", str(NOBODY), str(root)], check=True)
        return root

    return hand_over


def test_files_of_another_user_are_refused_before_anything_begins(
    launcher, other_users_folder, tmp_path
):
    """A new run, a run to resume, a teacher, a student and its facts, a store."""
    root = other_users_folder()
    logs, student = root / "logs", root / "student"
    args = small_run_args(root / "inputs", logs)
    assert_one_line_error(
        launcher.run(args, unprivileged=True),
        f"trainer.log_dir={logs} cannot be written",
        "name another folder",
    )
    moment = {"in": f"{MODULE}.training_step", "nth": 8, "do": "SIGTERM"}
    assert launcher.run([*args, *ROWS], moments=[moment]).code == 143
    other_users_folder()
    run = logs / "version_0"
    ended = launcher.run(["--resume", run], unprivileged=True)
    assert_one_line_error(
        ended, f"{run} cannot be written to (Permission denied)", "make it writable"
    )
    (run / "config.yaml").chmod(0o600)
    assert_one_line_error(
        launcher.run(["--resume", run], unprivileged=True),
        run / "config.yaml",
        "(Permission denied); make it readable",
    )
    stats_args = ["memory", "stats", "-m", student]  # loads the model
    for file in ("model.safetensors", "config.json"):
        (student / file).chmod(0o600)
        message = assert_one_line_error(
            launcher.run(stats_args, "dmt", unprivileged=True), student / file
        )
        assert "cannot be read (Permission denied); make it readable" in message
        (student / file).chmod(0o644)
    for file in student.glob("memory.db-*"):
        file.unlink()
    reader = sqlite3.connect(student / "memory.db")
    for has_wal_files in (False, True):  # the owner's open connection creates them
        if has_wal_files:
            reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
            other_users_folder()
        assert bool(list(student.glob("memory.db-*"))) == has_wal_files
        ended = launcher.run(
            ["memory", "write", "Ada was born in Hill.", "-m", student], "dmt", unprivileged=True
        )
        assert_one_line_error(
            ended, student / "memory.db", "it cannot be written to; make it and its folder writable"
        )
        assert launcher.run(stats_args, "dmt", unprivileged=True).code == 0, (
            "a read-only store can be read"
        )
    reader.close()
    store, own_logs = root / "rows.db", tmp_path / "own_logs"
    store_args = [*small_run_args(root / "inputs", own_logs), *ROWS, f"store.url={store}"]
    assert launcher.run(store_args).code == 0
    other_users_folder()
    ended = launcher.run(store_args, unprivileged=True)  # pytest's folder is for its user alone
    message = assert_one_line_error(ended, root / "inputs" / "teacher")
    assert "may not be opened (Permission denied); make it readable" in message
    subprocess.run(["chmod", "-R", "go+rX", str(root / "inputs")], check=True)
    assert_one_line_error(
        launcher.run(store_args, unprivileged=True), f"store {store}", "cannot be written to"
    )
    assert not (own_logs / "version_1").exists()
