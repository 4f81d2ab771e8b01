"""Two programs on one run, store or cache: the second waits or is refused in one line."""

import os
import signal
import time

import pytest

from faults.subprocesses import ROWS, copy_folder, read_result, write_facts_file
from faults.test_disk_errors import assert_one_line_error
from faults.test_kill import CACHE, MODULE, SLEEP, read_facts_and_rows, read_weights


@pytest.fixture
def paused(launcher, tmp_path):
    """Two functions: start a program that waits at the start of a function, and let it go on."""
    go, started_pids = tmp_path / "go", []

    def start(args, function, program="distill", nth=1, **order):
        moment = {"in": function, "nth": nth, "do": "wait", "target": str(go)}
        started_pids.append(launcher.start(args, program, moments=[moment], **order))
        waiting_file = go.with_name("go.waiting")
        while not waiting_file.exists():
            time.sleep(0.01)
        waiting_file.unlink()
        return started_pids[-1]

    def release(pid):
        go.touch()
        started_pids.remove(pid)
        return launcher.wait(pid)

    yield start, release
    for pid in started_pids:
        os.kill(pid, signal.SIGKILL)
        launcher.wait(pid)


def test_two_new_runs_have_two_folders(
    launcher, uninterrupted_result, distill_args, tmp_path, paused
):
    start, release = paused
    first = start([*distill_args, *ROWS], f"{MODULE}.calibrate")
    assert launcher.run([*distill_args, *ROWS]).code == 0
    assert release(first).code == 0
    assert (
        read_result(tmp_path / "logs" / "version_0")
        == read_result(tmp_path / "logs" / "version_1")
        == uninterrupted_result(*ROWS)
    )


@pytest.mark.parametrize("state", ["new", "resumed"])
def test_a_run_is_resumed_by_one_program_at_a_time(
    launcher, uninterrupted_result, distill_args, tmp_path, paused, state
):
    start, release = paused
    run = tmp_path / "logs" / "version_0"
    if state == "resumed":
        moment = {"in": f"{MODULE}.training_step", "nth": 6, "do": "SIGTERM"}
        assert launcher.run([*distill_args, *ROWS], moments=[moment]).code == 143
    first = start(
        ["--resume", run] if state == "resumed" else [*distill_args, *ROWS],
        f"{MODULE}.training_step",
        nth=2,
    )
    before = {file.name for file in run.rglob("*")}
    assert_one_line_error(
        launcher.run(["--resume", run]),
        f"--resume {run}: another program works on this run; wait until it has ended",
    )
    assert {file.name for file in run.rglob("*")} == before
    assert release(first).code == 0
    assert read_result(run) == uninterrupted_result(*ROWS)
    assert launcher.run(["--resume", run]).code == 0


def test_a_killed_program_holds_no_lock(
    launcher, uninterrupted_result, distill_args, tmp_path, paused
):
    start, _ = paused
    first = start([*distill_args, *ROWS], f"{MODULE}.training_step", nth=6)
    os.kill(first, signal.SIGKILL)
    run = tmp_path / "logs" / "version_0"
    while (
        launcher.run(
            ["--resume", run],
            count=[["dmt.distillation.run:evaluate_student"], str(tmp_path / "calls")],
        ).code
        != 0
    ):
        pass  # the killed program still ends
    assert read_result(run) == uninterrupted_result(*ROWS)


def test_facts_of_a_student_have_one_writer_at_a_time(
    launcher, student_with_facts, tmp_path, paused
):
    start, release = paused
    student, undisturbed = (
        copy_folder(student_with_facts, tmp_path / name) for name in ("student", "undisturbed")
    )
    args = ["memory", "write", "--file", write_facts_file(tmp_path, 6)]
    assert launcher.run([*args, "-m", undisturbed], "dmt").code == 0
    first = start([*args, "-m", student], "dmt.editing.fact_store:prepare_facts", "dmt")
    for other in (["memory", "write", "Ada was born in Hill."], ["memory", "forget", "--id", "1"]):
        assert_one_line_error(
            launcher.run([*other, "-m", student], "dmt"),
            f"store {student / 'memory.db'}: another program is writing to it",
        )
    assert launcher.run(["memory", "list", "-m", student], "dmt").code == 0, (
        "a reader does not wait"
    )
    assert release(first).code == 0
    assert read_facts_and_rows(student) == read_facts_and_rows(undisturbed)


def test_a_store_has_one_writer_at_a_time(launcher, distill_args, tmp_path, paused):
    start, release = paused
    args = [*distill_args, *ROWS, f"store.url={tmp_path / 'rows.db'}"]
    first = start(args, f"{MODULE}.training_step", nth=7)
    assert_one_line_error(
        launcher.run(args), f"store {tmp_path / 'rows.db'}: another program is writing to it"
    )
    assert not (tmp_path / "logs" / "version_1").exists()
    assert release(first).code == 0


def test_a_second_slot_transfer_to_one_folder_is_refused(
    launcher, input_dir, student_with_facts, tmp_path, paused
):
    start, release = paused
    args = [
        "sleep",
        "-m",
        student_with_facts,
        "--replay-data",
        input_dir / "text.txt",
        *SLEEP,
        "--output",
    ]
    assert launcher.run([*args, tmp_path / "undisturbed"], "dmt").code == 0
    run = tmp_path / "run"
    first = start([*args, run], "dmt.consolidation.sleep:copy_fact_store", "dmt")
    assert_one_line_error(launcher.run([*args, run], "dmt"), f"{run} exists")
    assert_one_line_error(launcher.run(["--resume", run]), "another program works on this run")
    assert release(first).code == 0
    assert read_weights(run / "student") == read_weights(tmp_path / "undisturbed" / "student")
    assert_one_line_error(launcher.run([*args, run], "dmt"), f"{run} exists")


def test_a_second_run_waits_for_the_logit_cache_and_reads_it(
    launcher, distill_args, tmp_path, paused
):
    start, release = paused
    cache_dir = tmp_path / "cache"
    args = [
        *distill_args,
        *CACHE,
        f"logit_cache.dir={cache_dir}",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=2",
    ]
    first = start(args, "dmt.distillation.logit_cache:_sample_window", nth=3)
    second = launcher.start(args)
    err_file = launcher.logs[second].with_name(f"{launcher.logs[second].name}.err")
    while "waiting for another run that writes the cache" not in err_file.read_text():
        time.sleep(0.01)
    assert release(first).code == 0
    ended = launcher.wait(second)
    assert ended.code == 0, ended.err
    assert {file.name for file in cache_dir.iterdir()} == {"logits.npy", "logits.json"}
    assert "caching the teacher's logits" not in ended.err, "the second run reads the cache"
    assert read_result(tmp_path / "logs" / "version_0") == read_result(
        tmp_path / "logs" / "version_1"
    )
