"""Consolidation runs from start to end: results, resume, errors."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_teacher, newest
from factories import PERSON, consolidation
from page_checks import check_self_contained
from test_tensorboard import load_events, read_charts
from transformers import AutoModelForCausalLM

from dmt import config_io
from dmt.cli.main import distill_main
from dmt.cli.main import main as dmt
from dmt.config import DataConfig
from dmt.consolidation import rows
from dmt.consolidation.sampling import BatchSampler
from dmt.editing.fact_store import FactStore
from dmt.evaluation.questions import (
    load_questions,
)
from dmt.models.loading import load_teacher

ROOT = Path(__file__).parents[2]


@pytest.fixture
def long_folder(tokenizer, tmp_path):
    """Save a tiny teacher with room for a context and a text after it."""
    folder = tmp_path / "teacher"
    make_teacher(len(tokenizer), n_positions=256).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(long_folder, text_file, tmp_path):
    """Arguments of a consolidation that takes seconds."""
    return consolidation(long_folder, text_file, tmp_path, "context.prompt_length=3")


def run_args(tmp_path):
    """Return the arguments that say where a run computes and writes."""
    return [
        "trainer.num_threads=1",
        f"trainer.log_dir={tmp_path / 'logs'}",
        "trainer.progress_bar=false",
        "trainer.precision=32-true",
        "trainer.accelerator=cpu",
    ]


def results(tmp_path):
    return json.loads((newest(tmp_path) / "run.json").read_text())


@pytest.mark.parametrize(
    "objective", ["causal_lm", "logits", "hidden_last", "hidden_all", "generated"]
)
@pytest.mark.parametrize(
    "where",
    [
        "context.target=prompt",
        "context.target=weights",
        "context.target=weights context.trainable=all",
    ],
)
def test_every_objective_trains_every_target(tiny, tmp_path, objective, where):
    assert distill_main([*tiny, f"context.objective={objective}", *where.split()]) == 0
    record = results(tmp_path)
    assert record["question_types"]["questions"]["num_questions"] == 1
    assert (newest(tmp_path) / "report.md").read_text().count("Ravenhill") >= 2
    page = (newest(tmp_path) / "report.html").read_text(encoding="utf-8")
    check_self_contained(page)
    assert page.count("Ravenhill") >= 2
    assert "train/loss" in (newest(tmp_path) / "metrics.csv").read_text().splitlines()[0]
    assert "val/benefit_retained" in (newest(tmp_path) / "metrics.csv").read_text().splitlines()[0]
    record = load_events(newest(tmp_path))
    scalar_tags = record.Tags()["scalars"]
    assert [
        tag
        for group in read_charts(record).values()
        for tags in group.values()
        for tag in tags
        if tag not in scalar_tags
    ] == []
    assert "epoch" not in scalar_tags
    assert {
        tuple(event.step for event in record.Scalars(tag))
        for tag in scalar_tags
        if tag.startswith("hparam/")
    } == {(4,)}
    with (newest(tmp_path) / "metrics.csv").open() as lines:
        losses = [float(line["train/loss"]) for line in csv.DictReader(lines) if line["train/loss"]]
    assert len(losses) == 4
    assert min(losses) > 1e-3, "training changes something"
    state = torch.load(newest(tmp_path) / "checkpoints" / "step_4.ckpt", weights_only=True)[
        "state_dict"
    ]
    assert (float(state["hidden_scale"]) != 1) == (objective != "causal_lm"), (
        "variances were measured"
    )
    assert bool((state["layer_scales"] != 1).all()) == (objective == "hidden_all")
    assert not [
        name
        for name in state
        if not name.startswith(("trainable.", "hidden_scale", "layer_scales"))
    ]


def test_a_signal_during_evaluation_can_be_resumed(tiny, tmp_path, monkeypatch, capsys):
    from dmt.consolidation import run as runs

    original = runs.evaluate_student
    monkeypatch.setattr(
        runs, "evaluate_student", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or original(*a)
    )
    assert distill_main([*tiny, "context.target=prompt"]) == 128 + signal.SIGTERM
    assert f"--resume {newest(tmp_path)}" in capsys.readouterr().err
    monkeypatch.setattr(runs, "evaluate_student", original)
    assert distill_main(["--resume", str(newest(tmp_path))]) == 0
    assert "answers" in results(tmp_path)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_weights_learn_the_context_and_change_little_else(tmp_path, capsys):
    args = [
        str(PERSON.with_suffix(".yaml")),
        "context.target=weights",
        "context.objective=causal_lm",
        "stages.end_to_end_steps=20",
        "stages.end_to_end_lr=4e-3",
        "data.test_tokens=1024",
        "data.validation_tokens=256",
        "optim.warmup_steps=2",
        "data.seq_len=96",
        "data.corpora=[biographies]",
        *run_args(tmp_path),
    ]
    kl_by_weight = {}
    for weight in (0, 1):
        assert distill_main([*args, f"context.unrelated_kl_weight={weight}"]) == 0
        record = results(tmp_path)
        assert record["question_types"]["as written"]["log_prob_consolidated"] > -1.5
        assert record["question_types"]["as written"]["log_prob_without_context"] < -5
        kl_by_weight[weight] = record["unrelated"]["biographies"]["kl"]
    assert kl_by_weight[1] < kl_by_weight[0] / 2


@pytest.mark.parametrize("write", ["activation_delta", "gradient", "trained"])
def test_a_context_is_written_to_memory(tmp_path, write):
    args = [
        str(PERSON.with_suffix(".yaml")),
        f"context.row_method={write}",
        "context.objective=logits",
        "stages.end_to_end_steps=3",
        "data.test_tokens=2048",
        "data.validation_tokens=256",
        "data.corpora=[biographies]",
        *run_args(tmp_path),
    ]
    assert distill_main(args) == 0
    record, run = results(tmp_path), newest(tmp_path)
    assert record["question_types"]["as written"]["benefit_retained"] >= 0.9
    assert record["unrelated"]["biographies"]["kl"] <= 1e-3
    assert record["rows_written"]["num_rows"] > 3
    with FactStore.open(run / "student", read_only=True) as fact_store:
        assert {fact.tag for fact in fact_store.records.values()} == {"person"}
        assert (
            sum(len(fact.rows) for fact in fact_store.records.values())
            == record["rows_written"]["num_rows"]
        )
    base = load_teacher("reader")[0].state_dict()
    saved = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in base.items()), (
        "no weight changes"
    )
    if write == "gradient":
        assert record["question_types"]["as written"]["recall_consolidated"] == 1


def test_training_rows_changes_their_values_alone(tmp_path):
    args = [
        str(PERSON.with_suffix(".yaml")),
        "context.objective=generated",
        "context.num_samples=4",
        "stages.end_to_end_steps=3",
        "data.seq_len=64",
        "data.test_tokens=512",
        "data.validation_tokens=256",
        "data.corpora=[biographies]",
        *run_args(tmp_path),
        "stages.end_to_end_lr=0.1",
    ]
    parts = {}
    for write in ("activation_delta", "trained"):
        assert distill_main([*args, f"context.row_method={write}"]) == 0
        with FactStore.open(newest(tmp_path) / "student", read_only=True) as fact_store:
            parts[write] = {
                fact.prompt: fact_store.load_fact(fact.id) for fact in fact_store.records.values()
            }
    assert set(parts["trained"]) == set(parts["activation_delta"])
    pairs = [(fact, parts["activation_delta"][prompt]) for prompt, fact in parts["trained"].items()]
    for trained, initial in pairs:
        np.testing.assert_array_equal(trained.keys, initial.keys)
        assert trained.record.answer_ids == initial.record.answer_ids
    num_changed = sum(
        not np.allclose(after, before, atol=1e-3)
        for trained, initial in pairs
        for after, before in zip(trained.values, initial.values, strict=True)
    )
    assert num_changed >= 3


def trained_rows(run):
    with FactStore.open(run / "student", read_only=True) as fact_store:
        return {
            fact.prompt: torch.from_numpy(fact_store.load_fact(fact.id).values)
            for fact in fact_store.records.values()
        }


def test_training_rows_resumes_to_equal_values(tmp_path, monkeypatch):
    args = [
        str(PERSON.with_suffix(".yaml")),
        "context.row_method=trained",
        "context.objective=logits",
        "stages.end_to_end_steps=4",
        "data.test_tokens=512",
        "data.validation_tokens=256",
        "data.corpora=[biographies]",
        *run_args(tmp_path),
        "data.seq_len=64",
        "stages.end_to_end_lr=0.1",
        "trainer.validate_every=0",
    ]
    assert distill_main(args) == 0
    complete, original = trained_rows(newest(tmp_path)), BatchSampler.get_batch

    def stop(sampler, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(sampler, step)

    monkeypatch.setattr(BatchSampler, "get_batch", stop)
    assert distill_main(args) == 128 + signal.SIGTERM
    run = newest(tmp_path)
    monkeypatch.setattr(BatchSampler, "get_batch", original)
    for _ in range(2):  # in the middle; after the last step, when only evaluation remains
        assert distill_main(["--resume", str(run)]) == 0
        resumed = trained_rows(run)
        assert set(resumed) == set(complete)
        assert len(complete) > 3
        assert all(torch.equal(resumed[prompt], complete[prompt]) for prompt in complete)
    assert results(tmp_path)["rows_written"]["num_facts"] == len(complete)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def run_with_fact(tiny, long_folder, text_file, tmp_path):
    """Return the run folder of a student with rows in its last layer and one fact."""
    distill_args = [
        f"teacher={long_folder}",
        f"data.corpora=[{text_file}]",
        "data.seq_len=32",
        "data.batch_size=2",
        "data.micro_batch_size=2",
        "data.validation_tokens=64",
        "data.test_tokens=64",
        "stages.calibration_tokens=64",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=2",
        *run_args(tmp_path),
        "memory.mean_k=8",
        "student.layer_overrides=[{layers: last, "
        "memory: {kind: associative, write_start: 0, min_distance: 0}}]",
    ]
    assert distill_main(distill_args) == 0
    run = newest(tmp_path)
    assert dmt(["memory", "write", "Bo Ray was born in Hill.", "-m", str(run)]) == 0
    return run


def test_only_rows_of_the_context_are_trained(tiny, run_with_fact, tmp_path, monkeypatch):
    gradients = []

    def record_gradient(run_state, model, trainable, *_):
        trainable["rows"].sum().backward()
        gradients.append(trainable["rows"].grad)

    monkeypatch.setattr(rows, "train_student", record_gradient)
    monkeypatch.setattr(rows, "find_false_triggers", lambda *_: set())
    assert (
        distill_main(
            [
                *tiny,
                f"teacher={run_with_fact}",
                "context.row_method=trained",
                "context.objective=logits",
            ]
        )
        == 0
    )
    has_gradient = gradients[0].abs().sum(1) > 0
    assert has_gradient.all()
    with (
        FactStore.open(run_with_fact, read_only=True) as before,
        FactStore.open(newest(tmp_path), read_only=True) as after,
    ):
        (earlier,) = before.records
        rows_of_context = [
            row for fact in after.records.values() if fact.id != earlier for row in fact.rows
        ]
        assert len(has_gradient) == len(rows_of_context) > 0
        assert after.records[earlier] == before.records[earlier]
        np.testing.assert_array_equal(
            after.load_fact(earlier).values, before.load_fact(earlier).values
        )


def test_a_consolidated_student_can_be_a_teacher(tiny, tmp_path):
    assert distill_main([*tiny, "context.target=weights"]) == 0
    args = [word for word in tiny if not word.startswith(("task", "teacher", "context"))]
    more = ["stages.calibration_tokens=64", "stages.layerwise_steps=1", "memory.mean_k=8"]
    assert distill_main([*args, *more, f"teacher={newest(tmp_path) / 'student'}"]) == 0


def test_rows_that_fire_in_unrelated_text_are_removed(tiny, tmp_path):
    assert (
        distill_main([*tiny, "context.row_method=gradient"]) == 0
    )  # the unrelated text contains the same sentences
    record = results(tmp_path)
    assert record["rows_written"]["false_triggers"] >= 1
    assert "removed: " in (newest(tmp_path) / "report.md").read_text()
    with FactStore.open(newest(tmp_path) / "student", read_only=True) as fact_store:
        assert len(fact_store.records) == record["rows_written"]["num_facts"]
        removed = [
            fact
            for fact in fact_store.fact_table.read(include_deleted=True)
            if fact.deleted_reason == "evicted"
        ]
        assert len(removed) == record["rows_written"]["false_triggers"]


def test_a_stopped_run_resumes_to_equal_weights(tiny, tmp_path):
    args = [*tiny, "context.target=prompt"]
    assert distill_main(args) == 0
    run = newest(tmp_path)
    complete = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    (run / "checkpoints" / "step_4.ckpt").unlink()
    shutil.rmtree(run / "student")
    assert distill_main(["--resume", str(run)]) == 0
    resumed = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    assert all(torch.equal(resumed[name], complete[name]) for name in complete)


@pytest.mark.parametrize("target", ["memory", "weights", "prompt"])
def test_a_student_with_rows_and_facts_retains_them(
    tiny, run_with_fact, tmp_path, target, tokens, capsys
):
    before = AutoModelForCausalLM.from_pretrained(run_with_fact / "student")
    args = [
        *tiny,
        f"teacher={run_with_fact}",
        f"context.target={target}",
        "stages.end_to_end_lr=1e-30",
        "context.row_method=gradient",
    ]
    assert distill_main(args) == 0
    assert ("stay there" in "".join(capsys.readouterr())) == (target != "memory")
    student = AutoModelForCausalLM.from_pretrained(newest(tmp_path) / "student")
    torch.testing.assert_close(student(tokens).logits, before(tokens).logits, rtol=1e-4, atol=1e-4)
    with FactStore.open(
        run_with_fact / "student", read_only=True
    ) as fact_store:  # the source is unchanged
        assert [fact.answer for fact in fact_store.records.values()] == [" Hill"]
    if target == "memory":
        with FactStore.open(newest(tmp_path) / "student", read_only=True) as fact_store:
            assert " Hill" in [fact.answer for fact in fact_store.records.values()]


def test_trainable_slots_changes_slots_alone(tiny, long_folder, text_file, tmp_path):
    distill_args = [
        f"teacher={long_folder}",
        f"data.corpora=[{text_file}]",
        "data.seq_len=32",
        "data.batch_size=2",
        "data.micro_batch_size=2",
        "data.validation_tokens=64",
        "data.test_tokens=64",
        "stages.calibration_tokens=64",
        "stages.layerwise_steps=0",
        "stages.end_to_end_steps=1",
        *run_args(tmp_path),
        "memory.mean_k=8",
    ]
    assert distill_main(distill_args) == 0
    student = newest(tmp_path)
    args = [
        *tiny,
        f"teacher={student}",
        "context.target=weights",
        "context.trainable=slots",
        "stages.end_to_end_lr=0.01",
    ]
    assert distill_main(args) == 0
    before, now = (
        AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
        for run in (student, newest(tmp_path))
    )
    changed = {name for name in before if not torch.equal(before[name], now[name])}
    assert changed
    assert all(".mlp." in name for name in changed)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["context.file=null"], "got neither"),
        (["context.text=hello"], "got both"),
        (["context.target=memory", "context.objective=causal_lm"], "has no teacher"),
        (["context.target=prompt", "stages.end_to_end_steps=0"], "is trained"),
        (["context.target=brain"], "context.target must be one of memory, weights, prompt"),
        (["context.max_tokens=3"], "more than context.max_tokens=3"),
        (["context.prompt_length=200", "context.target=prompt"], "leaves no room"),
        (["context.questions=nowhere.jsonl"], "cannot be read"),
        (["context.target=weights", "context.trainable=slots"], "name a distilled student"),
        (["context.temperature=0"], "must be a positive number"),
    ],
)
def test_contradictions_are_rejected_before_a_run_folder_exists(
    tiny, tmp_path, capsys, args, message
):
    assert distill_main([*tiny, *args]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "logs").glob("version_*"))


def test_shipped_contexts_equal_the_output_of_their_script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import contexts

    people = contexts.make_unseen_people(9, seed=contexts.SEED)
    for name, chosen_people in (("person", people[:1]), ("people", people[1:])):
        text, questions = contexts.make_page(chosen_people, contexts.SEED)
        assert (contexts.FOLDER / f"{name}.txt").read_text() == text + "\n"
        assert load_questions(contexts.FOLDER / f"{name}.jsonl") == questions


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs" / "consolidation").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_shipped_consolidation_config_loads(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = config_io.load_config(file)
    assert config.task == "consolidate"
    assert len(load_questions(config.context.questions)) >= 15
    assert Path(config.context.file).is_file()
    assert config.data != DataConfig() or config.teacher == "reader"
