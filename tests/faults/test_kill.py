"""kill -9 in every stage, at a random point of it: nothing that was finished is lost, and going on ends as if nothing had been.

A point is drawn as one of the calls that the stage makes, so it is in the stage on any machine. FAULTS_SEED draws others.
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
    consolidation,
    copied,
    facts_in,
    prose_in,
    result,
    rows_of,
    small_run,
    whole_files,
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


def drawn(function, nth):
    """How many calls after the beginning of a stage it is to happen, as a share of them."""
    return random.Random(f"{SEED} {function} {nth}").random()


@pytest.fixture(scope="module")
def calls(nursery, material, tmp_path_factory):
    """How many calls a stage makes, by its function."""
    logs, functions = (
        tmp_path_factory.mktemp("counted"),
        sorted({function for function, _ in TRAINING}),
    )
    assert (
        nursery.run(
            [*small_run(material, logs), *ROWS], count=[functions, str(logs / "calls")]
        ).code
        == 0
    )
    found = {name: made for name, (made, _) in json.loads((logs / "calls").read_text()).items()}
    assert all(found.values())
    return found


def killed(nursery, words, function, nth, after, program="distill", **order):
    moment = {"in": function, "nth": nth, "after": after, "do": "SIGKILL"}
    print(f"seed {SEED}: killed {after:,} calls after the beginning of call {nth} of {function}")
    ended = nursery.run(words, program, moments=[moment], **order)
    assert ended.code == -signal.SIGKILL, ended.err
    return ended


@pytest.mark.parametrize(
    ("function", "nth"), TRAINING, ids=lambda part: str(part).rpartition(":")[2]
)
def test_a_distillation(nursery, alone, calls, words, tmp_path, function, nth):
    after = int(drawn(function, nth) * calls[function])
    killed(nursery, [*words, *ROWS], function, nth, after)
    run = tmp_path / "logs" / "version_0"
    whole_files(run)
    reported = json.loads((run / "run.json").read_text()) if (run / "run.json").exists() else {}
    assert "fidelity" not in reported or function.endswith("log_hparams")
    going_on = ["--resume", run] if (run / "config.yaml").exists() else [*words, *ROWS]
    ended = nursery.run(going_on)
    assert ended.code == 0, ended.err
    run = (
        run if (run / "run.json").exists() else run.with_name("version_1")
    )  # killed before its settings were written
    assert result(run) == alone(*ROWS)
    assert not [
        left
        for left in run.rglob("*")
        if "partial" in left.name or (".before" in left.name and left.is_dir())
    ]


def test_rows_written_before_the_first_checkpoint(nursery, alone, words, tmp_path):
    """There is nothing to go on from, so it begins again, and what was written is taken back."""
    given = (
        *ROWS,
        "stages.layerwise_steps=0",
        "memory.write_start=0",
        "trainer.checkpoint_every=100",
    )
    killed(nursery, [*words, *given], f"{MODULE}.training_step", 4, 10)
    run = tmp_path / "logs" / "version_0"
    assert not list(run.glob("checkpoints/*"))
    assert steps_in(run / "memory.db") == 3
    assert nursery.run(["--resume", run]).code == 0
    assert result(run) == alone(*given)


def test_a_distillation_again_and_again_at_any_time(nursery, alone, words, tmp_path):
    """Moments drawn by the clock, which may fall into what a library does outside Python."""
    given = (
        *ROWS,
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=120",
        "memory.write_start=0",
        "trainer.checkpoint_every=3",
    )
    drawn, run, reached = random.Random(f"{SEED} clock"), tmp_path / "logs" / "version_0", []
    for round_ in range(5):
        program = nursery.start(["--resume", run] if round_ else [*words, *given])
        wanted = (reached[-1] if reached else 0) + drawn.randint(1, 12)
        while (
            steps_in(run / "memory.db") < wanted or not list(run.glob("checkpoints/*.ckpt"))
        ) and alive(program):
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 0.03))
        os.kill(program, signal.SIGKILL)
        assert nursery.end(program).code == -signal.SIGKILL, "it was over before it was killed"
        whole_files(run)
        reached.append(steps_in(run / "memory.db"))
    print(f"seed {SEED}: killed after steps {reached}")
    assert reached[0] < reached[-1]
    assert nursery.run(["--resume", run]).code == 0
    assert result(run) == alone(*given)


def steps_in(store):
    """The last step whose rows are in a store."""
    if not store.exists():
        return 0
    with (
        contextlib.suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as opened,
    ):
        return opened.execute("SELECT max(step) FROM dmt_row_stats").fetchone()[0] or 0
    return 0


def alive(program):
    return Path(f"/proc/{program}/stat").read_text().split()[2] != "Z"


def test_the_teachers_answers_being_written(nursery, alone, words, tmp_path):
    place = tmp_path / "answers"
    given = [*words, *CACHE, f"logit_cache.dir={place}"]
    killed(
        nursery,
        given,
        "dmt.distillation.logit_cache:_sample_window",
        5,
        int(drawn("cache", 1) * 100),
    )
    assert [file for file in place.iterdir() if file.name.endswith(".partial")]
    assert not (place / "logits.npy").exists()
    assert not (tmp_path / "logs").exists()
    assert nursery.run(given).code == 0
    assert {file.name for file in place.iterdir()} == {"logits.npy", "logits.json"}
    assert result(tmp_path / "logs" / "version_0") == alone(*CACHE, f"logit_cache.dir={place}")


def test_a_consolidation_that_writes_rows(nursery, material, tmp_path, consolidated):
    words = consolidation(material, tmp_path)
    killed(
        nursery,
        words,
        "dmt.consolidation.rows:write_activation_deltas",
        1,
        int(drawn("rows", 1) * 2_000),
    )
    run = tmp_path / "logs" / "version_0"
    assert not (run / "student").exists()
    assert nursery.run(["--resume", run]).code == 0
    assert book_of(run / "student") == book_of(consolidated("memory"))


@pytest.mark.parametrize("nth", [1, 4])
def test_a_consolidation_that_trains(nursery, material, tmp_path, consolidated, nth):
    words = consolidation(material, tmp_path, "weights")
    killed(
        nursery,
        words,
        "dmt.consolidation.module:ContextDistillationModule.training_step",
        nth,
        int(drawn("trains", nth) * 2_000),
    )
    run = tmp_path / "logs" / "version_0"
    whole_files(run)
    assert nursery.run(["--resume", run]).code == 0
    assert weights(run / "student") == weights(consolidated("weights"))


def book_of(folder):
    """Facts of a student, and their rows."""
    with FactStore.open(folder) as book:
        facts = sorted(
            (fact.prompt, fact.answer, fact.thresholds) for fact in book.records.values()
        )
    return facts, [row[1:] for row in rows_of(folder / "memory.db").get("facts", [])]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_facts_being_written(nursery, told, tmp_path):
    one, other = (copied(told, tmp_path / name) for name in ("one", "other"))
    few = {"dmt.editing.fact_store:WRITE_BATCH_SIZE": 2}
    assert (
        nursery.run(
            ["memory", "write", "--file", facts_in(tmp_path, 8), "-m", one], "dmt", set=few
        ).code
        == 0
    )
    words = ["memory", "write", "--file", facts_in(tmp_path, 8), "-m", other]
    killed(
        nursery,
        words,
        "dmt.store.rows:RowStore.commit",
        3,
        int(drawn("write", 1) * 300),
        "dmt",
        set=few,
    )
    with FactStore.open(other, read_only=True) as book:
        assert len(book.records) in (
            4,
            6,
        )  # three from before; two in each transaction, of which three were known
    assert nursery.run(words, "dmt").code == 0
    assert book_of(other)[0] == book_of(one)[0]
    assert sorted(book_of(other)[1]) == sorted(book_of(one)[1])


def test_a_first_fact_being_written(nursery, told, tmp_path):
    student = copied(told, tmp_path / "student")
    for file in student.glob("memory.db*"):
        file.unlink()
    words = [
        "memory",
        "write",
        "--file",
        facts_in(tmp_path, 3),
        "-m",
        student,
        "--calibration-text",
        prose_in(tmp_path),
    ]
    killed(
        nursery, words, "dmt.store.facts:FactTable.create", 1, int(drawn("first", 1) * 300), "dmt"
    )
    load(student)
    assert nursery.run(words, "dmt").code == 0
    assert book_of(student) == book_of(told)


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
def test_a_slot_transfer(nursery, material, told, tmp_path, function):
    student = copied(told, tmp_path / "student")
    before = {file.name: file.read_bytes() for file in student.iterdir()}
    words = ["sleep", "-m", student, "--replay-data", material / "text.txt", *SLEEP, "--output"]
    assert nursery.run([*words, tmp_path / "complete"], "dmt").code == 0
    run = tmp_path / "run"
    killed(
        nursery,
        [*words, run],
        function,
        1,
        int(drawn(function, 1) * 200),
        "dmt",
    )
    assert not (run / "student").exists()
    after = {file.name: file.read_bytes() for file in student.iterdir()}
    assert {name: after[name] for name in before} == before
    assert nursery.run(["--resume", run]).code == 0
    assert weights(run / "student") == weights(tmp_path / "complete" / "student")
    assert not list(run.glob(".student*"))
