"""Kill runs with SIGKILL in every stage: they resume to the result of an uninterrupted run.

The moment is one of the calls that the stage makes, drawn at random, so that it lies in the stage
on any machine. Set FAULTS_SEED to draw others.
"""

import contextlib
import json
import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from dmt.editing.fact_store import FactStore
from dmt.models.loading import load
from faults.subprocesses import (
    ROWS,
    assert_files_intact,
    consolidation_args,
    copy_folder,
    read_result,
    read_rows,
    small_run_args,
    write_facts_file,
    write_prose_file,
)

SEED = int(os.environ.get("FAULTS_SEED", "0"))
RUN, MODULE = "dmt.distillation.run", "dmt.distillation.module:DistillationModule"
TRAINING = [
    (f"{RUN}:load_teacher", 1),
    (f"{RUN}:create_run_dir", 1),
    (f"{MODULE}.calibrate", 1),
    (f"{MODULE}.training_step", 2),  # layer by layer, before the first checkpoint
    (f"{MODULE}.training_step", 4),
    (f"{MODULE}.training_step", 7),  # end to end, rows being written
    ("dmt.store.rows:RowStore.commit", 2),
    (f"{MODULE}.validation_step", 2),
    ("dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", 1),
    ("dmt.training.checkpoints:AtomicCheckpointIO.save_checkpoint", 3),
    (f"{RUN}:evaluate_student", 1),
    (f"{RUN}:_save_student", 1),
    (f"{RUN}:measure_sizes", 1),
    (f"{RUN}:log_hparams", 1),
]
CACHE = ["loss.hidden_mse=0", "loss.block_fvu=0", "logit_cache.top_k=16"]


def draw_fraction(function, nth):
    """Draw the share of a stage's calls after which it is killed."""
    return random.Random(f"{SEED} {function} {nth}").random()


@pytest.fixture(scope="module")
def calls(launcher, input_dir, tmp_path_factory):
    """The number of calls that each stage makes, by its function."""
    logs, functions = (
        tmp_path_factory.mktemp("counted"),
        sorted({function for function, _ in TRAINING}),
    )
    assert (
        launcher.run(
            [*small_run_args(input_dir, logs), *ROWS], count=[functions, str(logs / "calls")]
        ).code
        == 0
    )
    counts = {name: count for name, (count, _) in json.loads((logs / "calls").read_text()).items()}
    assert all(counts.values())
    return counts


def run_until_killed(launcher, args, function, nth, after, program="distill", **order):
    moment = {"in": function, "nth": nth, "after": after, "do": "SIGKILL"}
    print(f"seed {SEED}: killed {after:,} calls after the beginning of call {nth} of {function}")
    ended = launcher.run(args, program, moments=[moment], **order)
    assert ended.code == -signal.SIGKILL, ended.err
    return ended


@pytest.mark.parametrize(
    ("function", "nth"), TRAINING, ids=lambda part: str(part).rpartition(":")[2]
)
def test_a_killed_distillation_resumes_to_the_same_result(
    launcher, uninterrupted_result, calls, distill_args, tmp_path, function, nth
):
    after = int(draw_fraction(function, nth) * calls[function])
    run_until_killed(launcher, [*distill_args, *ROWS], function, nth, after)
    run = tmp_path / "logs" / "version_0"
    assert_files_intact(run)
    reported = json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}
    assert "fidelity" not in reported or function.endswith("log_hparams")
    resume_args = ["--resume", run] if (run / "config.yaml").exists() else [*distill_args, *ROWS]
    ended = launcher.run(resume_args)
    assert ended.code == 0, ended.err
    if not (run / "run.json").exists():  # killed before its settings were written
        run = run.with_name("version_1")
    assert read_result(run) == uninterrupted_result(*ROWS)
    assert not [
        path
        for path in run.rglob("*")
        if "partial" in path.name or (".before" in path.name and path.is_dir())
    ]


def test_rows_written_before_the_first_checkpoint_are_rewound(
    launcher, uninterrupted_result, distill_args, tmp_path
):
    """The run begins again, so the rows that it wrote are deleted."""
    settings = (
        *ROWS,
        "stages.layerwise_steps=0",
        "memory.write_start=0",
        "trainer.checkpoint_every=100",
    )
    run_until_killed(launcher, [*distill_args, *settings], f"{MODULE}.training_step", 4, 10)
    run = tmp_path / "logs" / "version_0"
    assert not list(run.glob("checkpoints/*"))
    assert read_last_step(run / "memory.db") == 3
    assert launcher.run(["--resume", run]).code == 0
    assert read_result(run) == uninterrupted_result(*settings)


