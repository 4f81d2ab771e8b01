"""Ctrl-C and SIGTERM in every stage: the exit code says which, one line how to go on, and going on ends as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.subprocesses import ROWS, consolidation, copied, result, whole_files
from faults.test_kill import CACHE, MODULE, RUN, SEED, SLEEP, weights

ROOT = Path(__file__).parents[2]
STAGES = [
    ("SIGTERM", f"{RUN}:load_teacher", 1),
    ("SIGINT", f"{RUN}:TextDataModule.setup", 1),
    ("SIGTERM", f"{MODULE}.calibrate", 1),
    ("SIGTERM", "dmt.training.trainer:StopOnSignal", 1),  # training is prepared
    ("SIGTERM", f"{MODULE}.on_fit_start", 1),  # Lightning's own answers begin
    ("SIGINT", f"{MODULE}.training_step", 1),
    ("SIGTERM", f"{MODULE}.training_step", 3),
    ("SIGINT", f"{MODULE}.training_step", 8),
    ("SIGTERM", "dmt.store.rows:RowStore.commit", 2),
    ("SIGINT", f"{MODULE}.validation_step", 2),
    ("SIGTERM", f"{MODULE}.on_validation_epoch_end", 3),  # after the last step
    ("SIGINT", "dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", 1),
    ("SIGTERM", "dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", 5),
    ("SIGINT", f"{RUN}:evaluate_student", 1),
    ("SIGTERM", f"{RUN}:_save_student", 1),
    ("SIGINT", f"{RUN}:measure_sizes", 1),
]


def stopped(nursery, words, name, function, nth, calls=40, program="distill", **order):
    """Run until a signal comes some calls after the beginning of a function; the line that is then said."""
    after = random.Random(f"{SEED} {name} {function} {nth}").randrange(calls)
    print(f"seed {SEED}: {name} {after} calls after the beginning of call {nth} of {function}")
    ended = nursery.run(
        words, program, moments=[{"in": function, "nth": nth, "after": after, "do": name}], **order
    )
    assert ended.code == 128 + getattr(signal, name), ended
    assert "Traceback" not in ended.err, ended.err
    assert ended.last.startswith("stopped"), ended.err
    return ended.last


@pytest.mark.parametrize(
    ("name", "function", "nth"), STAGES, ids=lambda part: str(part).rpartition(":")[2]
)
def test_a_distillation(nursery, alone, words, tmp_path, name, function, nth):
    said = stopped(nursery, [*words, *ROWS], name, function, nth)
    run = tmp_path / "logs" / "version_0"
    if not run.exists():
        assert "finished work is saved" in said
        return
    whole_files(run)
    assert said.endswith(f"dmt distill --resume {run}")
    saved = max((int(file.stem[5:]) for file in (run / "checkpoints").glob("*.ckpt")), default=None)
    assert ("before the first checkpoint" if saved is None else f"after step {saved};") in said
    if "training_step" in function:
        assert saved == nth, "the step in hand is finished and saved"
    ended = nursery.run(["--resume", run])
    assert ended.code == 0, ended.err
    assert result(run) == alone(*ROWS)


@pytest.mark.parametrize("nth", [1, 6])
def test_a_second_signal_does_not_wait_for_the_step(nursery, alone, words, tmp_path, nth):
    again = [
        {"in": f"{MODULE}.training_step", "nth": nth, "after": 0, "do": "SIGINT"},
        {"in": "dmt.distillation.module:check_finite", "nth": nth, "after": 3, "do": "SIGTERM"},
    ]
    ended = nursery.run([*words, *ROWS], moments=again)
    run = tmp_path / "logs" / "version_0"
    assert ended.code == 130, ended
    assert "Traceback" not in ended.err
    where = (
        "before the first checkpoint; begin again with" if nth == 1 else "after step 4; resume with"
    )
    assert ended.last == f"stopped {where}: dmt distill --resume {run}"
    assert nursery.run(["--resume", run]).code == 0
    assert result(run) == alone(*ROWS)


def test_the_teachers_answers_being_written(nursery, words, tmp_path):
    said = stopped(
        nursery,
        [*words, *CACHE, f"logit_cache.dir={tmp_path / 'answers'}"],
        "SIGTERM",
        "dmt.distillation.logit_cache:_sample_window",
        5,
    )
    assert "finished work is saved" in said
    assert not list((tmp_path / "answers").iterdir())


@pytest.mark.parametrize(
    ("name", "into", "function", "nth"),
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
def test_a_consolidation(nursery, material, tmp_path, consolidated, name, into, function, nth):
    said = stopped(nursery, consolidation(material, tmp_path, into), name, function, nth)
    run = tmp_path / "logs" / "version_0"
    assert said.endswith(f"dmt distill --resume {run}")
    assert function.endswith("run:evaluate_student") == (run / "student").exists()
    assert nursery.run(["--resume", run]).code == 0
    assert weights(run / "student") == weights(consolidated(into))


@pytest.mark.parametrize(
    ("name", "function", "is_named"),
    [
        ("SIGTERM", "slot_training:KFACParameters.update_model", False),
        ("SIGINT", "sleep:copy_fact_store", True),
        ("SIGTERM", "sleep:evaluate_transfer", False),
    ],
)
def test_a_slot_transfer(nursery, material, told, tmp_path, name, function, is_named):
    student = copied(told, tmp_path / "student")
    before = {file.name: file.read_bytes() for file in student.iterdir()}
    run = tmp_path / "run" if is_named else tmp_path / "lightning_logs" / "version_0"
    words = ["sleep", "-m", student, "--replay-data", material / "text.txt", *SLEEP]
    words += ["--output", run] if is_named else []
    order = {"cwd": str(tmp_path)}
    said = stopped(nursery, words, name, f"dmt.consolidation.{function}", 1, program="dmt", **order)
    assert f"--resume {run if is_named else run.relative_to(tmp_path)}" in said
    assert (run / "student").exists() == (function == "sleep:evaluate_transfer")
    assert {
        file.name: file.read_bytes() for file in student.iterdir() if file.name in before
    } == before
    assert nursery.run(["--resume", run], **order).code == 0
    assert (run / "student" / "memory.db").exists()


def test_facts_being_written(nursery, told, tmp_path):
    words = [
        "memory",
        "write",
        "Ada Winterbourne was born in the town of Ravenhill.",
        "-m",
        copied(told, tmp_path / "student"),
    ]
    said = stopped(
        nursery, words, "SIGTERM", "dmt.editing.fact_store:prepare_facts", 1, program="dmt"
    )
    assert said == "stopped; finished work is saved"


@pytest.mark.parametrize(
    ("program", "number"),
    [(["distill.py"], signal.SIGINT), (["-m", "dmt", "memory", "stats"], signal.SIGTERM)],
)
def test_libraries_being_loaded(program, number):
    began = subprocess.Popen(
        [sys.executable, *program],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    maps = Path(f"/proc/{began.pid}/maps")
    while "libtorch" not in maps.read_text() and began.poll() is None:  # torch is being loaded
        time.sleep(0.01)
    began.send_signal(number)
    _, said = began.communicate()
    assert began.returncode == 128 + number, said
    assert (
        said.strip().splitlines()[-1]
        == "stopped while it was starting; nothing had begun, so nothing is lost"
    )
    assert "Traceback" not in said
