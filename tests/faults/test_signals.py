"""Signals in every stage: an exit code, one line with the command that resumes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.subprocesses import (
    ROWS,
    assert_files_intact,
    consolidation_args,
    copy_folder,
    read_result,
)
from faults.test_kill import CACHE, MODULE, RUN, SEED, SLEEP, read_weights

ROOT = Path(__file__).parents[2]
STAGES = [
    ("SIGTERM", f"{RUN}:load_teacher", 1),
    ("SIGINT", f"{RUN}:TextDataModule.setup", 1),
    ("SIGTERM", f"{MODULE}.calibrate", 1),
    ("SIGTERM", "dmt.training.trainer:StopOnSignal", 1),  # training is prepared
    ("SIGTERM", f"{MODULE}.on_fit_start", 1),  # Lightning's own handlers are set
    ("SIGINT", f"{MODULE}.training_step", 1),
    ("SIGTERM", f"{MODULE}.training_step", 3),
    ("SIGHUP", f"{MODULE}.training_step", 5),
    ("SIGUSR1", f"{MODULE}.training_step", 6),
    ("SIGINT", f"{MODULE}.training_step", 8),
    ("SIGTERM", "dmt.store.rows:RowStore.commit", 2),
    ("SIGINT", f"{MODULE}.validation_step", 2),
    ("SIGTERM", f"{MODULE}.on_validation_epoch_end", 3),  # after the last step
    ("SIGINT", "dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", 1),
    ("SIGTERM", "dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", 5),
    ("SIGINT", f"{RUN}:evaluate_student", 1),
    ("SIGHUP", f"{RUN}:evaluate_student", 1),
    ("SIGTERM", f"{RUN}:_save_student", 1),
    ("SIGINT", f"{RUN}:measure_sizes", 1),
]


def run_until_signal(launcher, args, name, function, nth, calls=40, program="distill", **order):
    """Send a signal some calls after the start of a function; return the last line of stderr."""
    after = random.Random(f"{SEED} {name} {function} {nth}").randrange(calls)
    print(f"seed {SEED}: {name} {after} calls after the beginning of call {nth} of {function}")
    ended = launcher.run(
        args, program, moments=[{"in": function, "nth": nth, "after": after, "do": name}], **order
    )
    assert ended.code == 128 + getattr(signal, name), ended
    assert "Traceback" not in ended.err, ended.err
    assert ended.last_line.startswith("stopped"), ended.err
    return ended.last_line


@pytest.mark.parametrize(
    ("name", "function", "nth"), STAGES, ids=lambda part: str(part).rpartition(":")[2]
)
def test_a_stopped_distillation_resumes_to_the_same_result(
    launcher, uninterrupted_result, distill_args, tmp_path, name, function, nth
):
    message = run_until_signal(launcher, [*distill_args, *ROWS], name, function, nth)
    run = tmp_path / "logs" / "version_0"
    if not run.exists():
        assert "finished work is saved" in message
        return
    assert_files_intact(run)
    assert message.endswith(f"dmt distill --resume {run}")
    saved = max((int(file.stem[5:]) for file in (run / "checkpoints").glob("*.ckpt")), default=None)
    assert ("before the first checkpoint" if saved is None else f"after step {saved};") in message
    if "training_step" in function:
        assert saved == nth, "the current step is finished and saved"
    ended = launcher.run(["--resume", run])
    assert ended.code == 0, ended.err
    assert read_result(run) == uninterrupted_result(*ROWS)


@pytest.mark.parametrize("nth", [1, 6])
def test_a_second_signal_does_not_wait_for_the_step(
    launcher, uninterrupted_result, distill_args, tmp_path, nth
):
    moments = [
        {"in": f"{MODULE}.training_step", "nth": nth, "after": 0, "do": "SIGINT"},
        {"in": "dmt.training.module:check_finite", "nth": nth, "after": 3, "do": "SIGTERM"},
    ]
    ended = launcher.run([*distill_args, *ROWS], moments=moments)
    run = tmp_path / "logs" / "version_0"
    assert ended.code == 130, ended
    assert "Traceback" not in ended.err
    state = (
        "before the first checkpoint; begin again with" if nth == 1 else "after step 4; resume with"
    )
    assert ended.last_line == f"stopped {state}: dmt distill --resume {run}"
    assert launcher.run(["--resume", run]).code == 0
    assert read_result(run) == uninterrupted_result(*ROWS)


def test_a_logit_cache_stopped_while_written_is_removed(launcher, distill_args, tmp_path):
    message = run_until_signal(
        launcher,
        [*distill_args, *CACHE, f"logit_cache.dir={tmp_path / 'cache'}"],
        "SIGTERM",
        "dmt.distillation.logit_cache:_sample_window",
        5,
    )
    assert "finished work is saved" in message
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("name", "target", "function", "nth"),
    [
        ("SIGTERM", "memory", "dmt.consolidation.rows:write_activation_deltas", 1),
        (
            "SIGINT",
            "weights",
            "dmt.consolidation.module:ContextDistillationModule.training_step",
            3,
        ),
        (
            "SIGTERM",
            "weights",
            "dmt.consolidation.module:ContextDistillationModule.measure_scales",
            1,
        ),
        ("SIGINT", "weights", "dmt.consolidation.run:evaluate_student", 1),
    ],
    ids=lambda part: str(part).rpartition(":")[2],
)
def test_a_stopped_consolidation_resumes_to_the_same_result(
    launcher, input_dir, tmp_path, uninterrupted_student, name, target, function, nth
):
    message = run_until_signal(
        launcher, consolidation_args(input_dir, tmp_path, target), name, function, nth
    )
    run = tmp_path / "logs" / "version_0"
    assert message.endswith(f"dmt distill --resume {run}")
    assert function.endswith("run:evaluate_student") == (run / "student").exists()
    assert launcher.run(["--resume", run]).code == 0
    assert read_weights(run / "student") == read_weights(uninterrupted_student(target))


@pytest.mark.parametrize(
    ("name", "function", "is_named"),
    [
        ("SIGTERM", "slot_training:KFACParameters.update_model", False),
        ("SIGINT", "sleep:copy_fact_store", True),
        ("SIGTERM", "sleep:evaluate_transfer", False),
    ],
)
def test_a_stopped_slot_transfer_resumes(
    launcher, input_dir, student_with_facts, tmp_path, name, function, is_named
):
    student = copy_folder(student_with_facts, tmp_path / "student")
    before = {file.name: file.read_bytes() for file in student.iterdir()}
    run = tmp_path / "run" if is_named else tmp_path / "lightning_logs" / "version_0"
    args = ["sleep", "-m", student, "--replay-data", input_dir / "text.txt", *SLEEP]
    args += ["--output", run] if is_named else []
    order = {"cwd": str(tmp_path)}
    message = run_until_signal(
        launcher, args, name, f"dmt.consolidation.{function}", 1, program="dmt", **order
    )
    assert f"--resume {run if is_named else run.relative_to(tmp_path)}" in message
    assert (run / "student").exists() == (function == "sleep:evaluate_transfer")
    assert {
        file.name: file.read_bytes() for file in student.iterdir() if file.name in before
    } == before
    assert launcher.run(["--resume", run], **order).code == 0
    assert (run / "student" / "memory.db").exists()


def test_a_stop_while_facts_are_written_is_one_line(launcher, student_with_facts, tmp_path):
    args = [
        "memory",
        "write",
        "Ada Winterbourne was born in the town of Ravenhill.",
        "-m",
        copy_folder(student_with_facts, tmp_path / "student"),
    ]
    message = run_until_signal(
        launcher, args, "SIGTERM", "dmt.editing.fact_store:prepare_facts", 1, program="dmt"
    )
    assert message == "stopped; finished work is saved"


@pytest.mark.parametrize(
    ("program", "signum"),
    [(["distill.py"], signal.SIGINT), (["-m", "dmt", "memory", "stats"], signal.SIGTERM)],
)
def test_a_stop_while_libraries_load_is_one_line(program, signum):
    process = subprocess.Popen(
        [sys.executable, *program],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text() and process.poll() is None:  # torch is being loaded
        time.sleep(0.01)
    process.send_signal(signum)
    _, err = process.communicate()
    assert process.returncode == 128 + signum, err
    assert (
        err.strip().splitlines()[-1]
        == "stopped while it was starting; nothing had begun, so nothing is lost"
    )
    assert "Traceback" not in err