@pytest.mark.parametrize("nth", [2, 5, 12])
def test_a_run_killed_between_checkpoints_ends_with_the_same_file(
    launcher, input_dir, tmp_path, nth
):
    """Rows of steps after the newest checkpoint are written twice, under the same ids."""
    settings = (
        *ROWS,
        "memory.write_start=0",
        "memory.min_distance=0.01",
        "memory.capacity=97",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=12",
        "trainer.checkpoint_every=3",
    )
    weights = {}
    for name in ("uninterrupted", "killed"):
        args = [*small_run_args(input_dir, tmp_path / name), *settings]
        run = tmp_path / name / "version_0"
        if name == "killed":
            run_until_killed(launcher, args, "dmt.store.rows:RowStore.commit", nth, 1)
            assert read_last_step(run / "memory.db") == nth - 1
            args = ["--resume", run]
        assert launcher.run(args).code == 0
        weights[name] = read_weights(run / "student")
    assert weights["killed"] == weights["uninterrupted"]


def test_a_distillation_killed_several_times_at_any_time(
    launcher, uninterrupted_result, distill_args, tmp_path
):
    """The clock picks the moments, which may fall into library code outside Python."""
    settings = (
        *ROWS,
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=120",
        "memory.write_start=0",
        "trainer.checkpoint_every=3",
    )
    rng, run, reached = random.Random(f"{SEED} clock"), tmp_path / "logs" / "version_0", []
    for round_ in range(5):
        program = launcher.start(["--resume", run] if round_ else [*distill_args, *settings])
        target_step = (reached[-1] if reached else 0) + rng.randint(1, 12)
        while (
            read_last_step(run / "memory.db") < target_step
            or not list(run.glob("checkpoints/*.ckpt"))
        ) and is_alive(program):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(program, signal.SIGKILL)
        assert launcher.wait(program).code == -signal.SIGKILL, "the run ended before it was killed"
        assert_files_intact(run)
        reached.append(read_last_step(run / "memory.db"))
    print(f"seed {SEED}: killed after steps {reached}")
    assert reached[0] < reached[-1]
    assert launcher.run(["--resume", run]).code == 0
    assert read_result(run) == uninterrupted_result(*settings)


def read_last_step(store):
    """Return the last step whose rows are in a store."""
    if not store.exists():
        return 0
    with (
        contextlib.suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as opened,
    ):
        return opened.execute("SELECT max(step) FROM dmt_row_stats").fetchone()[0] or 0
    return 0


def is_alive(program):
    return Path(f"/proc/{program}/stat").read_text().split()[2] != "Z"


def test_a_logit_cache_killed_while_written_is_written_again(
    launcher, uninterrupted_result, distill_args, tmp_path
):
    cache_dir = tmp_path / "cache"
    args = [*distill_args, *CACHE, f"logit_cache.dir={cache_dir}"]
    run_until_killed(
        launcher,
        args,
        "dmt.distillation.logit_cache:_sample_window",
        5,
        int(draw_fraction("cache", 1) * 100),
    )
    assert [file for file in cache_dir.iterdir() if file.name.endswith(".partial")]
    assert not (cache_dir / "logits.npy").exists()
    assert not (tmp_path / "logs").exists()
    assert launcher.run(args).code == 0
    assert {file.name for file in cache_dir.iterdir()} == {"logits.npy", "logits.json"}
    assert read_result(tmp_path / "logs" / "version_0") == uninterrupted_result(
        *CACHE, f"logit_cache.dir={cache_dir}"
    )


def test_a_killed_consolidation_into_rows_resumes(
    launcher, input_dir, tmp_path, uninterrupted_student
):
    args = consolidation_args(input_dir, tmp_path)
    run_until_killed(
        launcher,
        args,
        "dmt.consolidation.rows:write_activation_deltas",
        1,
        int(draw_fraction("rows", 1) * 2_000),
    )
    run = tmp_path / "logs" / "version_0"
    assert not (run / "student").exists()
    assert launcher.run(["--resume", run]).code == 0
    assert read_facts_and_rows(run / "student") == read_facts_and_rows(
        uninterrupted_student("memory")
    )


