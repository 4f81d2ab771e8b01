"""Two programs at one place: the second waits or is refused in one line, the first is as if alone; the dead hold nothing."""

import os
import signal
import time

import pytest

from faults.subprocesses import ROWS, copied, facts_in, result
from faults.test_disk_errors import one_line
from faults.test_kill import CACHE, MODULE, SLEEP, book_of, weights


@pytest.fixture
def held(nursery, tmp_path):
    """Starts a program that waits at the beginning of a function until it is let go; gives what lets it go and its id."""
    go, started = tmp_path / "go", []

    def start(words, function, program="distill", nth=1, **order):
        moment = {"in": function, "nth": nth, "do": "wait", "about": str(go)}
        started.append(nursery.start(words, program, moments=[moment], **order))
        there = go.with_name("go.there")
        while not there.exists():
            time.sleep(0.01)
        there.unlink()
        return started[-1]

    def release(pid):
        go.touch()
        started.remove(pid)
        return nursery.end(pid)

    yield start, release
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        nursery.end(pid)


def test_two_new_runs_have_two_folders(nursery, alone, words, tmp_path, held):
    start, release = held
    first = start([*words, *ROWS], f"{MODULE}.calibrate")
    assert nursery.run([*words, *ROWS]).code == 0
    assert release(first).code == 0
    assert (
        result(tmp_path / "logs" / "version_0")
        == result(tmp_path / "logs" / "version_1")
        == alone(*ROWS)
    )


@pytest.mark.parametrize("begun", ["new", "resumed"])
def test_two_that_go_on_with_one_run(nursery, alone, words, tmp_path, held, begun):
    start, release = held
    run = tmp_path / "logs" / "version_0"
    if begun == "resumed":
        moment = {"in": f"{MODULE}.training_step", "nth": 6, "do": "SIGTERM"}
        assert nursery.run([*words, *ROWS], moments=[moment]).code == 143
    first = start(
        ["--resume", run] if begun == "resumed" else [*words, *ROWS],
        f"{MODULE}.training_step",
        nth=2,
    )
    before = {file.name for file in run.rglob("*")}
    one_line(
        nursery.run(["--resume", run]),
        f"--resume {run}: another program works on this run; wait until it has ended",
    )
    assert {file.name for file in run.rglob("*")} == before
    assert release(first).code == 0
    assert result(run) == alone(*ROWS)
    assert nursery.run(["--resume", run]).code == 0


def test_who_was_killed_holds_nothing(nursery, alone, words, tmp_path, held):
    start, _ = held
    first = start([*words, *ROWS], f"{MODULE}.training_step", nth=6)
    os.kill(first, signal.SIGKILL)
    run = tmp_path / "logs" / "version_0"
    while (
        nursery.run(
            ["--resume", run],
            count=[["dmt.distillation.run:evaluate_student"], str(tmp_path / "calls")],
        ).code
        != 0
    ):
        pass  # it is dying
    assert result(run) == alone(*ROWS)


def test_two_that_write_one_students_book(nursery, told, tmp_path, held):
    start, release = held
    student, alone = (copied(told, tmp_path / name) for name in ("student", "alone"))
    words = ["memory", "write", "--file", facts_in(tmp_path, 6)]
    assert nursery.run([*words, "-m", alone], "dmt").code == 0
    first = start([*words, "-m", student], "dmt.editing.fact_store:prepare_facts", "dmt")
    for other in (["memory", "write", "Ada was born in Hill."], ["memory", "forget", "--id", "1"]):
        one_line(
            nursery.run([*other, "-m", student], "dmt"),
            f"store {student / 'memory.db'}: another program is writing to it",
        )
    assert nursery.run(["memory", "list", "-m", student], "dmt").code == 0, (
        "who reads does not wait"
    )
    assert release(first).code == 0
    assert book_of(student) == book_of(alone)


def test_two_runs_that_write_one_store(nursery, words, tmp_path, held):
    start, release = held
    given = [*words, *ROWS, f"store.url={tmp_path / 'rows.db'}"]
    first = start(given, f"{MODULE}.training_step", nth=7)
    one_line(nursery.run(given), f"store {tmp_path / 'rows.db'}: another program is writing to it")
    assert not (tmp_path / "logs" / "version_1").exists()
    assert release(first).code == 0


def test_two_slot_transfers_to_one_folder(nursery, material, told, tmp_path, held):
    start, release = held
    words = ["sleep", "-m", told, "--replay-data", material / "text.txt", *SLEEP, "--output"]
    assert nursery.run([*words, tmp_path / "alone"], "dmt").code == 0
    run = tmp_path / "run"
    first = start([*words, run], "dmt.consolidation.sleep:copy_fact_store", "dmt")
    one_line(nursery.run([*words, run], "dmt"), f"{run} exists")
    one_line(nursery.run(["--resume", run]), "another program works on this run")
    assert release(first).code == 0
    assert weights(run / "student") == weights(tmp_path / "alone" / "student")
    one_line(nursery.run([*words, run], "dmt"), f"{run} exists")


def test_two_that_write_the_teachers_answers(nursery, words, tmp_path, held):
    start, release = held
    place = tmp_path / "answers"
    given = [
        *words,
        *CACHE,
        f"logit_cache.dir={place}",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=2",
    ]
    first = start(given, "dmt.distillation.logit_cache:_sample_window", nth=3)
    second = nursery.start(given)
    said = nursery.logs[second].with_name(f"{nursery.logs[second].name}.err")
    while "waiting for another run that writes the teacher's answers" not in said.read_text():
        time.sleep(0.01)
    assert release(first).code == 0
    ended = nursery.end(second)
    assert ended.code == 0, ended.err
    assert {file.name for file in place.iterdir()} == {"logits.npy", "logits.json"}
    assert "teacher's answers to" not in ended.out, "what the first has written is read"
    assert result(tmp_path / "logs" / "version_0") == result(tmp_path / "logs" / "version_1")