@pytest.mark.parametrize("nth", [1, 4])
def test_a_killed_consolidation_into_weights_resumes(
    launcher, input_dir, tmp_path, uninterrupted_student, nth
):
    args = consolidation_args(input_dir, tmp_path, "weights")
    run_until_killed(
        launcher,
        args,
        "dmt.consolidation.module:ContextDistillationModule.training_step",
        nth,
        int(draw_fraction("trains", nth) * 2_000),
    )
    run = tmp_path / "logs" / "version_0"
    assert_files_intact(run)
    assert launcher.run(["--resume", run]).code == 0
    assert read_weights(run / "student") == read_weights(uninterrupted_student("weights"))


def read_facts_and_rows(folder):
    """Return the facts of a student and their rows."""
    with FactStore.open(folder) as store:
        facts = sorted(
            (fact.prompt, fact.answer, fact.thresholds) for fact in store.records.values()
        )
    return facts, [row[1:] for row in read_rows(folder / "memory.db").get("facts", [])]


def read_weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_facts_killed_while_written_are_written_again(launcher, student_with_facts, tmp_path):
    uninterrupted_student, student = (
        copy_folder(student_with_facts, tmp_path / name) for name in ("uninterrupted", "killed")
    )
    small_batches = {"dmt.editing.fact_store:WRITE_BATCH_SIZE": 2}
    assert (
        launcher.run(
            [
                "memory",
                "write",
                "--file",
                write_facts_file(tmp_path, 8),
                "-m",
                uninterrupted_student,
            ],
            "dmt",
            set=small_batches,
        ).code
        == 0
    )
    args = ["memory", "write", "--file", write_facts_file(tmp_path, 8), "-m", student]
    run_until_killed(
        launcher,
        args,
        "dmt.store.rows:RowStore.commit",
        3,
        int(draw_fraction("write", 1) * 300),
        "dmt",
        set=small_batches,
    )
    with FactStore.open(student, read_only=True) as store:
        # The student had 3 of the 8 facts; each transaction writes 2.
        assert len(store.records) in (4, 6)
    assert launcher.run(args, "dmt").code == 0
    assert read_facts_and_rows(student)[0] == read_facts_and_rows(uninterrupted_student)[0]
    assert sorted(read_facts_and_rows(student)[1]) == sorted(
        read_facts_and_rows(uninterrupted_student)[1]
    )


def test_a_first_fact_killed_while_written_is_written_again(launcher, student_with_facts, tmp_path):
    student = copy_folder(student_with_facts, tmp_path / "student")
    for file in student.glob("memory.db*"):
        file.unlink()
    args = [
        "memory",
        "write",
        "--file",
        write_facts_file(tmp_path, 3),
        "-m",
        student,
        "--calibration-text",
        write_prose_file(tmp_path),
    ]
    run_until_killed(
        launcher,
        args,
        "dmt.store.facts:FactTable.create",
        1,
        int(draw_fraction("first", 1) * 300),
        "dmt",
    )
    load(student)
    assert launcher.run(args, "dmt").code == 0
    assert read_facts_and_rows(student) == read_facts_and_rows(student_with_facts)


SLEEP = [
    "--steps",
    "6",
    "--lr",
    "0.1",
    "sleep.num_windows=24",
    "sleep.eval_tokens=320",
    "sleep.unrelated_kl_weight=1",
    "sleep.max_paraphrases=24",
    "trainer.checkpoint_every=2",
    "trainer.progress_bar=false",
]


@pytest.mark.parametrize(
    "function",
    [
        "dmt.consolidation.slot_training:KFACParameters.update_model",
        "dmt.consolidation.sleep:copy_fact_store",
    ],
)
def test_a_killed_slot_transfer_resumes(
    launcher, input_dir, student_with_facts, tmp_path, function
):
    student = copy_folder(student_with_facts, tmp_path / "student")
    before = {file.name: file.read_bytes() for file in student.iterdir()}
    args = ["sleep", "-m", student, "--replay-data", input_dir / "text.txt", *SLEEP, "--output"]
    assert launcher.run([*args, tmp_path / "complete"], "dmt").code == 0
    run = tmp_path / "run"
    run_until_killed(
        launcher,
        [*args, run],
        function,
        1,
        int(draw_fraction(function, 1) * 200),
        "dmt",
    )
    assert not (run / "student").exists()
    after = {file.name: file.read_bytes() for file in student.iterdir()}
    assert {name: after[name] for name in before} == before
    assert launcher.run(["--resume", run]).code == 0
    assert read_weights(run / "student") == read_weights(tmp_path / "complete" / "student")
    assert not list(run.glob(".student*"))
